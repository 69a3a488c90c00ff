"""The studies: runs of one differ in what it is about, and in nothing else."""

import dataclasses

import pytest

from experiments.scaling import studies
from onerec_jax import config as config_lib

FIELDS = {
  "codebook": {"tokenizer.num_codes"},
  "key_values": {"model.kv_layers", "model.kv_split", "model.num_kv_heads"},
  "pass_at_k": set(),
  "item_input": {"model.sid_embedding", "model.item_embedding"},
  "item_input_movielens": {"model.sid_embedding", "model.item_embedding"},
  "features": {
    "model.feature_embed_dim",
    "model.sid_embedding",
    "pipeline.pathways.lifelong",
    "pipeline.pathways.positive",
    "pipeline.pathways.short",
  },
  "encoder": {
    "model.system",
    # What only one of the two architectures has.
    "model.num_layers", "model.num_kv_heads", "model.kv_layers",
    "model.kv_split", "model.scan_layers",
    "model.encoder_layers", "model.decoder_layers", "model.feed_forward",
    "model.causal_encoder", "model.moe_encoder",
  },
}  # fmt: skip


def flat(config):
  values = {}

  def walk(tree, path):
    for name, value in tree.items():
      if isinstance(value, dict):
        walk(value, f"{path}{name}.")
      else:
        values[path + name] = value

  walk(config_lib.to_dict(dataclasses.replace(config, name="")), "")
  return values


@pytest.mark.parametrize("study", FIELDS)
def test_runs_of_a_study_differ_in_its_subject(study):
  runs = [flat(run) for run in studies.get_sweep(study).values()]
  fields = set().union(*runs)
  differing = {k for k in fields if len({str(run.get(k)) for run in runs}) > 1}
  assert differing == FIELDS[study]


def test_seeds_are_runs_of_their_own():
  runs = studies.get_sweep("codebook:2")
  assert [run.training.seed for run in runs.values()] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("arg", ["codebok", "codebook:many"])
def test_an_unknown_study_is_refused(arg):
  with pytest.raises(ValueError, match=r"no study .*: want one of codebook, "):
    studies.get_sweep(arg)
