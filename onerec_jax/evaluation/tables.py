"""Results as rows, for the terminal (rich) and for the report page."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.markup
import rich.table

from onerec_jax.evaluation import result

BASELINES = ("popularity", "sasrec")
"""Runs of these names, where given, are what the others are compared with."""
_SHORT = {"recall": "R", "ndcg": "N"}


class Item(NamedTuple):
  """An item as people see it."""

  id: int
  title: str


@dataclasses.dataclass(frozen=True)
class Example:
  """One user's recommendations.

  Attributes:
    user: how to call the user.
    history: oldest first.
    target: the held-out item, if there is one.
    lists: model → its recommendations, best first.
  """

  user: str
  history: Sequence[Item]
  target: Item | None
  lists: Mapping[str, Sequence[Item]]


def examples(
  evaluations: Sequence[result.Evaluation],
  histories: Mapping[int, Sequence[int]],
  titles: Sequence[str],
  *,
  names: Mapping[int, str] | None = None,
  filtered: bool = True,
) -> list[Example]:
  """The recommendations that evaluations kept, for a few users.

  Args:
    evaluations: on the same queries.
    histories: dense user → dense items before the query, oldest first; a
      user's first query is shown.
    titles: of all items by dense id; entry 0 is padding.
    names: dense user → how to call the user; the number otherwise.
    filtered: show the seen-filtered lists.

  Raises:
    ValueError: a user without a query.
  """
  found = []
  for user, history in histories.items():
    lists, target = {}, None
    for evaluation in evaluations:
      rows = (evaluation.user == user).nonzero()[0]
      if not len(rows):
        raise ValueError(f"{evaluation.name} has no query of user {user}")
      kept = evaluation.filtered_items if filtered else evaluation.items
      ids = [int(i) for i in kept[rows[0]] if i > 0]
      lists[evaluation.name] = [Item(i, titles[i]) for i in ids]
      item = int(evaluation.target[rows[0]])
      target = Item(item, titles[item])
    found.append(
      Example(
        user=(names or {}).get(user, f"user {user}"),
        history=[Item(int(i), titles[i]) for i in history],
        target=target,
        lists=lists,
      )
    )
  return found


def cutoffs(evaluations: Sequence[result.Evaluation]) -> list[int]:
  """The cutoffs that all evaluations have, ascending.

  Raises:
    ValueError: none is shared.
  """
  each = [
    {
      int(key.removeprefix("recall@"))
      for key in evaluation.metrics
      if key.startswith("recall@")
    }
    for evaluation in evaluations
  ]
  shared = sorted(set.intersection(*each)) if each else []
  if not shared:
    raise ValueError(
      "the evaluations have no cutoff in common: "
      f"{ {e.name: sorted(c) for e, c in zip(evaluations, each)} }; evaluate "
      "them with the same evaluation.cutoffs"
    )
  return shared


def headline(found: Sequence[int]) -> list[str]:
  """The metrics of the result table: recall then NDCG at each cutoff."""
  return [f"{metric}@{k}" for metric in _SHORT for k in found]


def short(metric: str) -> str:
  """`ndcg@10` → `N@10`."""
  name, _, cutoff = metric.partition("@")
  return f"{_SHORT.get(name, name)}@{cutoff}"


def comparisons(
  evaluations: Sequence[result.Evaluation],
  baselines: Iterable[str] = BASELINES,
) -> list[dict[str, Any]]:
  """Every model against every baseline, at the largest cutoff.

  Baselines are compared with those before them, so `sasrec` against
  `popularity` is there too, and no pair twice.
  """
  order = list(baselines)
  by_name = {e.name: e for e in evaluations}
  largest = cutoffs(evaluations)[-1]
  names = [
    f"{column}{metric}@{largest}"
    for column in ("", "filtered/")
    for metric in ("recall", "ndcg")
  ]
  rows = []
  for evaluation in evaluations:
    rank = (
      order.index(evaluation.name) if evaluation.name in order else len(order)
    )
    for base in order[:rank]:
      if base in by_name:
        rows += result.compare_all(evaluation, by_name[base], names)
  return rows


def verdict(row: Mapping[str, Any]) -> str:
  """What an interval allows to say."""
  if row["low"] > 0:
    return "better"
  if row["high"] < 0:
    return "worse"
  return "no clear difference"


def result_table(
  evaluations: Sequence[result.Evaluation],
) -> rich.table.Table:
  """Models by metrics, unfiltered | filtered; the best of a column in bold.

  Raises:
    ValueError: they were not asked the same, so that nothing compares.
  """
  found = cutoffs(evaluations)
  for other in evaluations[1:]:
    result.same_queries(evaluations[0], other)
  metrics = headline(found)
  keys = [
    *metrics,
    *(f"filtered/{metric}" for metric in metrics),
    f"coverage@{found[-1]}",
  ]
  # Narrow enough for 80 columns: numbers must never be cut.
  table = rich.table.Table(
    title=f"{evaluations[0].split}, full ranking: unfiltered │ seen-filtered",
    caption=f"{evaluations[0].metrics['queries']} queries",
    box=rich.box.SIMPLE_HEAD,
    padding=0,
  )
  table.add_column("model", overflow="fold")
  starts = (len(metrics), 2 * len(metrics))
  for index, key in enumerate(keys):
    if index in starts:
      table.add_column("│", style="dim")
    name = key.removeprefix("filtered/")
    label = "cover" if name.startswith("coverage") else short(name)
    table.add_column(label, justify="right", no_wrap=True, min_width=5)
  best = {key: max(e.metrics[key] for e in evaluations) for key in keys}
  for evaluation in evaluations:
    # Seeds that were joined stand under each other.
    cells = [rich.markup.escape(evaluation.name.replace("+", "+\n"))]
    for index, key in enumerate(keys):
      if index in starts:
        cells.append("│")
      value = evaluation.metrics[key]
      text = f"{value:.4f}".removeprefix("0")
      cells.append(f"[bold]{text}[/bold]" if value == best[key] else text)
    table.add_row(*cells)
  return table


def print_figures(
  name: str,
  figures: Mapping[str, float],
  *,
  console: rich.console.Console | None = None,
) -> None:
  """A reward model's figures on the test split (evaluation/rewards.py)."""
  table = rich.table.Table(
    "figure",
    "",
    title=rich.markup.escape(f"{name}, test"),
    box=rich.box.SIMPLE,
  )
  for figure, value in figures.items():
    table.add_row(figure, f"{value:.4f}")
  (console or rich.console.Console()).print(table)


def print_table(
  evaluations: Sequence[result.Evaluation],
  *,
  baselines: Iterable[str] = BASELINES,
  console: rich.console.Console | None = None,
) -> list[dict[str, Any]]:
  """Prints the result table and how the models differ.

  Returns:
    `comparisons`, which it printed.

  Raises:
    ValueError: no evaluations, or they were measured on different queries.
  """
  if not evaluations:
    raise ValueError("there are no evaluations to print")
  console = console or rich.console.Console()
  console.print(result_table(evaluations))
  pair, compared = None, comparisons(evaluations, baselines)
  for row in compared:
    if pair != (row["a"], row["b"]):
      pair = (row["a"], row["b"])
      name = rich.markup.escape(f"{row['a']} − {row['b']}")
      console.print(f"{name}, {row['level']:.0%} intervals", highlight=False)
    console.print(
      f"  {row['metric']:<18} {row['difference']:+.4f} "
      f"({row['low']:+.4f} to {row['high']:+.4f}) {verdict(row)}",
      highlight=False,
    )
  return compared


def print_averages(
  averages: Mapping[str, Mapping[str, Mapping[str, float]]],
  metrics: Sequence[str],
  console: rich.console.Console | None = None,
) -> None:
  """Prints mean ± standard deviation over seeds, unfiltered | filtered.

  Args:
    averages: model → figure → `mean` and `std` (result.aggregate).
    metrics: which, as `ndcg@10`.
    console: where to; stdout otherwise.
  """
  console = console or rich.console.Console()
  for name, figures in averages.items():
    seeds = figures[metrics[0]]["seeds"]
    console.print(f"{rich.markup.escape(name)}, {seeds} seeds", highlight=False)
    for metric in metrics:
      both = (figures[metric], figures[f"filtered/{metric}"])
      cells = [f"{x['mean']:.4f} ± {x['std']:.4f}" for x in both]
      console.print(f"  {metric:<18} {' │ '.join(cells)}", highlight=False)


def render_recommendations(
  found: Sequence[Example],
  *,
  history: int = 8,
  console: rich.console.Console | None = None,
) -> None:
  """Prints users' latest events and what each model recommends.

  Args:
    found: the users.
    history: how many of the latest events to show.
    console: where to; stdout otherwise.
  """
  console = console or rich.console.Console()
  for example in found:
    table = rich.table.Table(
      title=rich.markup.escape(example.user),
      box=rich.box.SIMPLE_HEAD,
      expand=True,
    )
    # One line a title: a list is read by its ranks.
    line = {"no_wrap": True, "overflow": "ellipsis", "ratio": 1}
    table.add_column("history", style="dim", **line)
    for name in example.lists:
      table.add_column(rich.markup.escape(name), **line)
    latest = list(example.history)[-history:]
    depth = max([len(latest), *map(len, example.lists.values())])
    for place in range(depth):
      cells = [_title(latest, place, None)]
      cells += [
        _title(items, place, example.target) for items in example.lists.values()
      ]
      table.add_row(*cells)
    console.print(table)
    if example.target is not None:
      console.print(
        f"held out: [green]{rich.markup.escape(example.target.title)}[/green]"
      )


def _title(items: Sequence[Item], place: int, target: Item | None) -> str:
  if place >= len(items):
    return ""
  text = rich.markup.escape(items[place].title)
  if target is not None and items[place].id == target.id:
    return f"[bold green]✓ {text}[/bold green]"
  return text
