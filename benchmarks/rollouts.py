r"""Rollouts of large groups, and the step that learns from them.

  python -m benchmarks.rollouts --requests=4 --group=512 --output=r.json
  python -m benchmarks.rollouts --requests=2 --group=32 --width=64 --depth=2 \
    --positions=64

V1 (arXiv 2506.13695 §2.5) answers each request of its RL stream 512 times. Here
architectures of equal block parameters (about 50M by default) are asked by beam
search and by draws, which share a request's context, and by a sampler that does
not: the context repeated R times, codes drawn one after the other (timed on 64
answers: 512 contexts at once do not fit). The last columns are forward and
backward over the group's answers (alignment/rollouts), beside the time its
matrix products would take at the rate of a matmul of the same type, one before
each pass. Times are medians; weights and codes are random.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import rich
import rich.table
from absl import app, flags
from flax import linen as nn

from benchmarks import architectures
from benchmarks.beam_search import seconds
from onerec_jax import files
from onerec_jax.alignment import rollouts
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.data.batch import Batch
from onerec_jax.inference import prefix_index, sampling
from onerec_jax.models import registry

# --positions, --models, --dtype, --output: those of benchmarks.architectures.
FLAGS = flags.FLAGS
_REQUESTS = flags.DEFINE_integer("requests", 4, "Answered at once.")
_GROUP = flags.DEFINE_integer("group", 512, "R, answers to a request.")
_WIDTH = flags.DEFINE_integer("width", 512, "d_model; d_ff is four times it.")
_DEPTH = flags.DEFINE_integer("depth", 11, "Blocks of the lazy decoder.")
_ALONE = 64
"""Answers that are asked for at once without a shared context."""


@dataclasses.dataclass
class Measurement:
  """One architecture's figures; seconds of a batch of requests.

  `repeated_s` is of `_ALONE` answers, scaled to all; `matmul_gflops_per_s` the
  rate beside `learn_s`.
  """

  block_parameters: int
  beam_s: float
  sample_s: float
  repeated_s: float
  learn_s: float
  learn_gflop: float
  matmul_gflops_per_s: float


def make_model(name: str) -> registry.Model:
  """An architecture with its share of the blocks."""
  if name not in architectures.CONFIGS:
    raise app.UsageError(
      f"--models has {name!r}: want some of {', '.join(architectures.CONFIGS)}"
    )
  depth = _DEPTH.value
  layers = {
    "lazy_decoder": {"num_layers": depth},
    "lazy_decoder_grouped": {"num_layers": depth},
    # Equal parameters: 16 · 6 + 20 · 5 against 18 · 11.
    "encoder_decoder": {
      "encoder_layers": depth - depth // 2,
      "decoder_layers": max(1, depth // 2),
    },
    "decoder_only": {"num_layers": depth},
  }
  width = {"d_model": _WIDTH.value, "d_ff": 4 * _WIDTH.value}
  return architectures.make_model(name, **width, **layers[name])


def _timed(function: Callable[..., Any], *arguments: Any) -> float:
  return seconds(jax.jit(function), *arguments)


def measure(model: registry.Model, requests: Batch, group: int) -> Measurement:
  """Times the ways to ask a model, and a step's work on the answers."""
  catalogue = jax.tree.map(jnp.asarray, architectures.make_catalogue())
  index = prefix_index.build(
    architectures.make_catalogue().codes, model.codebook_sizes
  )
  params = jax.jit(lambda *given: nn.unbox(model.init(*given)["params"]))(
    jax.random.key(0), requests, catalogue
  )
  tables, key = (catalogue, index), jax.random.key(1)

  def ask(search):
    config = AlignmentConfig(group=group, search=search)
    function = lambda params, requests, catalogue, index, key: rollouts.answer(
      model, params, requests, catalogue, index, key, config
    )
    return _timed(function, params, requests, *tables, key)

  # What is not shared is memory too: some of the answers, for the time of all.
  some = min(group, _ALONE)
  alone = jax.tree.map(lambda x: jnp.repeat(x[:1], some, axis=0), requests)
  times = len(requests.items) * group / some
  one_by_one = functools.partial(sampling.sample, model, count=1)
  config = AlignmentConfig(group=group)
  answers = jax.jit(functools.partial(rollouts.answer, model, config=config))(
    params, requests, *tables, key
  )

  def loss(params, requests, codes, catalogue, index):
    new = rollouts.log_probability(
      model, params, requests, codes, catalogue, index
    )
    return jnp.mean(new)

  learn = jax.jit(jax.grad(loss))
  learn_s, rate = architectures.beside_matmul(
    lambda: learn(params, requests, answers.codes, *tables), repeats=5
  )
  return Measurement(
    registry.block_parameters(model),
    ask("beam"),
    ask("sample"),
    times * _timed(one_by_one, params, alone, *tables, key),
    learn_s,
    3.0 * registry.group_flops(model, *requests.items.shape, group) / 1e9,
    rate / 1e9,
  )


def _table(found: dict[str, Measurement], answers: int) -> rich.table.Table:
  table = rich.table.Table(box=None)
  for heading in (
    "model", "blocks", "beams/s", "draws/s", "repeated/s", "shared is",
    "learn s", "products s", "learning is", "a matmul",
  ):  # fmt: skip
    table.add_column(heading, justify="right")
  for name, m in found.items():
    products = m.learn_gflop / m.matmul_gflops_per_s
    table.add_row(
      name,
      f"{m.block_parameters / 1e6:.1f}M",
      f"{answers / m.beam_s:,.0f}",
      f"{answers / m.sample_s:,.0f}",
      f"{answers / m.repeated_s:,.0f}",
      f"{m.repeated_s / m.sample_s:.1f}×",
      f"{m.learn_s:.3f}",
      f"{products:.3f}",
      f"{m.learn_s / products:.2f}×",
      f"{m.matmul_gflops_per_s:.0f} GFLOP/s",
    )
  return table


def main(argv: list[str]) -> None:
  """Entry point."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  requests = jax.tree.map(
    jnp.asarray,
    architectures.make_batch(_REQUESTS.value, FLAGS.positions, 1),
  )
  found: dict[str, Measurement] = {}
  for name in FLAGS.models:
    found[name] = measure(make_model(name), requests, _GROUP.value)
    jax.clear_caches()
    rich.print(_table(found, _REQUESTS.value * _GROUP.value))
  rich.print(
    f"{len(jax.devices())} × {jax.devices()[0].device_kind}, "
    f"jax {jax.__version__}"
  )
  if FLAGS.output:
    files.write_json(
      FLAGS.output,
      {
        "requests": _REQUESTS.value,
        "group": _GROUP.value,
        "positions": FLAGS.positions,
        "dtype": FLAGS.dtype,
        "device": jax.devices()[0].device_kind,
        "models": {k: dataclasses.asdict(m) for k, m in found.items()},
      },
    )


if __name__ == "__main__":
  app.run(main)
