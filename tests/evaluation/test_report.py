"""The page and the tables: the numbers are there, titles cannot do harm."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
import rich.console
from matplotlib import image

from onerec_jax import semantic_ids
from onerec_jax.evaluation import report, result, tables

EVIL = '<script>alert("x")</script> & $a_b$ [bold]'


def make(name, rate, seed=0, queries=200):
  """An evaluation whose per-query hits are drawn at a rate."""
  rng = np.random.default_rng(seed)
  per_query = {}
  for column, lift in (("", 0.0), ("filtered/", 0.1)):
    for metric in ("recall", "ndcg"):
      for k in (5, 10):
        hit = rng.random(queries) < rate + lift + k / 100
        per_query[f"{column}{metric}@{k}"] = hit.astype(np.float32)
  metrics = {k: float(v.mean()) for k, v in per_query.items()}
  metrics |= {
    "queries": queries,
    "users": queries,
    "seen_target_rate": 0.125,
    "coverage@10": 0.2468,
    "cold/queries": 1,
    "rare/queries": 2,
  }
  items = np.tile(np.arange(1, 11, dtype=np.int32), (queries, 1))
  return result.Evaluation(
    name=name,
    split="test",
    metrics=metrics,
    facts={
      "beam_width": 50,
      "wall_s": 12.5,
      "device": "1 x test chip",
      "config_fingerprint": "c0ffee",
    },
    user=np.arange(1, queries + 1, dtype=np.int32),
    target=np.full(queries, 3, np.int32),
    items=items,
    filtered_items=np.roll(items, -1, axis=1),
    per_query=per_query,
  )


class Reader(html.parser.HTMLParser):
  """Collects the tags, their attributes and the text."""

  def __init__(self):
    super().__init__()
    self.tags, self.images, self.text, self.hits = [], [], [], []
    self._hit = False

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    attrs = dict(attrs)
    self.images += [attrs[k] for k in ("src", "srcset") if k in attrs]
    self._hit = tag == "li" and attrs.get("class") == "hit"

  def handle_data(self, data):
    self.text.append(data)
    if self._hit and data.strip():
      self.hits.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """(path, parsed page, evaluations) of a work directory with everything."""
  workdir = tmp_path_factory.mktemp("work")
  found = [make("popularity", 0.1), make("sasrec", 0.3), make(EVIL, 0.5, 1)]
  (workdir / "prepared").mkdir()
  (workdir / "prepared" / "manifest.json").write_text(
    json.dumps({"num_users": 22363, "num_items": 12101, "dataset": "beauty"})
  )
  log = workdir / "models" / "sasrec" / "metrics.jsonl"
  log.parent.mkdir(parents=True)
  log.write_text(
    '{"step": 1, "kind": "train", "loss": 7.0, "targets_per_s": 10}\n'
    '{"step": 2, "kind": "train"}\n'
    '{"step": 2, "kind": "validation", "ndcg@10": 0.1, "loss": NaN}\n'
    '{"step": 3, "kind": "train", "loss": 6.0}\n{"step": 4, "ki'
  )
  codes = np.random.default_rng(0).integers(0, 8, size=(41, 2))
  codes[0] = 0
  semantic = semantic_ids.SemanticIds(
    codes=codes.astype(np.int32),
    codebook_sizes=(8, 8),
    codebooks=[],
    fingerprint="5e3a",
    report=semantic_ids.quality_report(codes[1:], (8, 8)),
  )
  titles = ["", *(f"title {i}" for i in range(1, 11))]
  titles[4] = EVIL
  shown = tables.examples(found, {7: [4, 9]}, titles)
  path = report.write_report(
    workdir, found, shown, title="A & B", semantic=semantic
  )
  reader = Reader()
  reader.feed(path.read_text())
  return path, reader, found


def test_page_holds_the_numbers(page):
  _, reader, found = page
  text = " ".join(reader.text)
  for evaluation in found:
    for key in evaluation.per_query:
      assert f"{evaluation.metrics[key]:.4f}" in text
  for want in ("22,363", "12,101", "0.2468", "12.5%", "c0ffee", "test chip"):
    assert want in text
  row = result.compare(found[2], found[0], "filtered/ndcg@10")
  assert f"{row['difference']:+.4f}" in text
  assert f"{row['low']:+.4f} to {row['high']:+.4f}" in text
  assert "better" in text


def test_page_escapes_titles_and_names(page):
  path, reader, _ = page
  assert "script" not in reader.tags
  assert '<script>alert("x")' not in path.read_text()
  assert EVIL in [text.strip() for text in reader.text]


def test_page_marks_the_held_out_item(page):
  # Item 3 is the target; the filtered list of each of three models has it.
  assert page[1].hits == ["title 3"] * 3


def test_page_is_self_contained_with_readable_pictures(page):
  path, reader, _ = page
  assert not re.search(r"(https?:|//cdn|@import|url\()", path.read_text())
  # Intervals, train loss, validation NDCG, targets/s, two levels; two themes.
  assert len(reader.images) == 2 * 6
  for uri in reader.images:
    start = "data:image/png;base64,"
    assert uri.startswith(start)
    pixels = image.imread(io.BytesIO(base64.b64decode(uri[len(start) :])))
    # Something is drawn, on a transparent ground.
    assert pixels[..., 3].min() == 0
    assert pixels[..., 3].max() == 1


def test_page_does_without_what_is_not_there(tmp_path):
  path = report.write_report(tmp_path, [make("only", 0.2)])
  text = path.read_text()
  for absent in ("Training", "Semantic IDs", "Differences", "Recommendations"):
    assert f"<h2>{absent}" not in text
  with pytest.raises(ValueError, match="no evaluations"):
    report.write_report(tmp_path, [])


def printed(function, *args, width=80, **kwargs):
  console = rich.console.Console(file=io.StringIO(), width=width)
  function(*args, console=console, **kwargs)
  return console.file.getvalue()


def test_print_figures_names_the_run_and_each_figure():
  text = printed(tables.print_figures, "judge", {"auc": 0.71239, "loss": 1.0})
  assert "judge, test" in text
  assert re.search(r"auc +0\.7124", text)


def test_print_table_shows_both_columns_and_the_differences():
  name = "lazy [/b]"
  found = [make("popularity", 0.1), make("sasrec", 0.3), make(name, 0.5, 1)]
  text = printed(tables.print_table, found)
  for evaluation in found:
    for key in evaluation.per_query:
      # Whole in a terminal of 80 columns.
      assert f"{evaluation.metrics[key]:.4f}".lstrip("0") in text
    assert evaluation.name in text
  rows = tables.comparisons(found)
  pairs = {(row["a"], row["b"]) for row in rows}
  assert pairs == {
    ("sasrec", "popularity"),
    (name, "popularity"),
    (name, "sasrec"),
  }
  for row in rows:
    assert f"{row['a']} − {row['b']}" in text
    assert f"{row['metric']:<18} {row['difference']:+.4f}" in text
  with pytest.raises(ValueError, match="no evaluations"):
    tables.print_table([])


def test_joined_seeds_keep_their_numbers_in_eighty_columns():
  names = [f"lazy_decoder_wide_seed{seed}" for seed in range(3)]
  seeds = [make(n, 0.5, seed) for seed, n in enumerate(names)]
  base = make("popularity", 0.1)
  text = printed(tables.print_table, [result.joined(seeds), base])
  for key in base.per_query:
    mean = np.mean([seed.metrics[key] for seed in seeds])
    assert f"{mean:.4f}".lstrip("0") in text.split("95% intervals")[0]


def test_verdicts_follow_the_interval():
  assert tables.verdict({"low": 0.1, "high": 0.2}) == "better"
  assert tables.verdict({"low": -0.2, "high": -0.1}) == "worse"
  assert tables.verdict({"low": -0.2, "high": 0.0}) == "no clear difference"


def test_cutoffs_are_those_all_share():
  other = make("b", 0.1)
  del other.metrics["recall@10"]
  assert tables.cutoffs([make("a", 0.1), other]) == [5]
  del other.metrics["recall@5"]
  with pytest.raises(ValueError, match="no cutoff in common"):
    tables.cutoffs([make("a", 0.1), other])


def test_render_recommendations_marks_the_hit_and_keeps_brackets():
  shown = tables.examples(
    [make("m", 0.1)],
    {7: [4, 9]},
    ["", "a", "b", "[red]c[/red]", "d", *"efghij"],
    names={7: "user A7"},
  )
  text = printed(tables.render_recommendations, shown)
  assert "✓ [red]c[/red]" in text
  assert "held out: [red]c[/red]" in text
  assert "user A7" in text
  with pytest.raises(ValueError, match="no query of user 999"):
    tables.examples([make("m", 0.1)], {999: [1]}, [])
