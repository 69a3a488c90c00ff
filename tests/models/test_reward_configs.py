"""From a reward model's config to the model."""

import dataclasses

import pytest

from onerec_jax import model_configs
from onerec_jax.models import p_score, registry, session_reward

CONFIGS = {
  model_configs.SessionRewardConfig: session_reward.SessionReward,
  model_configs.PScoreConfig: p_score.PScore,
}


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_of_the_config_reaches_the_model(cls):
  config = cls()
  for field in dataclasses.fields(config):
    if isinstance(getattr(config, field.name), float):
      setattr(config, field.name, getattr(config, field.name) + 0.0625)
  model = registry.create(config, 10, (4, 5), {"b": 2, "a": 3}, {"c": 4})
  assert type(model) is CONFIGS[cls]
  assert model.features == (("a", 3), ("b", 2))
  assert model.item_features == (("c", 4),)
  for field in dataclasses.fields(config):
    if field.name not in ("system", "compute_dtype"):
      assert getattr(model, field.name) == getattr(config, field.name)
  assert registry.needs_semantic_ids(config)
  assert registry.balance_rate(config) == 0.0
  hash(model)


@pytest.mark.parametrize(
  ("cls", "changes", "message"),
  [
    ("SessionReward", {"objectives": ("click",)}, "objectives='click'"),
    ("SessionReward", {"objectives": ()}, "one or more different"),
    ("SessionReward", {"session_size": 0}, "session_size=0"),
    ("SessionReward", {"session_seconds": 0.0}, "session_seconds=0"),
    ("PScore", {"objectives": ("click", "click")}, "different names"),
    ("PScore", {"objectives": ("p", "click")}, "'p' is the P-Score's"),
    ("PScore", {"weights": (1.0,)}, r"weights=\(1.0,\)"),
    ("PScore", {"item_table_rows": 100}, "item_table_rows=100"),
    ("PScore", {"d_model": 30, "num_heads": 4}, "d_model=30"),
  ],
)
def test_what_does_not_fit_is_named(cls, changes, message):
  config = getattr(model_configs, f"{cls}Config")(**changes)
  with pytest.raises(ValueError, match=message):
    registry.create(config, 10, (4, 5), {}, {})
