"""The tables of docs/hops.md, made of the recorded study (`benchmarks.hops`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.motif_tables import line

RECORD = Path(__file__).parent / "results" / "hops.json"
MODELS = ("vanilla", "cumulative", "block_sum", "frozen")
CARRIES, LOOKUP, ROUTE = 0.05, 0.1, 0.3
"""Shares of the answer: from which an attention counts, and from which it, or a source, is named in a table."""
READS = {"self_attn": "attention", "mlp": "MLP", "final": "final read"}
Row = dict[str, Any]


def runs() -> list[Row]:
    """By model and seed."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = [part["results"] for part in record.values()]
    return sorted(rows, key=lambda row: (MODELS.index(row["condition"]), row["seed"]))


def restored(fact: Row, site: str) -> list[Row]:
    """What comes back at each site of a kind, in the order of reads."""
    rows = [row for row in fact["rows"] if row["direction"] == "denoise" and row["site"] == site]
    return sorted(rows, key=lambda row: row["read"])


def writes_answer(fact: Row, least: float) -> Iterator[tuple[int, float]]:
    """Layers whose attention output at the query brings back this much, and how much."""
    for row in restored(fact, "output"):
        if row["sublayer"] == "self_attn" and row["position"] == "query" and row["strength"] >= least:
            yield int(row["layer"]), row["strength"]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def lookups() -> list[str]:
    """By model, hops and fact on the way: the layers whose attention brings it to the query."""
    found = []
    for run in runs():
        for part in run["by_hops"]:
            named = [
                ", ".join(f"{layer} ({percent(share)})" for layer, share in writes_answer(fact, LOOKUP)) or "none"
                for fact in part["facts"]
            ]
            about = (run["condition"], str(run["seed"]), str(part["hops"]), f"{part['accuracy']:.3f}")
            found.append(line(*about, *named, *[""] * (len(run["by_hops"]) - len(named))))
    return found


def routes() -> list[str]:
    """By model with depth routing, hops and fact: the sources of depth that carry the answer."""
    found = []
    for run in runs():
        for part in run["by_hops"]:
            for fact in part["facts"] if "masks" in part else ():
                way = [_route(row) for row in restored(fact, "source") if row["strength"] >= ROUTE]
                about = (run["condition"], str(run["seed"]), str(part["hops"]), str(fact["fact"]))
                found.append(line(*about, "; ".join(way) or f"none alone carries {percent(ROUTE)}"))
    return found


def _route(row: Row) -> str:
    place = READS[row["sublayer"]] + ("" if row["sublayer"] == "final" else f" {int(row['layer'])}")
    source = f"{row['family']} ({int(row['source'])})"
    return f"{place} of {source} at the {row['position']}, {percent(row['strength'])}"


def reads() -> list[str]:
    """By model and hops: reads that matter by masks, that no family is enough for, and attentions that carry."""
    found = []
    for run in runs():
        for part in run["by_hops"]:
            carry = {layer for fact in part["facts"] for layer, _ in writes_answer(fact, CARRIES)}
            by_masks = _by_masks(part["masks"]) if "masks" in part else ["—"] * 3
            about = (run["condition"], str(run["seed"]), str(part["hops"]))
            found.append(line(*about, *by_masks, _counted(map(str, sorted(carry)))))
    return found


def _by_masks(rows: list[Row]) -> list[str]:
    masked = [row for row in rows if row["kind"] == "mask_renormalise" and row["p_matters"] < 0.05]
    harmed = {(row["sublayer"], row["scope"]) for row in masked if row["strength"] > 0}
    kept: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["kind"] == "keep_only":
            place = row["sublayer"], row["scope"]
            kept[place] = min(kept.get(place, row["strength_high"]), row["strength_high"])
    short = {place for place, high in kept.items() if high >= CARRIES}
    of = {name: _counted(_layers(harmed, name)) for name in ("self_attn", "mlp")}
    return [of["self_attn"], of["mlp"], _counted(_layers(short, "self_attn"))]


def _layers(places: set[tuple[str, str]], sublayer: str) -> list[str]:
    return sorted(scope.removeprefix("layer:") for name, scope in places if name == sublayer)


def _counted(names: Any) -> str:
    names = list(names)
    return f"{len(names)}: {', '.join(names)}" if names else "0"


HOPS_TABLES = (lookups, routes, reads)
