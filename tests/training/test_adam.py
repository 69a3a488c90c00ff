"""AdamW in few passes: optax's numbers, and what it writes to memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from onerec_jax.training import adam

RATE = optax.warmup_cosine_decay_schedule(0.0, 3e-2, 3, 12)


def decayed(params):
  return {"matrix": True, "scale": False}


def ours():
  return optax.chain(
    adam.clip_by_global_norm(1.0), adam.adamw(RATE, 0.9, 0.95, 0.1, decayed)
  )


def optaxs():
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(RATE, 0.9, 0.95, weight_decay=0.1, mask=decayed),
  )


def start():
  rng = np.random.default_rng(0)
  return {
    "matrix": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32),
    "scale": jnp.ones(7),
  }


def gradients(number, size=1.0):
  rng = np.random.default_rng(number)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * size, jnp.float32), start()
  )


@pytest.mark.parametrize("size", [1e-2, 1.0], ids=["below", "above"])
def test_the_updates_of_optax(size):
  """With gradients below and above the norm they are clipped to."""
  got, want = start(), start()
  our_state, optax_state = ours().init(got), optaxs().init(want)
  for number in range(10):
    step, our_state = ours().update(
      gradients(number, size), our_state, got, finite=jnp.asarray(True)
    )
    got = optax.apply_updates(got, step)
    step, optax_state = optaxs().update(
      gradients(number, size), optax_state, want
    )
    want = optax.apply_updates(want, step)
  moved = np.abs(want["matrix"] - start()["matrix"]).max()
  assert moved > 0.05
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-7)


def test_nothing_changes_where_it_is_not_finite():
  params = start()
  state = ours().init(params)
  _, state = ours().update(
    gradients(0), state, params, finite=jnp.asarray(True)
  )
  broken = jax.tree.map(lambda g: g * jnp.nan, gradients(1))
  step, after = ours().update(broken, state, params, finite=jnp.asarray(False))
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(step))
  for ours_, before in zip(jax.tree.leaves(after), jax.tree.leaves(state)):
    np.testing.assert_array_equal(ours_, before)


def test_no_copy_of_a_matrix_is_written():
  """Three outputs of a large matrix: three loops, and no temporaries."""
  params = {"matrix": jnp.ones((512, 300)), "scale": jnp.ones(7)}

  def step(params, state, gradients):
    norm = optax.global_norm(gradients)
    step, state = ours().update(
      gradients, state, params, finite=jnp.isfinite(norm)
    )
    return optax.apply_updates(params, step), state

  compiled = (
    jax.jit(step, donate_argnums=(0, 1))
    .lower(params, ours().init(params), params)
    .compile()
  )
  entry = compiled.as_text().split("ENTRY")[1]
  written = re.findall(r"= f32\[512,300\]\S* (\w+)\(", entry)
  assert sorted(set(written)) == ["fusion", "parameter"]
  assert written.count("fusion") == 3
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 512 * 300
