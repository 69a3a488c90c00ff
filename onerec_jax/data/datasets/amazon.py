"""Amazon reviews in the text format of S3-Rec: Beauty and its sisters.

`sequences.txt`: a user and its items, oldest first, no times. `items.jsonl`:
`item_id`, `short_text` and `attributes`, the brand first, then categories from
wide to narrow. Item vectors, where they are given, lie beside them as
`text_embeddings*.npy` (row i = item i + 1) and are named in the manifest's
notes for `tokenizer.embedding`.
"""

import json
import pathlib

import numpy as np
import pyarrow as pa

from onerec_jax.config import PrepareConfig
from onerec_jax.data import schema
from onerec_jax.data.datasets import download

_FILES = ("sequences.txt", "items.jsonl")


def load(config: PrepareConfig) -> schema.Tables:
  """Sequences and items of the folder `config.dataset`."""
  source = download.Source(
    name=config.dataset,
    files=_FILES,
    licence=(
      "Amazon product data 2014: research use, cite McAuley et al. 2015 "
      "(https://doi.org/10.1145/2766462.2767755)"
    ),
  )
  folder = download.find(source, config.data_dir)
  notes = ["no times in the source: order only"]
  for path in sorted(folder.glob("text_embeddings*.npy")):
    notes.append(f"item vectors for tokenizer.embedding: {path.name}")
  return schema.Tables(
    events=_sequences(folder / _FILES[0]),
    items=_items(folder / _FILES[1]),
    source={
      "events": str(folder / _FILES[0]),
      "items": str(folder / _FILES[1]),
      "files": download.sha256s(folder, _FILES),
      "ordinal_time": True,
      "notes": notes,
    },
  )


def _sequences(path: pathlib.Path) -> pa.Table:
  users, lengths, items = [], [], []
  with open(path, encoding="utf-8") as file:
    for line in file:
      user, *sequence = line.split()
      users.append(user)
      lengths.append(len(sequence))
      items += sequence
  return pa.table(
    {"user_id": np.repeat(np.array(users, object), lengths), "item_id": items},
    schema=pa.schema([("user_id", pa.string()), ("item_id", pa.string())]),
  )


def _items(path: pathlib.Path) -> pa.Table:
  rows = []
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
      try:
        rows.append(_item(json.loads(line)))
      except (ValueError, KeyError) as error:
        raise schema.TableError(
          f"{path}, row {number}: not an item ({error!r}); every line must be "
          "a JSON object with item_id, short_text and attributes"
        ) from error
  names = ("item_id", "asin", "title", "text", "category", "author_id")
  return pa.Table.from_pylist(
    rows, pa.schema([(name, pa.string()) for name in names])
  )


def _item(given: dict) -> dict[str, str | None]:
  attributes = given["attributes"]
  brand = attributes[0] if attributes else "Unknown"
  return {
    "item_id": str(given["item_id"]),
    "asin": given.get("asin"),
    "title": given["short_text"],
    "text": ". ".join(filter(None, (given["short_text"], *attributes))),
    "category": attributes[-1] if len(attributes) > 1 else None,
    "author_id": None if brand == "Unknown" else brand,
  }
