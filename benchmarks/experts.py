r"""The product of experts against XLA's own, and against what it must cost.

  python -m benchmarks.experts --output=experts.json

For layers of several sizes: seconds of rows times the matrix of their group,
and of that with both gradients, by models/grouped.py and by
`jax.lax.ragged_dot`, medians of alternating runs. `× its products` is the time
over that of the same multiplications in one matmul, measured beside. Groups are
as uneven as a Dirichlet(3) draw.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table
from absl import app, flags

from onerec_jax import files
from onerec_jax.models import grouped
from onerec_jax.training import throughput

_OUTPUT = flags.DEFINE_string("output", "", "JSON to write.")
_REPEATS = flags.DEFINE_integer("repeats", 9, "Timed runs of each.")

LAYERS = (
  ("sessions, a step", 960, 24, 64, 128),
  ("sessions, a search", 8192, 24, 64, 128),
  ("8 experts", 2048, 8, 128, 512),
  ("53 experts", 4096, 53, 256, 512),
)
"""(which, rows, groups, columns of the rows, columns of the product)."""


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Of a layer; seconds.

  Attributes:
    layer: which.
    shape: [rows, groups, columns in, columns out].
    forward: the product, as the models have it.
    xla_forward: the same by `jax.lax.ragged_dot`.
    step: the product and both gradients.
    xla_step: the same by `jax.lax.ragged_dot`.
    products: what the step's multiplications take at the matmul's rate.
  """

  layer: str
  shape: tuple[int, ...]
  forward: float
  xla_forward: float
  step: float
  xla_step: float
  products: float


def measure(layer: str, M: int, E: int, D: int, F: int) -> Measurement:
  """Times one layer."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  shares = rng.dirichlet(np.full(E, 3.0))
  sizes = jnp.asarray(rng.multinomial(M, shares), jnp.int32)
  inputs, out = (normal(M, D), normal(E, D, F)), normal(M, F)

  def stepped(dot: Callable[..., jax.Array]) -> Callable[..., Any]:
    def step(rows, matrices):
      found, gradients = jax.vjp(lambda *x: dot(*x, sizes), rows, matrices)
      return found, gradients(out)

    return step

  programs = [
    jax.jit(make(dot))
    for make in (lambda dot: lambda *x: dot(*x, sizes), stepped)
    for dot in (grouped.dot, jax.lax.ragged_dot)
  ]
  times = [[] for _ in programs]
  for _ in range(_REPEATS.value + 1):
    for program, taken in zip(programs, times):
      start = time.perf_counter()
      jax.block_until_ready(program(*inputs))
      taken.append(time.perf_counter() - start)
  # The first of each compiles.
  medians = [float(np.median(taken[1:])) for taken in times]
  products = 3 * 2 * M * D * F / throughput.measure_matmul()
  return Measurement(layer, (M, E, D, F), *medians, products)


def table(found: list[Measurement]) -> rich.table.Table:
  """A row for each layer."""
  rows = rich.table.Table(
    "layer", "product, ms", "XLA's", "with gradients, ms", "XLA's",
    "× its products", box=None,
  )  # fmt: skip
  for m in found:
    times = m.forward, m.xla_forward, m.step, m.xla_step
    rows.add_row(
      m.layer,
      *(f"{1e3 * seconds:.1f}" for seconds in times),
      f"{m.step / m.products:.1f}",
    )
  return rows


def main(argv: list[str]) -> None:
  """Entry point."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  found = [measure(*layer) for layer in LAYERS]
  rich.print(table(found))
  if _OUTPUT.value:
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    rows = [dataclasses.asdict(m) for m in found]
    files.write_json(_OUTPUT.value, {"device": device, "layers": rows})


if __name__ == "__main__":
  app.run(main)
