"""Requests for the model to answer while it is aligned.

A request is what is known of a user before one of the training requests, drawn
in an order that is a pure function of (seed, step), as that of training rows
is; one grain iterator gives both, so a checkpoint holds the place in both.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from flax import struct

from onerec_jax import config as config_lib
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import shards, splits
from onerec_jax.data.batch import Batch

_ENDLESS = 2**31  # Epochs; see data/pipeline.py.


@struct.dataclass
class JointBatch(Batch):
  """A batch of logged targets, and what joins it in an alignment step.

  Attributes:
    requests: a Batch with T = 1, to be answered; None: none are.
    group: the answers (learner.py), once there are some.
    advantages: [B, T] of the logged targets, from their feedback; None: none.
  """

  requests: Any = None
  group: Any = None
  advantages: Any = None


def training_requests(
  prepared: shards.PreparedData, from_ms: int | None = None
) -> np.ndarray:
  """Int [N, 2]: user (from 0) and first event of each training request.

  Args:
    prepared: the data.
    from_ms: requests before that time are left out; None: none are.

  Raises:
    ValueError: there are none.
  """
  found = []
  for user in range(len(prepared)):
    record = prepared.user(user)
    request = record.request[record.split == splits.TRAIN]
    starts = np.flatnonzero(np.diff(request, prepend=request[:1] - 1))
    if from_ms is not None:
      starts = starts[record.timestamps[starts] >= from_ms]
    found.append(np.stack([np.full_like(starts, user), starts], axis=1))
  if not sum(map(len, found)):
    raise ValueError(
      f"no training requests in {prepared.directory}: every event is held out"
      + ("" if from_ms is None else f" or earlier than {from_ms} ms")
    )
  return np.concatenate(found)


def dataset(
  prepared: shards.PreparedData,
  config: config_lib.PipelineConfig,
  count: int,
  seed: int,
  held: Sequence[int] | np.ndarray | None = None,
  from_ms: int | None = None,
) -> grain.IterDataset:
  """Endless batches of requests, as `pipeline.training_dataset` of rows.

  Args:
    prepared: the data.
    config: the pipeline's part of the config.
    count: requests of a global batch.
    seed: of their order.
    held: which of a batch's requests to read; default: all.
    from_ms: as of `training_requests`.
  """
  asked = training_requests(prepared, from_ms)
  names = sorted(rows_lib.feature_sizes(prepared))
  held = np.arange(count) if held is None else np.asarray(held)

  def read(numbers: np.ndarray) -> Batch:
    histories = [
      rows_lib.before(prepared, prepared.user(int(user)), int(event))
      for user, event in asked[numbers[held]]
    ]
    return rows_lib.request_batch(histories, names, config, len(held))

  return (
    grain.MapDataset.range(len(asked))
    .seed(seed)
    .shuffle()
    .repeat(_ENDLESS)
    .batch(count)
    .map(read)
    .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
  )


def beside(
  logged: grain.IterDataset, requests: grain.IterDataset | None
) -> grain.IterDataset:
  """Batches of both: a JointBatch each."""
  if requests is None:
    return logged.map(lambda batch: JointBatch(**vars(batch)))
  both = grain.experimental.ZipIterDataset([logged, requests])
  return both.map(lambda pair: JointBatch(**vars(pair[0]), requests=pair[1]))
