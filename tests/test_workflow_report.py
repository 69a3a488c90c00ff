"""What a report shows of queries that a pipeline chooses."""

import numpy as np

from onerec_jax import workflow_report
from onerec_jax.data import prepare, shards, splits
from onerec_jax.evaluation.result import Evaluation
from tests import worlds


def test_examples_of_users_whose_first_test_event_is_not_asked(tmp_path):
  """As of `pipeline.imitate=positive`: queries of a later one."""
  config = worlds.config(worlds.write_csv(tmp_path))
  config.prepare.split = "time"
  config.prepare.validation_from_ms = 1_600_000_000_000 + 5 * 3_600_000
  config.prepare.test_from_ms = 1_600_000_000_000 + 7 * 3_600_000
  prepare.prepare(config.prepare, tmp_path)
  prepared = shards.PreparedData.open(tmp_path)
  users = (3, 8)
  records = [prepared.user(user - 1) for user in users]
  asked = [
    next(
      i
      for i in np.flatnonzero(record.split == splits.TEST)[1:]
      if (record.items[i] != record.items[:i]).all()
    )
    for record in records
  ]
  target = np.asarray([r.items[i] for r, i in zip(records, asked)])
  lists = np.ones((2, 5), np.int32)
  found = Evaluation(
    "some", "test", {}, {}, np.asarray(users), target, lists, lists, {}
  )
  for example, record, event in zip(
    workflow_report.examples(tmp_path, [found], 2), records, asked
  ):
    shown = [item.id for item in example.history]
    assert shown == record.items[:event].tolist()
