"""The tables of the documentation, made of what is recorded in results/.

    python -m benchmarks.tables

A test holds that the documentation has these lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.hops_tables import HOPS_TABLES
from benchmarks.memory_tables import MEMORY_TABLES
from benchmarks.motif_tables import ADDITIVE_TABLES, MOTIF_TABLES, line

RESULTS = Path(__file__).parent / "results"
NOISES = {
    "normal": "normal",
    "lognormal, sigma 0.5, 20 % zeros": "lognormal 0.5, 20 % zeros",
    "lognormal, sigma 1, 50 % zeros": "lognormal 1, 50 % zeros",
}


def results(name: str, part: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))[part]["results"]


def percent(share: dict[str, float]) -> str:
    return f"{100 * share['rate']:.1f} ± {100 * share['monte_carlo_error']:.1f} %"


def between(shares: Iterable[float]) -> str:
    shares = list(shares)
    return f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %"


def coverage() -> list[str]:
    """Mean and range over 18 cases (noise, strength, correlation) of each margin and number of sequences."""
    rows = results("probe_statistics", "coverage")
    sizes, found = sorted({row["clusters"] for row in rows}), []
    for margin in dict.fromkeys(row["margin"] for row in rows):
        cells = []
        for row in (row for size in sizes for row in rows if (row["margin"], row["clusters"]) == (margin, size)):
            rates = [share["rate"] for share in row["covers"].values()]
            cells.append(f"{100 * sum(rates) / len(rates):.1f} % ({100 * min(rates):.1f} to {100 * max(rates):.1f})")
        found.append(line(margin, *cells))
    return found


def family_wise_error() -> list[str]:
    """By noise: false "exists" / false "matters", of each size of the sample and the grid."""
    rows, found = results("probe_statistics", "family_wise_error"), []
    for noise, title in NOISES.items():
        same = [row for row in rows if row["effects"] == noise]
        shares = ([100 * row[name]["rate"] for name in ("exists", "matters")] for row in same)
        found.append(line(title, *(f"{exists:.1f} / {matters:.1f} %" for exists, matters in shares)))
    return found


def degenerate() -> list[str]:
    """By kind of the 14 degenerate cells of 28: error rates over the three noises, then power beside 27 of them."""
    rows, power = (results("probe_statistics", part) for part in ("among_degenerate_cells", "power"))
    found = []
    for row in power:
        same = [other for other in rows if other["kind"] == row["kind"]]
        errors = [between(other[name]["rate"] for other in same) if same else "—" for name in ("exists", "matters")]
        what = row["kind"] or ("none: a grid of one" if row["cells"] == 1 else "none: 27 ordinary ones")
        found.append(line(what, *errors, percent(row["found"]), percent(row["another_is_found"])))
    return found


def equivalence() -> list[str]:
    rows = results("probe_statistics", "equivalence")
    found = []
    for row in rows:
        at_margin = [v["rate"] for name, v in row.items() if "strength +0.01" in name or "strength -0.01" in name]
        none = [
            between(v["rate"] for name, v in row.items() if f"strength +0.0; noise {size}" in name)
            for size in ("1.0", "5.0")
        ]
        found.append(line(str(row["clusters"]), between(at_margin), *none))
    return found


def detectable() -> list[str]:
    """By noise: the share that is found, and the strength that was stated, of each number of sequences."""
    rows, found = results("probe_statistics", "detectable"), []
    for noise, title in NOISES.items():
        same = [row for row in rows if row["effects"] == noise]
        found.append(line(title, *(f"{percent(row['p_adjusted'])} of {100 * row['strength']:.1f} %" for row in same)))
    return found


def noise_logits() -> list[str]:
    """By accuracy and noise redrawn: mean harm on both margins, without and with true harm."""
    rows, found = results("noise_logits", "redrawn_noise"), {}
    for row in rows:
        key = f"{100 * row['accuracy']:.0f} %", f"{100 * row['noise_redrawn']:.0f} %"
        true = [f"{row['logit_diff']['true_harm']:.2f}"] if row["signal_kept"] < 1 else []
        harms = [f"{row[margin]['harm'] + 0.0:+.2f}" for margin in ("logit_diff", "logit_diff_mean")]
        found.setdefault(key, []).extend(true + harms)
    return [line(*key, *cells) for key, cells in found.items()]


def thresholds() -> list[str]:
    """By planted model: strengths at the planted sites and elsewhere, over all seeds and amounts of dirt."""
    rows, found = results("thresholds", "strengths"), []
    for name in dict.fromkeys(row["model"] for row in rows if not row["no_strength"]):
        same = [row for row in rows if row["model"] == name]
        at, elsewhere = ([s for row in same for s in row[k]] for k in ("planted_strengths", "other_strengths"))
        idle = sum(row["others_equivalent_to_zero"] for row in same)
        within = sum(abs(strength) < 0.01 for strength in elsewhere)
        found.append(
            line(
                f"`{name}`",
                between(at) if at else "none planted",
                between(elsewhere),
                f"{idle} of the {within}",
                str(len(elsewhere)),
            )
        )
    return found


def onsets() -> list[str]:
    found = []
    for name, row in results("emergence", "planted").items():
        shares = (percent(row[key]) for key in ("within_one_step", "best_possible", "interval_covers"))
        width = row["interval_steps_of_trail"]
        found.append(line(name, percent(row["found"]), *shares, f"{width['median']:.0f} ({width['95 %']:.0f})"))
    return found


def false_onsets() -> list[str]:
    rows = results("emergence", "null").items()
    return [line(name, percent(row["false_onset_anywhere"]), percent(row["held_anywhere"])) for name, row in rows]


def integrated() -> list[str]:
    """By model, step and cells: rank correlation with exact effects on the margin, by points of the path."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in results("integrated", "agreement"):
        if row["metric"] == "logit_diff":
            model = f"{row['model']}, step {row['step']} (accuracy {row['accuracy']:.2f})"
            found.setdefault((model, row["grid"]), []).append(f"{row['spearman']:.2f}")
    return [line(*key, *cells) for key, cells in found.items()]


def faults() -> list[str]:
    """A row for each kind of fault, and one for all."""
    record = json.loads((RESULTS / "faults.json").read_text(encoding="utf-8"))
    kinds = {kind: row for part in record.values() for kind, row in part["results"].items()}
    counted = ("faults", "from outside", "lost", "altered", "silent", "leftover")
    head = ["fault", *counted, "other status", "hang", "how it ended"]
    lines = [line(*head), line(*["---"] * len(head))]
    sums: dict[str, int] = dict.fromkeys((*counted, "status", "hang"), 0)
    for kind, row in sorted(kinds.items()):
        numbers = {name: row[name] for name in sums}
        sums = {name: sums[name] + numbers[name] for name in sums}
        ends = ", ".join(f"{status}: {count}" for status, count in sorted(row["statuses"].items()))
        lines.append(line(kind, *map(str, numbers.values()), ends))
    return [*lines, line("**all**", *(f"**{number}**" for number in sums.values()), "")]


def traces() -> list[str]:
    """By model and flips: patches, forward passes of the naive loop and of the trace, and what of the time."""
    record, found = json.loads((RESULTS / "trace.json").read_text(encoding="utf-8")), []
    for row in (row for part in record.values() for row in part["results"]):
        passes, ratios = row["forward_passes"], (row["fewer_forward_passes"], row["speedup_over_naive"])
        numbers = (f"{row['patches']:,}", f"{passes['naive']:,}", f"{passes['spent']:,.0f}")
        found.append(line(row["model"], row["flips"], *numbers, *(f"{ratio:.1f}" for ratio in ratios)))
    return found


def hostile() -> list[str]:
    """A row for each kind of hostile input, and one for all: drawn, taken, refused in a line, neither."""
    record = json.loads((RESULTS / "fuzz.json").read_text(encoding="utf-8"))
    counted = ("inputs", "accepted", "refused", "broken")
    lines = [line("kind of input", *counted), line(*["---"] * 5)]
    found = {kind: [part["results"][name] for name in counted] for kind, part in record.items()}
    lines += [line(kind, *(f"{number:,}" for number in numbers)) for kind, numbers in found.items()]
    return [*lines, line("**all**", *(f"**{sum(column):,}**" for column in zip(*found.values(), strict=True)))]


def integrity() -> list[str]:
    """What digests and checks cost of a demo's first model: calls and share of the CPU time."""
    demo = results("integrity", "demo")
    parts = [line(name, f"{row['calls']:,}", f"{row['share']:.2%}") for name, row in demo["of_it"].items()]
    return [*parts, line("**all**", "", f"**{demo['share']:.2%}**")]


def learned() -> list[str]:
    """By run: accuracy of all queries and by group, the step from which it holds, and the flip test's shares."""
    found = []
    for name in ("pointer", "hops"):
        for row in results("learned", name):
            accuracy, held = row["accuracy"], row["from_step"]["accuracy"]
            groups = [f"{value:.3f}" for group, value in accuracy.items() if group != "accuracy"]
            flips = {part["asked"]: part for part in row["flip"] if part["group"] == "all"}
            follows = [_with_interval(flips[asked], "follows") for asked in (True, False)]
            about = (name, row["condition"], str(row["seed"]), f"{accuracy['accuracy']:.4f}", ", ".join(groups) or "—")
            found.append(line(*about, "—" if held is None else str(held), *follows))
    return found


def counts() -> list[str]:
    """By shape, step and model: ratios to vanilla of what is launched, moved and computed."""
    found = []
    for shape in ("8x64", "12x512", "28x1024"):
        rows = results("counts", shape)
        for row in rows:
            base = next(r for r in rows if (r["step"], r["autocast"]) == (row["step"], row["autocast"]))
            if row is base:
                continue
            least = f"{1 + row['least_bytes'] / base['bytes']:.2f}" if "least_bytes" in row else "—"
            ratios = (f"{row[name] / base[name]:.2f}" for name in ("operators", "bytes", "flops"))
            step = row["step"] + (", bf16" if row["autocast"] else "")
            found.append(line(shape.replace("x", " × "), step, row["model"], *ratios, least))
    return found


def _with_interval(row: dict[str, float], name: str) -> str:
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


TABLES: dict[str, tuple[Callable[[], list[str]], ...]] = {
    "statistics.md": (coverage, family_wise_error, degenerate, equivalence, detectable, noise_logits, thresholds),
    "emergence.md": (onsets, false_onsets),
    "probes.md": (integrated,),
    "motifs.md": MOTIF_TABLES,
    "memory.md": MEMORY_TABLES,
    "additive.md": ADDITIVE_TABLES,
    "faults.md": (faults, hostile, integrity),
    "trace.md": (traces,),
    "tasks.md": (learned,),
    "performance.md": (counts,),
    "hops.md": HOPS_TABLES,
}
"""What each page of the documentation has."""


def main() -> None:
    for page, tables in TABLES.items():
        for table in tables:
            print(f"\n{page}: {table.__name__}\n" + "\n".join(table()))


if __name__ == "__main__":
    main()
