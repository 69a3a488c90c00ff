"""The papers' tables: the printed numbers beside the arithmetic behind them.

OneRec-V2 (arXiv 2508.20900) Tables 1-5 and the sizes in Table 1 of the OneRec
technical report (V1, arXiv 2506.13695), by the conventions of conventions.py.
A row whose two numbers are more than TOLERANCE apart carries a note with the
reason, and only such a row does.
"""

import dataclasses

import numpy as np

from onerec_jax.scaling import conventions
from onerec_jax.scaling import points as points_lib
from onerec_jax.scaling import sizes as sizes_lib

TOLERANCE = 0.03
"""Relative; a row that is further off has a note."""
TABLE_5 = {
  # Learning rate and loss at convergence; the shapes are in sizes.py.
  "0.1B": (5.00e-4, 3.57),
  "0.2B": (3.54e-4, 3.46),
  "0.5B": (2.24e-4, 3.33),
  "1B": (1.58e-4, 3.27),
  "2B": (1.12e-4, 3.23),
  "4B": (7.91e-5, 3.20),
  "8B": (5.59e-5, 3.19),
}
LAW = {"E": 3.13, "A": 3660.0, "alpha": 0.489}
"""The constants V2 prints for L(N) of its Table 5."""

_GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Row:
  """One number of a paper's table.

  Attributes:
    label: the table's row.
    quantity: its column, with the unit.
    paper: as printed; None: the paper prints none.
    ours: by the paper's convention.
    counted: by our own model's counter, where there is one.
    note: why `paper` and `ours` differ by more than TOLERANCE.
  """

  label: str
  quantity: str
  paper: float | int | None
  ours: float | int
  counted: float | None = None
  note: str = ""

  @property
  def error(self) -> float | None:
    """Ours relative to the paper's, minus 1."""
    return None if self.paper is None else self.ours / self.paper - 1


@dataclasses.dataclass(frozen=True)
class Table:
  """A paper's table.

  Attributes:
    title: which.
    convention: what `ours` counts.
    rows: in the paper's order.
  """

  title: str
  convention: str
  rows: list[Row]


def all_tables() -> list[Table]:
  """Every table, in the papers' order."""
  return [
    report_sizes(),
    compute(),
    architectures(),
    key_value_sharing(),
    grouped_queries(),
    sizes(),
  ]


def points() -> dict[str, points_lib.Points]:
  """V2's Table 5, the dense sizes, as points of a scaling law.

  Returns:
    By which count of parameters is N: the one a size is named after (so the
    paper's constants come out), or 18·d² a block.
  """
  counts = {
    "nominal N": conventions.nominal,
    "N = 18·d²·layers": conventions.dense_parameters,
  }
  return {
    label: points_lib.Points(
      parameters=np.array([float(count(name)) for name in TABLE_5]),
      loss=np.array([loss for _, loss in TABLE_5.values()]),
      # Of one sample: all sizes saw the same data.
      flops=np.array([conventions.lazy_flops(name) for name in TABLE_5]),
      rounding=0.005,
    )
    for label, count in counts.items()
  }


def report_sizes() -> Table:
  """V1 Table 1."""
  notes = {
    "0.015B": "blocks hold .66M; the rest is in tables of ids the "
    "report gives no sizes of",
    "0.121B": "blocks and one table of codes are 109M, with two 134M: "
    "which tables count is not said",
  }
  rows = []
  for name, size in sizes_lib.REPORT_SIZES.items():
    blocks = conventions.report_block_parameters(size)
    config = sizes_lib.encoder_decoder(name)
    counted = conventions.counted_parameters(config, all_experts=True)
    built = conventions.built_parameters(config, sizes_lib.REPORT_PATHWAYS)
    rows.append(Row(name, "blocks, B", None, blocks / _GIGA, counted / _GIGA))
    rows.append(
      Row(
        name,
        "all parameters, B",
        size.nominal / _GIGA,
        conventions.report_parameters(size) / _GIGA,
        built / _GIGA,
        note=notes.get(name, ""),
      )
    )
  return Table(
    "V1 Table 1: sizes",
    "Matrices of the blocks as listed; with them two tables of 3 × 8192 codes "
    "and the pathways' MLPs. Tables of ids are left out. Counted in all: the "
    "built model, whose context has tables of codes of its own, whose Q-Former "
    "is SwiGLU, and whose user token has an MLP too: 29M more at a width of "
    "1024, so that 0.935B is 3.3% above the paper's number.",
    rows,
  )


def compute() -> Table:
  """V2 Table 1: where the FLOPs of one sample go."""
  rows, parameters = [], conventions.nominal("1B")
  half = sizes_lib.encoder_decoder("1B", 9)
  naive = sizes_lib.decoder_only("1B")
  systems = {
    "encoder-decoder 0.5:0.5": (
      conventions.round_encoder_decoder,
      half,
      {512: (346, 338, 8.1, 2.34), 3000: (1988, 1980, 8.1, 0.41)},
    ),
    "naive decoder-only": (
      conventions.round_decoder_only,
      naive,
      {512: (632, 614, 18, 2.85), 3000: (3618, 3600, 18, 0.49)},
    ),
  }
  for name, (convention, config, printed) in systems.items():
    for positions, (total, encoding, decoding, share) in printed.items():
      first, second = convention(parameters, positions)
      whole, label = first + second, f"{name}, {positions}"
      counted = conventions.counted_flops(config, positions)
      rows += [
        Row(label, "GFLOPs", total, whole / _GIGA, counted / _GIGA),
        Row(label, "encoding, GFLOPs", encoding, first / _GIGA),
        Row(label, "decoding, GFLOPs", decoding, second / _GIGA),
        Row(label, "decoding, %", share, 100 * second / whole),
        Row(label, "encoding, %", 100 - share, 100 * first / whole),
      ]
  for positions in (512, 3000):
    lazy = conventions.round_lazy(parameters)
    counted = conventions.counted_flops(
      conventions.lazy_config("1B"), positions
    )
    label = f"lazy, {positions}"
    rows.append(Row(label, "GFLOPs", 18, lazy / _GIGA, counted / _GIGA))
  return Table(
    "V2 Table 1: FLOPs of one sample at 1B",
    "6 × nominal parameters × tokens, a fifth of the context; a tenth of the "
    "decoder projects keys and values. No embeddings, head or scores.",
    rows,
  )


def architectures() -> Table:
  """V2 Table 2: architectures at equal size, and the headline."""
  printed = {
    # GFLOPs and billions of activations: 1:1, 1:2, naive, lazy.
    "0.1B": ((25.64, 4.21), (17.72, 2.92), (63.78, 7.52), (1.98, 0.31)),
    "0.5B": ((142.73, 10.79), (104.73, 7.94), (317.68, 19.28), (9.55, 0.77)),
    "1B": ((296.36, 17.63), (204.21, 12.20), (634.83, 31.53), (18.89, 1.24)),
  }
  rows = []
  for name, numbers in printed.items():
    for parts, (flops, activations) in zip((2, 3), numbers):
      layers = round(sizes_lib.SIZES[name].num_layers / parts)
      config = sizes_lib.encoder_decoder(name, layers)
      rows += _cost(
        f"encoder-decoder 1:{parts - 1}, {name}",
        (flops, conventions.encoder_decoder_flops(name, layers)),
        (activations, conventions.encoder_decoder_activations(name, layers)),
        conventions.counted_flops(config),
      )
    rows += _cost(
      f"naive, {name}",
      (numbers[2][0], conventions.decoder_only_flops(name)),
      (numbers[2][1], conventions.decoder_only_activations(name)),
      conventions.counted_flops(sizes_lib.decoder_only(name)),
    )
    rows += _cost(
      f"lazy, {name}",
      (numbers[3][0], conventions.lazy_flops(name)),
      (numbers[3][1], conventions.lazy_activations(name)),
      conventions.counted_flops(conventions.lazy_config(name)),
    )
  return Table(
    "V2 Table 2: architectures",
    "Encoder-decoder: 16·d² an encoder block on a fifth of the context, 18·d² "
    "a decoder block on the codes, head; no keys, values or scores. Naive and "
    "lazy: nominal parameters, head, the lazy context's linear layer. "
    "Activations of 512 targets: 20·d, 18·d, 23·d a block and token.",
    rows + _headline(),
  )


def _cost(label, flops, activations, counted):
  """The two rows of a model; each pair is (paper's, ours)."""
  return [
    Row(label, "GFLOPs", flops[0], flops[1] / _GIGA, counted / _GIGA),
    Row(label, "activations, B", activations[0], activations[1] / _GIGA),
  ]


def _headline():
  """94% less compute at equal size; 16× the size at equal compute."""
  lazy = conventions.lazy_config("1B")
  encoded = sizes_lib.encoder_decoder("1B", 9)
  saved = 1 - conventions.counted_flops(lazy) / conventions.counted_flops(
    encoded
  )
  ours = 1 - conventions.lazy_flops("1B") / conventions.encoder_decoder_flops(
    "1B", 9
  )
  large = conventions.lazy_config("8B")
  return [
    Row(
      "lazy for encoder-decoder 1:1, 1B",
      "FLOPs saved, %",
      94,
      100 * ours,
      100 * saved,
    ),
    Row(
      "lazy 8B at the cost of encoder-decoder 1:1, 0.5B",
      "GFLOPs",
      142.73,
      conventions.lazy_flops("8B") / _GIGA,
      conventions.counted_flops(large) / _GIGA,
    ),
  ]


def key_value_sharing() -> Table:
  """V2 Table 3: how many key/value layers the context gives, at 1B."""
  rows, first = [], conventions.lazy_flops("1B")
  for layers, split, flops, activations in (
    (1, 1, 18.89, 1.24),
    (1, 2, 19.19, 1.33),
    (3, 1, 19.49, 1.42),
    (9, 1, 21.27, 1.99),
    (18, 1, 23.95, 2.83),
  ):
    label = f"L_kv {layers}, S_kv {split}"
    chunks = layers * split
    ours = conventions.lazy_flops("1B", chunks)
    rows += _cost(
      label,
      (flops, ours),
      (activations, conventions.lazy_activations("1B", chunks)),
      conventions.counted_flops(
        conventions.lazy_config("1B", kv_layers=layers, kv_split=split)
      ),
    )
    if chunks > 1:
      more = (ours - first) / _GIGA
      rows.append(Row(label, "GFLOPs above row 1", flops - 18.89, more))
  return Table(
    "V2 Table 3: key/value sharing at 1B",
    "As the lazy rows of Table 2; a linear layer of fan-in 3 · embed_dim for "
    "each chunk of keys or values.",
    rows,
  )


def grouped_queries() -> Table:
  """V2 Table 4: key/value heads, at 1B."""
  rows, first = [], conventions.lazy_flops("1B")
  for heads, flops, activations, elements in (
    (14, 18.89, 1.24, 94),
    (7, 18.74, 1.19, 47),
    (2, 18.64, 1.16, 13),
    (1, 18.62, 1.15, 7),
  ):
    label = f"G_kv {heads}"
    ours = conventions.lazy_flops("1B", kv_heads=heads)
    rows += _cost(
      label,
      (flops, ours),
      (activations, conventions.lazy_activations("1B", kv_heads=heads)),
      conventions.counted_flops(
        conventions.lazy_config("1B", num_kv_heads=heads)
      ),
    )
    if heads < 14:
      more = (ours - first) / _GIGA
      rows.append(Row(label, "GFLOPs above row 1", flops - 18.89, more))
    rows.append(
      Row(
        label,
        "keys, M",
        elements,
        conventions.key_value_elements("1B", heads) / 1e6,
        note="printed to the whole million, to which ours rounds"
        if heads < 3
        else "",
      )
    )
  return Table(
    "V2 Table 4: grouped-query attention at 1B",
    "As Table 3. Keys: 512 positions for each of 512 / 5 contexts, G_kv heads "
    "of 128.",
    rows,
  )


def sizes() -> Table:
  """V2 Table 5: sizes, learning rates, losses."""
  rows = []
  law = lambda n: LAW["E"] + LAW["A"] / n ** LAW["alpha"]
  for name, (rate, loss) in TABLE_5.items():
    shape, parameters = sizes_lib.SIZES[name], conventions.nominal(name)
    config = conventions.lazy_config(name)
    ours = conventions.dense_parameters(name) / _GIGA
    rounded = name in ("0.1B", "0.2B", "1B", "2B")
    rows += [
      Row(
        name,
        "parameters, B",
        parameters / _GIGA,
        ours,
        conventions.counted_parameters(config) / _GIGA,
        note="named to a tenth of a billion, from 1B on to a billion"
        if rounded
        else "",
      ),
      Row(name, "embed_dim", shape.sid_embed_dim, round(shape.d_model / 20)),
      Row(
        name,
        "learning rate × 10⁴",
        1e4 * rate,
        1e4 * conventions.learning_rate(parameters),
      ),
      Row(name, "loss", loss, law(parameters)),
    ]
  total, active = conventions.expert_parameters("0.5B")
  config = sizes_lib.lazy_decoder(sizes_lib.EXPERTS)
  for quantity, paper, ours, every in (
    ("parameters, B", 4, total, True),
    ("active, B", 0.5, active, False),
  ):
    counted = conventions.counted_parameters(config, all_experts=every)
    rows.append(
      Row("4B experts", quantity, paper, ours / _GIGA, counted / _GIGA)
    )
  return Table(
    "V2 Table 5: sizes",
    "Matrices of the blocks, 18·d² each; embed_dim = d / 20; learning rate "
    "5e-4 · √(0.1B / N) and loss 3.13 + 3660 / N^0.489 of the nominal N.",
    rows,
  )
