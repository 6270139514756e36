"""The flip test's outcomes as shares with intervals: of all queries, and of each group of them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from probe.analysis import stats

ALL = "all"
OUTCOMES = ("follows", "moves")


def flip_shares(outcomes: pd.DataFrame) -> pd.DataFrame:
    """A row for each group of queries and of all, and for what was changed.

    Intervals are Wilson's (1927), 95 %, as if each sequence were a single answer: the most that clustering can cost
    where sequences have equally many queries. A bootstrap has none where every output follows, or none.

    Args:
        outcomes: of `probe.examples.flip.flip_outcomes`.

    Returns:
        Columns `group`, `asked`, of each outcome its share, `_low` and `_high`, `n_queries`, `n_sequences`.
    """
    return shares_of(outcomes, OUTCOMES, by=(True, False))


def shares_of(answers: pd.DataFrame, outcomes: Sequence[str], by: Sequence[bool] = ()) -> pd.DataFrame:
    """As `flip_shares`, of any `outcomes`: columns of true and false, beside `sequence` and `group`.

    Args:
        by: values of `asked` that have rows of their own; none where there is no such column.
    """
    groups = sorted(answers["group"].unique(), key=lambda name: (len(name), name))  # position_2 before position_10
    rows = []
    for group in [ALL, *(groups if len(groups) > 1 else [])]:
        chosen = answers if group == ALL else answers[answers["group"] == group]
        parts = [({"asked": asked}, chosen[chosen["asked"] == asked]) for asked in by] if by else [({}, chosen)]
        rows += [{"group": group, **about, **_shares(part, outcomes)} for about, part in parts if len(part)]
    return pd.DataFrame(rows)


def _shares(part: pd.DataFrame, outcomes: Sequence[str]) -> dict[str, float]:
    count = part["sequence"].nunique()
    row: dict[str, float] = {}
    for outcome in outcomes:
        share = float(part[outcome].mean())
        low, high = stats.wilson_low(share, count), 1 - stats.wilson_low(1 - share, count)
        row |= {outcome: share, f"{outcome}_low": low, f"{outcome}_high": high}
    return row | {"n_queries": len(part), "n_sequences": count}


def flip_text(shares: pd.DataFrame) -> str:
    """The shares as lines of a table, and what they mean."""
    lines = [f"{'queries':<14}{'changed value':<16}{'follows [95 % CI]':<26}{'moves [95 % CI]':<26}{'n':>8}"]
    for row in shares.to_dict("records"):
        cells = [f"{row[name]:.4f} [{row[f'{name}_low']:.4f}, {row[f'{name}_high']:.4f}]" for name in OUTCOMES]
        changed = "asked for" if row["asked"] else "another"
        lines.append(f"{row['group']:<14}{changed:<16}{cells[0]:<26}{cells[1]:<26}{row['n_queries']:>8,}")
    lines += ["", "follows: the output is right after the change (another value: it is the new one, which is wrong);"]
    return "\n".join(
        [*lines, "moves: its first token is another than before. A lookup of answers of one token has 1, 1, 0, 0."]
    )
