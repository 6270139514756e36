"""The tables of docs/motifs.md, made of the recorded study (`benchmarks.motifs`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from probe.vocabulary import STUDY_MOTIFS, SUBLAYER_TITLES

RECORD = Path(__file__).parent / "results" / "motifs.json"
STUDY = [str(route) for route in STUDY_MOTIFS]
WHEN = (("final", "last step"), ("matched", "matched"))
UNTESTED = "cannot be tested"
"""Where the margin is not clear of zero, pairs are not asked for."""
OFTEN = 2
"""Seeds in which another route must be a motif, or have been one, to be shown."""


@cache
def conditions() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))["motifs"]["results"]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def final_strengths() -> list[str]:
    """By condition and route: the strength in each seed, over seeds, and in how many it is a motif."""
    return list(_strengths("final"))


def matched_strengths() -> list[str]:
    """The same at the step nearest to the study's accuracy."""
    return list(_strengths("matched"))


def _strengths(when: str) -> Iterator[str]:
    for condition, about in conditions().items():
        for route in _routes(about):
            cells = [_strength(seed[when]["routes"].get(route)) for seed in about["seeds"]]
            mean, motifs = about["over_seeds"][when].get(route), "—"
            over = "—"
            if mean is not None:
                over = f"{_percent(mean['mean'])} [{_percent(mean['low'])}, {_percent(mean['high'])}]"
                motifs = f"{mean['n_motif']} of {mean['n_seeds']}"
            yield line(condition, _title(route), *cells, over, motifs)


def _routes(about: dict[str, Any]) -> list[str]:
    """The study's, and others that are motifs, or were, in several seeds."""
    counts = Counter(
        route
        for seed in about["seeds"]
        for route in {
            *(name for when in ("final", "matched") for name, row in seed[when]["routes"].items() if row["motif"]),
            *(name for name, row in seed.get("emergence", {}).get("routes", {}).items() if row["status"] != "never"),
        }
    )
    return STUDY + sorted(route for route, count in counts.items() if count >= OFTEN and route not in STUDY)


def _title(route: str) -> str:
    return route + r" \*" * (route in STUDY)


def _strength(row: dict[str, Any] | None) -> str:
    """In per cent, with its interval; a motif is bold."""
    if row is None:
        return "cannot be masked"
    if row["strength"] is None:
        return "no strength"
    low, high = (row[f"strength_{end}"] for end in ("low", "high"))
    text = f"{_percent(row['strength'])} [{_percent(low)}, {_percent(high)}]"
    return f"**{text}**" if row["motif"] else text


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f}"


def accuracies() -> list[str]:
    """By condition: steps and accuracies that are compared, and the step at which accuracy has half risen."""
    found = []
    for condition, about in conditions().items():
        for when, title in WHEN:
            cells = [f"{seed[when]['step']}: {_percent(seed[when]['accuracy'])} %" for seed in about["seeds"]]
            found.append(line(condition, title, *cells))
        halves = [seed.get("emergence", {}).get("accuracy_half") for seed in about["seeds"]]
        if any(halves):
            found.append(
                line(condition, "half of the rise", *("—" if half is None else f"{half:.0f}" for half in halves))
            )
    return found


def onsets() -> list[str]:
    """By condition and route: when it became a motif in each seed, until when it was one, and its peak."""
    found = []
    for condition, about in conditions().items():
        seeds = [seed["emergence"]["routes"] for seed in about["seeds"] if seed.get("emergence")]
        for route in _routes(about) if seeds else ():
            cells = [_onset(seed.get(route)) for seed in seeds]
            emerged = sum(seed.get(route, {}).get("status") == "emerged" for seed in seeds)
            found.append(line(condition, _title(route), *cells, f"{emerged} of {len(seeds)}"))
    return found


def _onset(row: dict[str, Any] | None) -> str:
    """Since when, or at how many probes; then the peak, as a strength of its step and a share of the final margin."""
    if row is None:
        return "cannot be masked"
    strength = "" if row["strength_at_peak"] is None else f"{_percent(row['strength_at_peak'])} % of then, "
    peak = f"peak {strength}{_percent(row['peak'])} % of the end, at {row['peak_step']:.0f}"
    if row["status"] == "emerged":
        low, high = ("—" if row[end] is None else f"{row[end]:.0f}" for end in ("onset_low", "onset_high"))
        return f"**since {row['onset']:.0f} [{low}, {high}]**; {peak}"
    if row["status"] == "transient":
        return f"{row['n_held']} of {row['n_probes']} probes, until {row['last_held']:.0f}; {peak}"
    return f"none; {peak}"


def dissociation() -> list[str]:
    """C3, by condition, step and sublayer: which family has most mass and which is most harmful to lose."""
    found = []
    for condition, about in conditions().items():
        for when, title in WHEN:
            for sublayer in about["seeds"][0][when]["dissociation"]:
                each = [seed[when]["dissociation"][sublayer] for seed in about["seeds"]]
                apart = Counter({True: "apart", False: "the same", None: "below tau"}[e["dissociated"]] for e in each)
                counts = ", ".join(f"{name} {count}" for name, count in sorted(apart.items()))
                names = (_counted(e[what] for e in each) for what in ("heaviest", "most_harmful"))
                found.append(line(condition, title, SUBLAYER_TITLES[sublayer], *names, counts))
    return found


def _counted(names: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())


def mass_without_role() -> list[str]:
    """C4, by condition and step: families of appreciable mass, without role, and what the three tests say of them."""
    found = []
    for condition, about in conditions().items():
        for when, title in WHEN:
            roles = [role for seed in about["seeds"] for role in seed[when]["mass_without_role"]]
            without = sum(role["has_none"] is True for role in roles)
            cells = []
            for test in ("necessary", "sufficient", "interacting"):
                made = [role for role in roles if test not in role["not_tested"]]
                failed = sum(test in role["failed"] for role in made)
                cells.append(f"{failed} of {len(made)}" if made else "not tested")
            found.append(line(condition, title, f"{without} of {len(roles)}", *cells))
    return found


def verdicts() -> list[str]:
    """By condition and step: in how many seeds each claim holds."""
    found = []
    for condition, about in conditions().items():
        for when, title in WHEN:
            cells = [
                _counted(seed[when]["verdicts"].get(claim, UNTESTED) for seed in about["seeds"])
                for claim in ("C1", "C2", "C3", "C4", "redundancy")
            ]
            found.append(line(condition, title, *cells))
    return found


MOTIF_TABLES = (accuracies, verdicts, final_strengths, onsets, matched_strengths, dissociation, mass_without_role)
