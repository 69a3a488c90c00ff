"""Requests from a table, recommendations into one, and on the terminal."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import rich.box
import rich.markup
import rich.table

from onerec_jax import files
from onerec_jax.inference.recommender import Recommender, Request


def read_requests(path: files.PathLike) -> tuple[list[str], list[Request]]:
  """Users and their requests from a Parquet file.

  Args:
    path: column `user_id`; optionally `history`, lists of raw item ids, null
      where the stored events are meant.

  Raises:
    ValueError: a column is missing or a user id is null; the row is named.
  """
  table = pq.read_table(path)
  if "user_id" not in table.schema.names:
    raise ValueError(
      f"{path} has columns {table.schema.names}, but no `user_id`"
    )
  users = table["user_id"].to_pylist()
  histories = [None] * len(users)
  if "history" in table.schema.names:
    histories = table["history"].to_pylist()
  for row, (user, history) in enumerate(zip(users, histories)):
    if user is None or (history is not None and not isinstance(history, list)):
      raise ValueError(
        f"{path}, row {row}: user_id {user!r}, history {history!r}; want an id "
        "and a list of item ids or null"
      )
  return [str(user) for user in users], [
    Request(history=history, user=user)
    for user, history in zip(users, histories)
  ]


def write(
  path: files.PathLike,
  recommender: Recommender,
  users: Sequence[str],
  items: Sequence[Sequence[str]],
  scores: Sequence[Sequence[float]],
) -> None:
  """Writes Parquet: user_id, rank (from 1), item_id, score, title.

  Args:
    path: replaced in one go.
    recommender: knows the titles.
    users: raw ids.
    items: of each user, best first.
    scores: of the items.
  """
  flat = [item for row in items for item in row]
  table = pa.table(
    {
      "user_id": pa.array(
        [user for user, row in zip(users, items) for _ in row], pa.string()
      ),
      "rank": pa.array(
        [rank for row in items for rank in range(1, len(row) + 1)], pa.int32()
      ),
      "item_id": pa.array(flat, pa.string()),
      "score": pa.array([s for row in scores for s in row], pa.float32()),
      "title": pa.array(recommender.titles(flat), pa.string()),
    }
  )
  sink = pa.BufferOutputStream()
  pq.write_table(table, sink)
  files.write_bytes(path, sink.getvalue().to_pybytes())


def as_table(
  recommender: Recommender,
  request: Request,
  items: Sequence[str],
  scores: Sequence[float],
  shown: int = 5,
) -> rich.table.Table:
  """One request's answer for the terminal, its latest events above.

  Args:
    recommender: knows titles and stored histories.
    request: what was asked.
    items: raw ids, best first.
    scores: of the items.
    shown: how many of the latest events to name.
  """
  history = request.history
  if history is None:
    stored = recommender.has_user(request.user)
    history = recommender.history(request.user) if stored else ()
  known = [item for item in history if recommender.knows(item)]
  latest = recommender.titles(known[-shown:])
  who = "a newcomer" if request.user is None else f"user {request.user}"
  after = "; ".join(latest) if latest else "nothing yet"
  table = rich.table.Table(
    title=rich.markup.escape(f"For {who}, after: {after}"),
    box=rich.box.SIMPLE_HEAD,
  )
  table.add_column("rank", justify="right")
  table.add_column("item")
  table.add_column("title")
  table.add_column("score", justify="right")
  for rank, (item, title, score) in enumerate(
    zip(items, recommender.titles(items), scores), start=1
  ):
    table.add_row(
      str(rank),
      rich.markup.escape(item),
      rich.markup.escape(title),
      f"{score:.3f}",
    )
  return table
