"""The tables of docs/motifs.md and docs/additive.md, made of the recorded studies (`benchmarks.motifs`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

from probe.vocabulary import STUDY_MOTIFS, SUBLAYER_TITLES

RESULTS = Path(__file__).parent / "results"
MOTIFS, ADDITIVE = "motifs", "additive"
"""The studies, by the name of their record."""
STUDY = [str(route) for route in STUDY_MOTIFS]
WHEN = (("final", "last step"), ("matched", "matched"))
UNTESTED = "cannot be tested"
"""Where the margin is not clear of zero, pairs are not asked for."""
OFTEN = 2
"""Seeds in which another route must be a motif, or have been one, to be shown."""


@cache
def conditions(study: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8"))["motifs"]["results"]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def final_strengths(study: str = MOTIFS) -> list[str]:
    """By condition and route: the strength in each seed, over seeds, and in how many it is a motif."""
    return list(_strengths(study, "final"))


def matched_strengths(study: str = MOTIFS) -> list[str]:
    """The same at the step nearest to the study's accuracy."""
    return list(_strengths(study, "matched"))


def _strengths(study: str, when: str) -> Iterator[str]:
    for condition, about in conditions(study).items():
        for route in _routes(about):
            rows = [seed[when]["routes"].get(route) for seed in about["seeds"]]
            if not any(rows):  # it is no route of this condition
                continue
            cells = [_strength(row) for row in rows]
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


def accuracies(study: str = MOTIFS) -> list[str]:
    """By condition: steps and accuracies that are compared, and the step at which accuracy has half risen."""
    found = []
    for condition, about in conditions(study).items():
        for when, title in WHEN:
            cells = [f"{seed[when]['step']}: {_percent(seed[when]['accuracy'])} %" for seed in about["seeds"]]
            found.append(line(condition, title, *cells))
        halves = [seed.get("emergence", {}).get("accuracy_half") for seed in about["seeds"]]
        if any(halves):
            found.append(
                line(condition, "half of the rise", *("—" if half is None else f"{half:.0f}" for half in halves))
            )
    return found


def onsets(study: str = MOTIFS) -> list[str]:
    """By condition and route: when it became a motif in each seed, until when it was one, and its peak."""
    found = []
    for condition, about in conditions(study).items():
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


def dissociation(study: str = MOTIFS) -> list[str]:
    """C3, by condition, step and sublayer: which family has most mass and which is most harmful to lose."""
    found = []
    for condition, about in conditions(study).items():
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


def mass_without_role(study: str = MOTIFS) -> list[str]:
    """C4, by condition and step: families of appreciable mass, without role, and what the three tests say of them."""
    found = []
    for condition, about in conditions(study).items():
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


def verdicts(study: str = MOTIFS) -> list[str]:
    """By condition and step: in how many seeds each claim holds."""
    found = []
    for condition, about in conditions(study).items():
        for when, title in WHEN:
            cells = [
                _counted(seed[when]["verdicts"].get(claim, UNTESTED) for seed in about["seeds"])
                for claim in ("C1", "C2", "C3", "C4", "redundancy")
            ]
            found.append(line(condition, title, *cells))
    return found


def silenced(study: str = ADDITIVE) -> list[str]:
    """Where routes are added: what it costs to take all of them away, by sublayer and scope, at the end and before."""
    found = []
    for condition, about in conditions(study).items():
        for when, title in WHEN:
            for place in about["seeds"][0][when]["silence"]:
                rows = [seed[when]["silence"][place] for seed in about["seeds"]]
                found.append(line(condition, title, place, *(_strength(row | {"motif": False}) for row in rows)))
    return found


def zeroed(study: str = ADDITIVE) -> list[str]:
    """Where routes are added: what it costs to leave one out, its weight given to no other, at the end and before."""
    found = []
    for condition, about in conditions(study).items():
        for when, title in WHEN:
            for route in (name for name in _routes(about) if name in about["seeds"][0][when]["zero"]):
                rows = [seed[when]["zero"][route] for seed in about["seeds"]]
                found.append(
                    line(condition, title, _title(route), *(_strength(row | {"motif": False}) for row in rows))
                )
    return found


def without_routing(study: str = ADDITIVE) -> list[str]:
    """Where routes are added: what it costs to add nothing at any read, and the accuracy that is left."""
    found = []
    for condition, about in conditions(study).items():
        rows = [seed["without_routing"] for seed in about["seeds"] if "without_routing" in seed]
        if rows:
            cells = [f"{_strength(row | {'motif': False})}; accuracy {_percent(row['accuracy'])} %" for row in rows]
            found.append(line(condition, *cells))
    return found


def _of_additive(table: Callable[[str], list[str]]) -> Callable[[], list[str]]:
    @wraps(table)
    def made() -> list[str]:
        return table(ADDITIVE)

    return made


MOTIF_TABLES = (accuracies, verdicts, final_strengths, onsets, matched_strengths, dissociation, mass_without_role)
ADDITIVE_TABLES = tuple(
    map(_of_additive, (accuracies, final_strengths, without_routing, silenced, matched_strengths, zeroed, verdicts))
)
