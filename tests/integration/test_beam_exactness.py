"""A trained lazy decoder: beam search against scoring every item.

The simulator gives the data, so this runs anywhere. The catalogue is far
larger than the beam at every level, so the search really prunes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.simulator import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax import partitioning, workflow
from onerec_jax.data import pipeline, splits
from onerec_jax.evaluation import protocol
from onerec_jax.inference import assemble, beam_search, retrieval

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(system, parameters) after a short training on a small world."""
  folder = tmp_path_factory.mktemp("simulator")
  config = lazy_decoder.get_config()
  config.prepare.simulation.num_users = 200
  config.prepare.simulation.num_items = 600
  config.prepare.simulation.num_days = 5
  config.tokenizer.num_codes = 16
  config.tokenizer.vector_size = 32
  config.model.d_model = 32
  config.model.num_kv_heads = 1
  config.model.kv_split = 2
  config.pipeline.row_positions = config.pipeline.row_targets = 64
  config.pipeline.max_history = 30
  # Learns in fewer steps, and dropout would be a third of their time.
  config.model.dropout = config.model.context_dropout = 0.0
  config.optimizer.learning_rate, config.optimizer.warmup_steps = 5e-3, 10
  config.training.num_steps = config.training.validate_every = 50
  config.evaluation.beam_width = 20
  workflow.train(config, folder)
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  return assemble.load(folder, config.name, mesh)


def _batches(system, users):
  return pipeline.evaluation_batches(
    system.prepared,
    splits.TEST,
    system.config.pipeline,
    batch_size=64,
    users=np.arange(users),
  )


@pytest.mark.slow
def test_beam_50_is_within_half_a_percent_of_exact(trained):
  system, params = trained
  tables = (system.catalogue, system.index)
  search = jax.jit(
    lambda batch, catalogue, index: beam_search.exact_search(
      system.model, params, batch, catalogue, index, 50
    )
  )
  beam = retrieval.make_retrieve(system.model, system.index, 50)
  info = protocol.CatalogueInfo.from_codes(
    system.prepared.item_counts, system.semantic_ids.codes
  )

  def measure(retrieve):
    return protocol.evaluate(
      retrieve, _batches(system, 192), info, system.config.evaluation,
      name="x", split="test", progress=False,
    ).metrics  # fmt: skip

  exact = measure(lambda batch: search(batch, *tables)[::2])
  found = measure(lambda batch: beam(params, batch, system.catalogue))
  # The model has learned something: chance is 10 / 600.
  assert exact["recall@10"] > 3 * 10 / 600
  for metric in ("recall@10", "ndcg@10", "recall@5", "ndcg@5"):
    assert abs(found[metric] - exact[metric]) <= 0.005 * exact[metric]
  assert found["valid_rate@10"] == 1.0


@pytest.mark.slow
def test_a_full_width_beam_is_exact_scoring_of_every_item(trained):
  system, params = trained
  batch, _ = next(_batches(system, 8))
  batch = jax.tree.map(lambda x: jnp.asarray(x[:8]), batch)
  every = system.prepared.num_items
  tables = jax.device_put((system.catalogue, system.index))

  @functools.partial(jax.jit, static_argnums=0)
  def run(search, batch, catalogue, index):
    return search(system.model, params, batch, catalogue, index, every)

  items, _, scores = run(beam_search.beam_search, batch, *tables)
  exact_items, _, exact = run(beam_search.exact_search, batch, *tables)
  np.testing.assert_allclose(scores, exact, atol=2e-5)
  for row in range(8):
    assert sorted(items[row].tolist()) == list(range(1, every + 1))
    # The same order wherever two neighbours do not tie to rounding.
    apart = np.abs(np.diff(np.asarray(exact[row]))) > 1e-4
    clear = np.concatenate([[True], apart]) & np.concatenate([apart, [True]])
    np.testing.assert_array_equal(items[row][clear], exact_items[row][clear])
