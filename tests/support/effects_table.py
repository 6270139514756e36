"""Tables of effects with random numbers, for tests of what is drawn of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from probe.analysis.effects import EFFECT_COLUMNS
from probe.files.tables import type_of
from probe.vocabulary import FAMILIES, MARGIN, MASK, SUBLAYERS

CLEAN = 5.0
"""The clean margin of every row, in nats."""


def effects_table(
    scopes: Iterable[str],
    kinds: Sequence[str] = (MASK,),
    sublayers: Sequence[str] = SUBLAYERS,
    steps: Sequence[int] = (40,),
    seed: int = 0,
    size: float = 0.1,
) -> pd.DataFrame:
    """Rows on the margin with strengths of `size`; `older` is not applicable at layer 0 and in the early region."""
    rng = np.random.default_rng(seed)
    rows = []
    for step, kind, sublayer, scope, family in itertools.product(steps, kinds, sublayers, scopes, FAMILIES):
        applicable = not (family == "older" and scope in ("early", "layer:0"))
        strength = rng.normal(0, size) if applicable else math.nan
        low, high = strength - 0.3 * abs(rng.normal(0, size)), strength + 0.6 * abs(rng.normal(0, size))
        rows.append(
            {"step": step, "sublayer": sublayer, "scope": scope, "family": family, "kind": kind}
            | {"applicable": applicable, "mass": rng.uniform(0, 0.5) if applicable else 0.0}
            | {"strength": strength, "strength_low": low, "strength_high": high}
            | {"effect": -CLEAN * strength, "ci_low": -CLEAN * high, "ci_high": -CLEAN * low}
            | {"p_matters": rng.choice([0.001, 0.5]), "n_unaliased_reads": int(rng.integers(0, 2))}
            | {"no_strength": "" if applicable else "not applicable"}
        )
    same = {"run": "a run", "condition": "cumulative", "seed": seed, "positions": "all", "with_aliases": False}
    same |= {"metric": MARGIN, "clean": CLEAN, "margin": CLEAN, "aliased_mass": 0.0, "p_adjusted": 0.01}
    same |= {"task_learned": True, "below_floor": False, "n_reads": 1, "n_sequences": 64, "n_queries": 512}
    return pd.DataFrame(rows).assign(**same).reindex(columns=EFFECT_COLUMNS)


def whole(effects: pd.DataFrame) -> pd.DataFrame:
    """`effects` with the columns that it lacks, in each a value of its type."""
    values = {"texts": "", "true and false": False, "integers": 1, "numbers": 0.0}
    lacking = [column for column in EFFECT_COLUMNS if column not in effects]
    return effects.assign(**{column: values[type_of(column)] for column in lacking})
