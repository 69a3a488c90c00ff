"""What the hardware can do, to set beside what a step does."""

import time
from typing import Any

import jax
import jax.numpy as jnp

# Dense peak of a device in FLOP/s, bfloat16 (vendors' data sheets).
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989.5e12,
  "NVIDIA H200": 989.5e12,
}


def device_peak() -> float | None:
  """FLOP/s of one accelerator; None on CPU or where it is not known."""
  kind = jax.devices()[0].device_kind
  matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
  # The longest name: "TPU v5 lite" also starts with "TPU v5".
  return PEAK_FLOPS[max(matches, key=len)] if matches else None


def hardware() -> tuple[float | None, float | None]:
  """The device's peak where it is known, else what a matmul reaches."""
  peak = device_peak()
  return peak, measure_matmul() if peak is None else None


def measure_matmul(
  dtype: Any = jnp.float32, size: int = 0, repeats: int = 5
) -> float:
  """FLOP/s of a matrix product on one device, best of `repeats`.

  Args:
    dtype: of the factors.
    size: rows and columns; 0: what fills a CPU core, or an accelerator.
    repeats: timed products.
  """
  size = size or (768 if jax.default_backend() == "cpu" else 8192)
  # Random: a chip runs faster on what has fewer bits to switch.
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  best = float("inf")
  for _ in range(repeats):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2.0 * size**3 / best
