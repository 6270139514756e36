"""Reading a table whose answer is planted."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from attnres import FAMILIES, REGIONS
from probe.motifs import dissociation, motifs

K = 16
MATTERS = 0.05 * math.log(K)


def table(harm: dict[tuple[str, str, str], float], mass: dict[str, float], width: float = 0.01) -> pd.DataFrame:
    """Rows for both sublayers, all scopes; `harm` by (sublayer, scope, family), zero where it says nothing."""
    rows = []
    for sublayer in ("self_attn", "mlp"):
        for scope in (*REGIONS, "all"):
            for family in FAMILIES:
                effect = harm.get((sublayer, scope, family), 0.0)
                rows.append(
                    {
                        **{"kind": "mask_renormalise", "positions": "all", "with_aliases": False, "metric": "nll"},
                        **{"sublayer": sublayer, "scope": scope, "family": family, "mass": mass[family]},
                        **{"aliased_mass": 0.0, "effect": effect, "ci_low": effect - width, "ci_high": effect + width},
                        **{"applicable": not (scope == "early" and family == "older"), "task_learned": True},
                        **{"n_reads": 2, "n_unaliased_reads": 1},
                    }
                )
    return pd.DataFrame(rows)


MASS = {"embedding": 0.2, "current": 0.5, "prev_completed": 0.2, "older": 0.1}


def test_mass_and_effect_part_ways():
    found = dissociation(table({("mlp", "all", "embedding"): 1.0, ("self_attn", "all", "current"): 1.0}, MASS), K)
    assert found["mlp"]["heaviest"] == "current"
    assert found["mlp"]["most_harmful"] == "embedding"
    assert found["mlp"]["dissociated"] is True
    assert found["self_attn"]["dissociated"] is False


@pytest.mark.parametrize(("effect", "width"), [(0.9 * MATTERS, 0.01), (2 * MATTERS, 3 * MATTERS)])
def test_no_verdict_on_effects_that_do_not_matter(effect, width):
    """Too small, or not told from zero."""
    found = dissociation(table({("mlp", "all", "embedding"): effect}, MASS, width), K)
    assert found["mlp"]["dissociated"] is None


def test_a_localised_role_is_named_where_it_is():
    harm = {
        ("self_attn", "late", "older"): 1.0,
        ("self_attn", "middle", "older"): 0.4,
        ("mlp", "early", "embedding"): 0.5,
    }
    found = {(m["family"], m["sublayer"], m["region"]): m for m in motifs(table(harm, MASS), K)}
    assert set(found) == {("older", "self_attn", "late"), ("embedding", "mlp", "early")}
    assert found["older", "self_attn", "late"]["harm_per_read"] == pytest.approx(0.5)
    assert not any(m["only_region"] for m in found.values())
    assert not any(m["adjusted"] for m in found.values())


def test_what_does_not_matter_is_no_motif():
    assert motifs(table({("mlp", "late", "current"): 1.9 * MATTERS}, MASS), K) == []  # two reads: 0.95 each
    assert motifs(table({("mlp", "late", "current"): 1.0}, MASS, width=1.5), K) == []
    assert motifs(table({("mlp", "late", "current"): -1.0}, MASS), K) == []  # masking helps: no harm
    assert motifs(table({}, MASS), K) == []


def test_other_kinds_of_rows_are_left_out():
    wrong = table({("mlp", "late", "current"): 1.0, ("mlp", "all", "current"): 1.0}, MASS)
    for column, value in (("positions", "query"), ("with_aliases", True), ("metric", "kl"), ("kind", "zero")):
        assert motifs(wrong.assign(**{column: value}), K) == []
        assert dissociation(wrong.assign(**{column: value}), K) == {}
