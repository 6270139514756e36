"""Two probes of the same sequences: differences of strengths, which no scale of logits changes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from probe.analysis import stats
from probe.analysis.compare import compare
from probe.analysis.inference import Inference
from probe.vocabulary import FAMILIES, MARGIN, REGIONS, Route

HOW = Inference(num_resamples=500)
ROUTES = [Route("mlp", scope, family) for scope in REGIONS for family in FAMILIES]
QUERIES, NUM_SEQUENCES, FLOOR = 8, 64, 1e-5


def probe(sums: np.ndarray, margins: np.ndarray, scale: float = 1.0, metric: str = MARGIN) -> SimpleNamespace:
    """What `compare` takes, of summed effects (sequences, routes) and summed clean margins."""
    cells = pd.DataFrame(ROUTES[: sums.shape[1]]).assign(
        run="r", step=0, kind="mask_renormalise", positions="all", with_aliases=False, metric=metric
    )
    clusters = cells.loc[cells.index.repeat(len(sums))].assign(
        sequence=np.tile(np.arange(len(sums)), len(cells)),
        n_queries=QUERIES,
        summed_clean=np.tile(scale * margins, len(cells)),
        summed_effect=scale * sums.T.ravel(),
    )
    return SimpleNamespace(
        directory=Path("p"), effects=cells.assign(data_id="d", floor=scale * FLOOR), clusters=clusters
    )


def data(seed: int = 0, cells: int = 6, n: int = NUM_SEQUENCES) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    margins = QUERIES * rng.normal(8, 2, n)
    return -np.linspace(0, 0.3, cells) * margins[:, None] + QUERIES * rng.normal(size=(n, cells)), margins


@pytest.mark.parametrize("scale", [0.25, 4.0, 3.7])
def test_a_model_whose_logits_are_scaled_differs_from_itself_nowhere(scale):
    sums, margins = data()
    rows = compare(probe(sums, margins), probe(sums, margins, scale), HOW)
    assert (rows["unit"] == "of margin").all()
    np.testing.assert_allclose(rows["a"], -sums.sum(0) / margins.sum())
    np.testing.assert_allclose(rows["difference"], 0, atol=1e-12)
    assert (rows["p_adjusted"] == 1).all()
    in_nats = compare(probe(sums, margins, 1.0, "nll"), probe(sums, margins, scale, "nll"), HOW)
    assert (in_nats["p_adjusted"] < 0.05).any()  # the scale of another model's logits, taken for an effect


def test_differences_are_those_of_strengths_and_intervals_cover_them():
    """Against strengths of each resampled set of sequences: the difference, its error, and the p-values' decision."""
    (sums, margins), (others, other_margins) = data(0), data(1)
    rows = compare(probe(sums, margins), probe(others, 2.5 * other_margins), HOW)
    difference = -others.sum(0) / (2.5 * other_margins).sum() + sums.sum(0) / margins.sum()
    np.testing.assert_allclose(rows["difference"], difference)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        i = rng.integers(0, len(sums), len(sums))
        drawn.append(-others[i].sum(0) / (2.5 * other_margins)[i].sum() + sums[i].sum(0) / margins[i].sum())
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    width = high - low
    assert (np.abs(rows["ci_low"] - low) < 0.15 * width).all()
    assert (np.abs(rows["ci_high"] - high) < 0.15 * width).all()


def test_in_a_degenerate_grid_real_differences_are_found_and_rounding_is_not(monkeypatch):
    """`current` of a trained model against the wrapped one, beside cells of two sequences and of rounding."""
    rng = np.random.default_rng(2)
    sums, margins = data(cells=12)
    others = sums.copy()
    others[:, 0] -= QUERIES * (0.37 + 0.3 * rng.normal(size=NUM_SEQUENCES))  # 10 standard errors
    for cell in range(1, 6):
        others[rng.choice(NUM_SEQUENCES, 2, replace=False), cell] += 3.0
    others[:, 6:] += QUERIES * 1e-7 * rng.uniform(0.9, 1.1, size=(NUM_SEQUENCES, 6))  # of one sign
    rows = compare(probe(sums, margins), probe(others, margins), HOW)
    assert rows["p_adjusted"].iloc[0] <= 0.01
    assert (rows["p_adjusted"].iloc[1:6] > 0.05).all()
    assert (rows["p_adjusted"].iloc[6:] == 1).all()
    monkeypatch.setattr(stats, "COLLAPSED", 0.0)
    assert compare(probe(sums, margins), probe(others, margins), HOW)["p_adjusted"].iloc[0] > 0.05


def test_without_a_strength_it_is_effects_that_are_compared():
    sums, margins = data()
    rows = compare(probe(sums, margins), probe(sums - QUERIES, -margins), HOW)
    assert (rows["unit"] == "of effect").all()
    np.testing.assert_allclose(rows["difference"], -1)


def test_whether_there_is_a_strength_is_asked_as_in_the_rows():
    """Of a margin at the edge of having one, by the resamples that were asked for."""
    sums, margins = data()
    spread = margins - margins.mean()
    margins = spread + 2.0 * spread.std() / np.sqrt(NUM_SEQUENCES)
    units = set()
    for seed in range(8):
        how = Inference(num_resamples=79, seed=seed)
        low = stats.bootstrap_t(margins[:, None], np.full(NUM_SEQUENCES, QUERIES), 79, seed).interval()[0][0]
        rows = compare(probe(sums, margins), probe(sums, margins), how)
        assert (rows["unit"] == ("of margin" if low > 0 else "of effect")).all()
        units |= set(rows["unit"])
    assert len(units) == 2


def test_sequences_are_paired_by_their_ids_whatever_their_order():
    (sums, margins), (others, other_margins) = data(0), data(1)
    a, b = probe(sums, margins), probe(others, other_margins)
    rng, straight = np.random.default_rng(3), compare(a, b, HOW)
    b.clusters = b.clusters.sample(frac=1, random_state=rng)
    renamed = {old: 1000 - 7 * old for old in range(NUM_SEQUENCES)}
    for run in (a, b):
        run.clusters["sequence"] = run.clusters["sequence"].map(renamed)
    named = compare(a, b, HOW)
    columns = ["a", "b", "difference"]
    np.testing.assert_allclose(named[columns], straight[columns])


def changed(column: str, change) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Two probes of the same sequences, the second with a column of its clusters changed."""
    sums, margins = data()
    a, b = probe(sums, margins), probe(sums, margins)
    b.directory = Path("q")
    b.clusters = (
        change(b.clusters.reset_index(drop=True))
        if column == ""
        else b.clusters.assign(**{column: change(b.clusters[column].to_numpy(float, copy=True))})
    )
    return a, b


def at(place: int, value: float):
    def change(values: np.ndarray) -> np.ndarray:
        values[place] = value
        return values

    return change


APART = "p and q do not hold the same sequences: "
TORN = "the clusters of q are not whole: "


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("sequence", lambda ids: ids + 64, APART + "0 are in both, 128 in one alone (such as 0"),
        ("sequence", lambda ids: ids + 1, APART + "63 are in both, 2 in one alone (such as 0"),
        ("", lambda rows: rows[rows["sequence"] != 5], APART + "63 are in both, 1 in one alone (such as 5"),
        ("n_queries", lambda n: n + 1, "p and q differ in the queries of sequence 0 (8 and 9"),
        ("n_queries", lambda n: 0 * n, TORN + "sequence 0 has 0.0 to 0.0 queries, expected one number of at least 1"),
        ("n_queries", lambda n: -n, TORN + "sequence 0 has -8.0 to -8.0 queries"),
        ("n_queries", lambda n: n * np.nan, TORN + "sequence 0 has nan to nan queries"),
        ("n_queries", at(9, 7), TORN + "sequence 9 has 7.0 to 8.0 queries"),
        ("summed_effect", at(3, np.nan), TORN + "a cell lacks the effect of a sequence"),
        ("summed_effect", at(3, np.inf), TORN + "a cell lacks the effect of a sequence, or has one that is not finite"),
        ("", lambda rows: pd.concat([rows, rows[:1]]), TORN + "a cell has two effects of one sequence"),
        ("", lambda rows: rows.drop(index=70), TORN + "a cell lacks the effect of a sequence"),
    ],
)
def test_what_cannot_be_paired_is_refused_in_one_line(column, change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        compare(*changed(column, change), HOW)
    assert "\n" not in str(error.value)


def test_other_data_are_refused():
    a, b = probe(*data()), probe(*data())
    b.effects = b.effects.assign(data_id="other")
    with pytest.raises(ValueError, match=r"were not probed on the same examples \(data_id d and other\)"):
        compare(a, b, HOW)
