"""What programs do before they start."""

import jax

from launch import flags


def test_the_compilation_cache_lies_where_the_environment_says(
  tmp_path, monkeypatch
):
  told = {}
  monkeypatch.setattr(
    type(jax.config),
    "update",
    lambda _, name, value: told.update({name: value}),
  )
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  flags.start()
  place = str(tmp_path / "onerec_jax/jax")
  assert told.pop("jax_compilation_cache_dir") == place
  # JAX reads the variable itself.
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
  flags.start()
  assert "jax_compilation_cache_dir" not in told
