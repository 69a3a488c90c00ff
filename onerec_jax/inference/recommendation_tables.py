"""Requests from a table, recommendations into one, and on the terminal."""

import pathlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import rich.box
import rich.table
import rich.text

from onerec_jax import files
from onerec_jax.data import columns
from onerec_jax.inference.recommender import Recommender, Request

_WRITERS = {".parquet": pq.write_table, ".csv": pa_csv.write_csv}


def check_output(path: files.PathLike) -> None:
  """Refuses a name that says nothing of how to write.

  Raises:
    ValueError: it ends neither on .parquet nor on .csv.
  """
  if pathlib.Path(path).suffix not in _WRITERS:
    raise ValueError(f"{path}: want a name that ends on .parquet or .csv")


def read_requests(path: files.PathLike) -> tuple[list[str], list[Request]]:
  """Users and their requests from a Parquet or CSV file.

  Args:
    path: column `user_id`; in Parquet optionally `history`, lists of raw item
      ids, null where the stored events are meant.

  Returns:
    (user ids, requests), each request labelled by its row.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a column is missing or a user id is null; the row is named,
      from 1.
  """
  table = _read(pathlib.Path(path))
  if "user_id" not in table.schema.names:
    raise ValueError(
      f"{path} has columns {table.schema.names}, but no `user_id`"
    )
  ids = table["user_id"].combine_chunks()
  # As events were read: a column of whole floats, too.
  users = columns.convert(ids, columns.Column("id"), "user_id")[0].to_pylist()
  histories = [None] * len(users)
  if "history" in table.schema.names:
    histories = table["history"].to_pylist()
  rows = [f"{path}, row {row}" for row in range(1, len(users) + 1)]
  for row, user, history in zip(rows, users, histories):
    if user is None or (history is not None and not isinstance(history, list)):
      raise ValueError(
        f"{row}: user_id {user!r}, history {history!r}; want an id and a list "
        "of item ids or null"
      )
  return users, [
    Request(history=history, user=user, label=row)
    for row, user, history in zip(rows, users, histories)
  ]


def _read(path: pathlib.Path) -> pa.Table:
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file of users")
  if path.suffix == ".parquet" or path.is_dir():
    return pq.read_table(path)
  if path.suffix != ".csv":
    raise ValueError(f"{path}: users are read from .parquet or .csv")
  # As events are read: an id may be `NA`.
  text = pa_csv.ConvertOptions(
    column_types={"user_id": pa.string()},
    strings_can_be_null=True,
    null_values=[""],
  )
  try:
    table = pa_csv.read_csv(path, convert_options=text)
  except pa.ArrowInvalid as error:
    raise ValueError(f"{path} is no CSV file: {error}") from error
  if "history" in table.schema.names:
    raise ValueError(
      f"{path}: a CSV file has no lists; give `history` in a Parquet file"
    )
  return table


def write(
  path: files.PathLike,
  recommender: Recommender,
  users: Sequence[str],
  items: Sequence[Sequence[str]],
  scores: Sequence[Sequence[float]],
) -> None:
  """Writes user_id, rank (from 1), item_id, score, title.

  Args:
    path: .parquet or .csv; replaced in one go.
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
  _WRITERS[pathlib.Path(path).suffix](table, sink)
  files.write_bytes(path, sink.getvalue().to_pybytes())


def as_table(
  recommender: Recommender,
  request: Request,
  items: Sequence[str],
  scores: Sequence[float],
  shown: int = 5,
) -> rich.table.Table:
  """One request's answer for the terminal, its latest events above.

  Below it stands which run answered, and what its scores are.

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
    title=rich.text.Text(f"For {who}, after: {after}"),
    box=rich.box.SIMPLE_HEAD,
    # Plain: a run may be called `[bold]`.
    caption=rich.text.Text(f"score: {_meaning(recommender)}"),
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
      # Plain: `:100:` in an id is neither markup nor an emoji.
      rich.text.Text(item),
      rich.text.Text(title),
      f"{score:.3f}",
    )
  return table


def _meaning(recommender: Recommender) -> str:
  """What the scores are, and of which run."""
  model, run = recommender.system.model, recommender.system.config.name
  if recommender.ranker is not None:
    by = recommender.ranker.system.config.name
    return f"value by {by} of what {run} found"
  if hasattr(model, "item_scores"):
    return f"{run}'s own, no probability"
  # A session model gives items the score of the session that brought them.
  of = "its session" if hasattr(model, "session_items") else "the item"
  return f"log-probability of {of} by {run}"
