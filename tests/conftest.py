"""Eight CPU devices, shape checks, and where real data lies."""

import gc
import os
import pathlib
import signal
import tempfile

from benchmarks import xla_flags

# Before jax starts: the mesh of every test is eight CPU devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same step: the processes of one run share a cache.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="onerec-jax-cache-")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Most programs of tests take longer to compile than to run.
os.environ.setdefault("XLA_FLAGS", xla_flags.QUICK_TO_COMPILE)

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("onerec_jax", "beartype.beartype")
# Tracing makes many objects and few cycles: of the usual collections those of
# all objects alone took a twentieth of the time.
gc.set_threshold(50_000, 20, 100)

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
if SHARED_DATA.is_dir():
  os.environ.setdefault("ONEREC_DATA", str(SHARED_DATA))


@pytest.fixture(scope="session")
def real_data():
  """A function from a set's folder name to its path; skips if absent."""

  def find(name: str) -> pathlib.Path:
    path = pathlib.Path(os.environ.get("ONEREC_DATA", "/nonexistent")) / name
    if not path.is_dir():
      pytest.skip(f"data set {name} not found under $ONEREC_DATA")
    return path

  return find


@pytest.fixture(scope="module")
def one_device():
  """The module's programs run on one device: quicker to compile and to run.

  For modules that ask what a model learns or a program says; that eight devices
  do the same is the question of others.
  """
  from onerec_jax import partitioning

  whole = partitioning.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      partitioning,
      "make_mesh",
      lambda config, devices=None: whole(config, devices or jax.devices()[:1]),
    )
    yield


@pytest.fixture
def ctrl_c():
  """SIGINT is Ctrl-C, which the processes of pytest-xdist ignore."""
  previous = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, previous)
