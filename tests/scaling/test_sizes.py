"""The sizes of V2's Table 5, against the paper's other columns."""

import importlib

import pytest

from onerec_jax import model_configs
from onerec_jax.scaling import sizes
from onerec_jax.training import optimizer

PAPER = {
  # Name: millions of parameters in blocks, head width, learning rate.
  "0.05B": (51.9, 64, 7.07e-4),
  "0.1B": (88.5, 64, 5.00e-4),
  "0.2B": (173, 64, 3.54e-4),
  "0.5B": (500, 128, 2.24e-4),
  "1B": (1040, 128, 1.58e-4),
  "2B": (2102, 128, 1.12e-4),
  "4B": (4056, 128, 7.91e-5),
  "8B": (7861, 128, 5.59e-5),
}


def test_the_ladder_is_whole():
  assert list(sizes.SIZES) == list(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_a_size_has_the_papers_columns(name):
  millions, head_width, learning_rate = PAPER[name]
  model = sizes.lazy_decoder(name)
  parameters = 18 * model.d_model**2 * model.num_layers
  # Three digits are printed.
  assert parameters / 1e6 == pytest.approx(millions, rel=3e-3)
  assert model.d_model == head_width * model.num_heads
  assert model.num_kv_heads == model.num_heads
  assert model.d_ff == 4 * model.d_model
  assert model.sid_embed_dim == round(model.d_model / 20)
  # The rule takes the paper's own name of the size for N.
  nominal = int(1e9 * float(name.removesuffix("B")))
  rule = optimizer.paper_learning_rate(nominal)
  assert rule == pytest.approx(learning_rate, rel=2e-3)


def test_the_papers_loss_over_all_codes():
  model = sizes.lazy_decoder("1B")
  assert isinstance(model, model_configs.LazyDecoderConfig)
  assert not model.constrained_softmax
  assert not model.item_embedding
  assert model.dropout == 0.0
  assert (model.kv_layers, model.kv_split) == (1, 1)


def test_a_size_may_have_a_table_of_item_ids():
  """100M rows of 64: as many numbers of optimizer state as rows, by config."""
  experiment = importlib.import_module("experiments.scaling.lazy_decoder")
  plain, c = (experiment.get_config(arg) for arg in ("1B", "1B:id100M"))
  model = c.model
  assert (model.item_table_rows, model.item_embed_dim) == (100_000_000, 64)
  assert model.item_embedding
  assert c.optimizer.table_optimizer == "rowwise_adagrad"
  assert c.name == "lazy_decoder_1B_id100M"
  assert model.d_model == plain.model.d_model
  assert not plain.model.item_embedding
  with pytest.raises(ValueError, match="'100M': want a table of rows"):
    experiment.get_config("1B:100M")


def test_v1s_sizes_may_read_the_user_pathways():
  experiment = importlib.import_module("experiments.scaling.encoder_decoder")
  plain, c = (experiment.get_config(a) for a in ("0.935B", "0.935B:pathways"))
  lengths = c.pipeline.pathways
  assert (lengths.short, lengths.positive, lengths.lifelong) == (20, 256, 2000)
  assert (c.model.lifelong_queries, c.model.lifelong_layers) == (128, 2)
  assert c.pipeline.targets == "request"
  assert c.name == "encoder_decoder_0.935B_pathways"
  assert c.model == plain.model
  assert not plain.pipeline.pathways.on
  with pytest.raises(ValueError, match="'paths': want pathways"):
    experiment.get_config("0.935B:paths")


def test_an_unknown_size_is_refused():
  for of_size in (
    sizes.lazy_decoder,
    sizes.encoder_decoder,
    sizes.decoder_only,
  ):
    with pytest.raises(ValueError, match=r"no size '3B' .*: 0.05B, .* 8B"):
      of_size("3B")


@pytest.mark.parametrize("name", PAPER)
def test_architectures_of_a_size_differ_in_their_blocks_alone(name):
  lazy = vars(sizes.lazy_decoder(name))
  encoded = sizes.encoder_decoder(name)
  naive = sizes.decoder_only(name)
  for other in (vars(encoded), vars(naive)):
    own = {"system", "num_layers", "scan_layers"}
    for field in set(lazy) & set(other) - own:
      assert lazy[field] == other[field], field
  assert naive.num_layers == lazy["num_layers"]
  assert encoded.encoder_layers + encoded.decoder_layers == lazy["num_layers"]


def test_the_encoders_share_is_chosen():
  model = sizes.encoder_decoder("1B", encoder_layers=6)
  assert (model.encoder_layers, model.decoder_layers) == (6, 12)


@pytest.mark.parametrize(
  ("experiment", "name"),
  [
    ("lazy_decoder", "0.05B"),
    ("lazy_decoder", "8B"),
    ("lazy_decoder", "MoE-4B"),
    ("encoder_decoder", "0.015B"),
    ("encoder_decoder", "0.935B"),
    ("encoder_decoder", "2.633B"),
    ("encoder_decoder", "1B"),
    ("decoder_only", "1B"),
  ],
)
def test_an_experiment_sets_a_size_up(experiment, name):
  module = importlib.import_module(f"experiments.scaling.{experiment}")
  config = module.get_config(name)
  assert config.name == f"{experiment}_{name}"
  assert config.model.d_model == sizes_of(experiment)(name).d_model


def sizes_of(experiment):
  return getattr(sizes, experiment)
