"""The tables of docs/memory.md and its figure, made of the recorded study (`benchmarks.memory`).

python -m benchmarks.memory_tables --figure docs/figures/memory
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

from benchmarks.motif_tables import line

RECORD = Path(__file__).parent / "results" / "memory.json"
ARCHITECTURES = ("vanilla", "cumulative", "block_sum")
COLORS, MARKERS = ("#666666", "#0072B2", "#D55E00"), "o^s"
FOLLOWS = 0.99
"""From which share of outputs that follow the flip a model reads its memory."""


def runs() -> list[dict[str, Any]]:
    """By architecture, size and seed."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    order = ARCHITECTURES
    rows = [part["results"] for part in record.values()]
    return sorted(rows, key=lambda row: (order.index(row["architecture"]), row["cells"], row["seed"]))


def follows(row: dict[str, Any]) -> dict[str, float]:
    """The flip test of all queries whose value is changed."""
    return next(part for part in row["flip"] if part["asked"] and part["group"] == "all")


def reads_memory(row: dict[str, Any]) -> bool:
    return follows(row)["follows"] >= FOLLOWS


def at_the_cell(row: dict[str, Any]) -> float:
    """Attention to the addressed cell, mean over heads, in the layer that has most."""
    return max(layer["mean_head"]["value"] for layer in row["attention_at_the_cell"])


Number = Callable[[dict[str, Any]], "float | None"]
PLACES: dict[str, Number] = {
    "attention to the addressed cell": at_the_cell,
    "attention where the value is read": lambda row: row["reading"] and row["reading"]["mean_head"]["value"],
}
TOLD = {
    "agreement": "rank agreement of weight and flow",
    "heavy": "weights of ½ or more that carry",
    "told": "largest weight is where most flows",
}


def number(kind: str, name: str) -> Number:
    """Of the attention or the routing of a run; None where it has none."""
    return lambda row: row[kind] and row[kind][name]["value"]


def pooled() -> list[str]:
    """By kind, over all models that follow the flip: large weights that carry, and softmaxes told of those that do."""
    found = []
    for kind in ("attention", "routing"):
        rows = [row[kind] for row in runs() if reads_memory(row) and row[kind]]
        parts = (("heavy", "heavy_cells"), ("told", "carrying_softmaxes"))
        counts = [(sum(_count(row, name, of) for row in rows), sum(row[of] for row in rows)) for name, of in parts]
        chance = sum(row["told_by_chance"] * row["carrying_softmaxes"] for row in rows if row["carrying_softmaxes"])
        shares = [f"{count} of {total} ({100 * count / total:.0f} %)" for count, total in counts]
        found.append(line(kind, str(len(rows)), *shares, f"{100 * chance / counts[1][1]:.0f} %"))
    return found


def _count(numbers: dict[str, Any], name: str, of: str) -> int:
    return round((numbers[name]["value"] or 0) * numbers[of])


def attention() -> list[str]:
    """By architecture and size, of the models that follow the flip: means over seeds, and their range."""
    return list(_over_seeds([*PLACES.values(), *(number("attention", name) for name in TOLD)]))


def routing() -> list[str]:
    """The same of routing."""
    rows = _over_seeds([number("routing", name) for name in TOLD])
    return [row for row in rows if not row.startswith("| vanilla")]


def _over_seeds(numbers: Iterable[Number]) -> Iterator[str]:
    numbers, rows = list(numbers), runs()
    for architecture, cells in dict.fromkeys((row["architecture"], row["cells"]) for row in rows):
        same = [row for row in rows if (row["architecture"], row["cells"]) == (architecture, cells)]
        good = [row for row in same if reads_memory(row)]
        spread = [_spread([each(row) for row in good]) for each in numbers]
        yield line(architecture, str(cells), f"{len(good)} of {len(same)}", *spread)


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "—"
    mean = f"{sum(known) / len(known):.2f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.2f} to {max(known):.2f})"


def by_run() -> list[str]:
    """Every run with intervals: the flip test, and attention where the value is read."""
    found = []
    for row in runs():
        share, read = follows(row), row["reading"]
        flip = f"{share['follows']:.3f} [{share['follows_low']:.3f}, {share['follows_high']:.3f}]"
        where = f"layer {read['layer']}, {read['position']}: {100 * read['strength']:.0f} %"
        weights = (_interval(read["mean_head"]), _interval(read["largest_head"]))
        found.append(line(row["architecture"], str(row["cells"]), str(row["seed"]), flip, where, *weights))
    return found


def told_by_run() -> list[str]:
    """Every run with intervals: rank agreement, large weights that carry, and softmaxes told, of both kinds."""
    found = []
    for row in runs():
        kinds = [cell for kind in ("attention", "routing") for cell in _kind(row[kind])]
        found.append(line(row["architecture"], str(row["cells"]), str(row["seed"]), *kinds))
    return found


def _kind(numbers: dict[str, Any] | None) -> list[str]:
    if numbers is None:
        return ["—"] * 3
    counts = (("heavy", "heavy_cells"), ("told", "carrying_softmaxes"))
    shares = [f"{_count(numbers, name, of)} of {numbers[of]}" for name, of in counts]
    return [_interval(numbers["agreement"]), *shares]


def _interval(numbers: dict[str, float | None]) -> str:
    value, low, high = (numbers[name] for name in ("value", "low", "high"))
    return f"{value:.2f}" if low is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


MEMORY_TABLES = (pooled, attention, routing, by_run, told_by_run)


def plot() -> Any:
    """Attention above, routing below: a point for each model that follows the flip, a line through their means."""
    from matplotlib.figure import Figure

    from probe.report.figures import style

    top, below = list(PLACES.items())
    upper = [top, *((f"attention: {title}", number("attention", name)) for name, title in TOLD.items())]
    lower = [below, *((f"routing: {title}", number("routing", name)) for name, title in TOLD.items())]
    rows = [row for row in runs() if reads_memory(row)]
    with style.paper_style():
        figure = Figure(figsize=(style.PAGE, 3.8), layout="constrained")
        panels = figure.subplots(2, 4, sharex=True, sharey=True)
        for axes, (title, value) in zip(panels.flat, [*upper, *lower], strict=True):
            axes.set_title(fill(title, 22))
            for shift, architecture in enumerate(ARCHITECTURES):
                _draw(axes, [row for row in rows if row["architecture"] == architecture], value, shift)
        panels[0, 0].set(xscale="log", ylim=(-0.05, 1.05), xlim=(3, 85))
        panels[0, 0].set_xticks([4, 16, 64], ["4", "16", "64"], minor=False)
        panels[0, 0].set_xticks([], minor=True)
        for axes in panels[-1]:
            axes.set_xlabel("cells of the memory")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw(axes: Any, rows: list[dict[str, Any]], value: Number, shift: int) -> None:
    """One architecture, a little to the side of the others."""
    points = [(row["cells"], found) for row in rows if (found := value(row)) is not None]
    sizes, look = sorted({cells for cells, _ in points}), {"color": COLORS[shift], "marker": MARKERS[shift]}
    means = [_mean(found for at, found in points if at == cells) for cells in sizes]
    apart = 1.15 ** (shift - 1)
    axes.plot([x * apart for x in sizes], means, label=ARCHITECTURES[shift], **look)
    axes.plot([x * apart for x, _ in points], [y for _, y in points], linestyle="", alpha=0.5, markersize=2.5, **look)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="write it there, as PNG")
    args = parser.parse_args()
    for table in MEMORY_TABLES:
        print(f"\n{table.__name__}\n" + "\n".join(table()))
    if args.figure is not None:
        plot().savefig(args.figure.with_suffix(".png"), dpi=200, metadata={"Software": None})


if __name__ == "__main__":
    main()
