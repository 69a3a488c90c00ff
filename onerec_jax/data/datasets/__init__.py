"""Sources by name; each is a module with `load(config) -> schema.Tables`."""

import importlib

from onerec_jax.config import PrepareConfig
from onerec_jax.data import schema

_MODULES = {
  "movielens_100k": "movielens",
  "movielens_small": "movielens",
  "movielens_opinions": "movielens",
  "amazon_beauty": "amazon",
  "kuairand": "kuairand",
  "foursquare_nyc": "foursquare",
  "simulator": "simulator",
  "tables": "tables",
}
NAMES = tuple(_MODULES)


def load(config: PrepareConfig) -> schema.Tables:
  """The tables of `config.dataset`.

  `amazon_<name>` is any data set in the text format of S3-Rec.

  Raises:
    ValueError: no data set of that name.
    FileNotFoundError: its files are nowhere to be found or fetched.
  """
  name = config.dataset
  module = _MODULES.get(name, "amazon" if name.startswith("amazon_") else "")
  if not module:
    raise ValueError(
      f"unknown data set {name!r}; known: {', '.join(NAMES)}. For your own "
      "files use --config.prepare.dataset=tables --config.prepare.events=FILE"
    )
  # Imported here so that one source's needs are not everyone's.
  loaded = importlib.import_module(f"{__name__}.{module}")
  return loaded.load(config)
