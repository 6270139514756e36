"""When motifs emerge: onset and half-rise of every route through a region, from the tables of a run's probes.

1. Take the exact effects (estimates are a curve of their own) at the steps that can be compared.
2. At each step, ask which routes are motifs (`Harm.holds`), and the same of resampled sequences: one bootstrap for all
   steps and curves. The margin to the mean distractor is asked, too.
3. Find when each route became a motif, and when effect, mass and accuracy made half of their change.
4. Set these times against each other. Intervals of times and lags are percentiles over the resamples; those of lags
   are also as wide as the probes are apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from attnres.sites import REGIONS, SUBLAYERS
from probe.analysis import onsets, stats
from probe.analysis.inference import Inference
from probe.analysis.motifs import Harm, Reader
from probe.vocabulary import (
    MARGIN,
    MARGIN_TO_MEAN,
    ROUTE,
    STUDY_MOTIFS,
    Route,
    harm_sign,
    primary_rows,
    routes_of,
    wide,
)

HALVES = ("effect_half", "mass_half", "accuracy_half")
LAGS = {
    "mass_effect": ("mass_half", "effect_half"),
    "effect_accuracy": ("effect_half", "accuracy_half"),
    "onset_accuracy": ("onset", "accuracy_half"),
    "first_held_accuracy": ("first_held", "accuracy_half"),
    "mass_accuracy": ("mass_half", "accuracy_half"),
}
"""Name -> how much later the first of the two times is than the second."""
MARGIN_ENDS = ("margin_low", "margin_high")
OVER_SEEDS = ("onset", *HALVES)
SPREAD = {"median": "median", "smallest": "min", "largest": "max"}
"""What is said of the times of several seeds, and how pandas calls it."""


@dataclass(frozen=True)
class Emergence:
    """When the motifs of one run emerged.

    Attributes:
        table: a row per route through a region that could be ablated, see `find_emergence`.
        curves: a row per step and route of a wide scope: `harm` (the fall of the margin, nats) with `harm_low` and
            `harm_high`; `harm_of_final`, as a share of the final margin, which exists at every step; `strength` with
            `strength_low` and `strength_high`, `no_strength` (why there is none), `detectable`, `mass` with `mass_low`
            and `mass_high`, `applicable`, and whether the motif's criterion `holds` at that step.
        accuracy: a row per step: `accuracy` on the probe split with `low` and `high`, clean `margin` with `margin_low`
            and `margin_high`, `size` of training examples.
        left_out: steps that take no part: probed on other sequences than the last one, or not in all regions.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    accuracy: pd.DataFrame
    left_out: tuple[int, ...] = ()

    @property
    def shown(self) -> pd.DataFrame:
        """The rows of `table` to speak of: the study's motifs, and any other that held at some probe."""
        return self.table[(self.table["motif"] != "") | (self.table["status"] != "never")]

    def to_dict(self) -> dict[str, Any]:
        """For `summary.json`."""
        half = [f"accuracy_half{end}" for end in ("", "_low", "_high")]
        found = {"steps": self.accuracy["step"].tolist(), "left_out": list(self.left_out)}
        found |= {name: float(self.table[name].iloc[0]) for name in half}
        return found | {"motifs": self.shown.drop(columns=["run", "condition", "seed", *half]).to_dict("records")}


def find_emergence(
    effects: pd.DataFrame,
    clusters: pd.DataFrame,
    sizes: pd.Series | None = None,
    how: Inference = Inference(),  # noqa: B008 (frozen)
    regions: Collection[str] = REGIONS,
) -> Emergence | None:
    """Find when motifs emerge in the tables of one run, probed at several steps.

    None where fewer than two steps can be compared, or where they have no route through a region in common that could
    be ablated.

    The rows of `table`, all times being probed steps and NaN "never":

    - `motif`: the study's name, or "".
    - `status`: "emerged" (it has an onset), "transient" (it held at some probe, not to the end), "never".
    - `onset`: there is one if the motif holds at some probe and at every later one, at least two, but for one miss. It
      is dated back over the probes just before, while the route matters by a test of its own (`Harm.matters`).
      The route began to matter after `onset_low`, the last probe at which that is refuted (else the first probe), and
      by `onset_high`, the upper percentile over the resamples that have an onset; `p_onset` is the share of those.
      `onset_to_mean` is the onset on the margin to the mean distractor, and
      `margins_agree` says that both margins have one, at most a probe apart, or neither.
    - `peak`: the largest harm as a share of the final margin, and `peak_step`; `final`: that of the last probe. NaN
      where the final margin is not clear of zero: a share of it would swap harm and benefit.
    - `first_held` (with `_low` and `_high`, as the onset's), `last_held`, `n_held` of `n_probes`: where it holds.
    - `size`, `accuracy`: at the onset, or at `first_held`; `effect_half_size`, `mass_half_size`,
      `accuracy_half_size`: size at the half-rises.
    - `effect_half`, `mass_half`, `accuracy_half` (each with `_low` and `_high`): the half-rise (`onsets.half_rise`);
      NaN where the 95 % interval of the whole change, `effect_change` or `mass_change`, includes zero.
    - `lag_mass_effect`, `lag_effect_accuracy`, `lag_mass_accuracy`, `lag_onset_accuracy`, `lag_first_held_accuracy`
      (each with `_low` and `_high`): how much later the first is than the second (`onsets.lag`).

    Args:
        sizes: of training examples (`train/size`) by step, where logged.
        regions: those that the model has. A motif is of one region as against all others.
    """
    primary = primary_rows(effects)
    rows = wide(primary)
    rows = rows[rows["run"].isin(primary["run"].iloc[-1:])]
    steps = _comparable_steps(rows, regions)
    if len(steps) < 2:
        return None
    left_out = tuple(sorted(int(step) for step in set(rows["step"]) - steps))
    rows = rows[rows["step"].isin(steps)]
    clusters = clusters[clusters["run"].isin(rows["run"]) & clusters["step"].isin(steps)]
    other = wide(primary_rows(effects, MARGIN_TO_MEAN))
    finder = _Finder(rows, other[other["run"].isin(rows["run"]) & other["step"].isin(steps)], clusters, sizes, how)
    if not finder.routes:
        return None
    holds, matters = finder.found(MARGIN)
    return Emergence(finder.table(holds, matters), finder.curves(holds), finder.accuracy(), left_out)


def _comparable_steps(rows: pd.DataFrame, regions: Collection[str]) -> set[int]:
    """Steps at which all `regions` were probed, on the sequences of the last of them."""
    probed = rows[rows["sublayer"].isin(SUBLAYERS)].groupby("step")["scope"].agg(set)
    whole = {step for step, scopes in probed.items() if scopes >= set(regions)}
    if not whole:
        return set()
    data_id = rows.loc[rows["step"] == max(whole), "data_id"].iloc[0]  # type: ignore[type-var]
    return set(rows.loc[rows["data_id"] == data_id, "step"]) & whole


@dataclass
class _Finder:
    """`find_emergence` on steps that can be compared. S probes, C routes, R resamples, n sequences.

    Attributes:
        grid: the routes that all probes have and that could be ablated at some; they share the multiplicity control.
        routes: those of them that can be motifs.
        answered: (n, S) right answers of each sequence; NaN where accuracy was not probed.
        margins: (n, S) summed clean margin.
        final_margin: mean clean margin at the last probe; NaN where it is not clear of zero.
    """

    effects: pd.DataFrame
    effects_to_mean: pd.DataFrame  # on the other margin
    clusters: pd.DataFrame
    sizes: pd.Series | None
    how: Inference

    def __post_init__(self) -> None:
        self.steps = np.sort(self.effects["step"].unique())
        probed = self.effects.groupby(ROUTE)["step"].nunique()  # a last probe may be of more
        applicable = dict.fromkeys(routes_of(self.effects[self.effects["applicable"]]))
        self.grid = [route for route in applicable if probed[route.key] == len(self.steps)]
        self.routes = [route for route in self.grid if route.sublayer in SUBLAYERS and route.scope in REGIONS]
        rows, correct = primary_rows(self.clusters), primary_rows(self.clusters, metric="accuracy")
        self.counts = rows.groupby("sequence")["n_queries"].first().to_numpy()
        rows = rows.assign(harm=harm_sign(MARGIN) * rows["summed_effect"])
        self.sequences = rows.pivot(index="sequence", columns=["step", *ROUTE], values=["harm", "mass"])
        margins = rows.groupby(["sequence", "step"])["summed_clean"].first().unstack()
        self.margins = margins[self.steps].to_numpy(float)
        last = stats.bootstrap_t(self.margins[:, -1:], self.counts, *self.how.resampling)
        self.final_margin = float(last.mean[0]) if last.interval()[0][0] > 0 else math.nan
        correct = correct.groupby(["sequence", "step"])["summed_clean"].first().unstack()
        self.answered = correct.reindex(index=self.sequences.index, columns=self.steps).to_numpy(float)
        # (R, n) how often each sequence is drawn: the one bootstrap of all intervals.
        self.weights = stats.resample_weights(len(self.counts), *self.how.resampling)

    def by_sequence(self, column: str, routes: Sequence[Route]) -> np.ndarray:
        """(n, C, S) `column` of the clusters of `routes`."""
        places = [(column, step, *route.key) for route in routes for step in self.steps]
        values = np.array(self.sequences[places], dtype=float, order="C")
        return values.reshape(len(values), len(routes), len(self.steps))

    def found(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(C, S) each: whether the causal probe finds the motif at a step, and whether the route matters by itself."""
        tables = self.effects if metric == MARGIN else self.effects_to_mean, self.clusters
        effects, clusters = (dict(list(table.groupby("step"))) for table in tables)
        found = np.zeros((2, len(self.routes), len(self.steps)), dtype=bool)
        for place, step in enumerate(self.steps):
            harm = Reader(effects[step], clusters[step], self.how, metric).harm()
            if harm is None:
                continue
            once = np.ones((1, len(harm.counts)))
            both = np.concatenate([harm.holds(once, self.how), harm.matters(once, self.how)])
            known = [(c, harm.routes.index(route)) for c, route in enumerate(self.routes) if route in harm.routes]
            for c, column in known:
                found[:, c, place] = both[:, column]
        return found[0], found[1]

    def resampled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(R, C, S) twice, the same on resampled sequences, and (C, S) whether it is shown not to matter."""
        sums = self.by_sequence("harm", self.grid)
        n_reads = self.effects.pivot(index="step", columns=ROUTE, values="n_reads")[[r.key for r in self.grid]]
        chosen = [self.grid.index(route) for route in self.routes]
        found = []
        for place, step in enumerate(self.steps):
            of_step = np.ascontiguousarray(sums[..., place]), self.margins[:, place], self.counts
            harm = Harm(self.grid, *of_step, n_reads.loc[step].to_numpy(float))
            both = (tested(self.weights, self.how)[:, chosen] for tested in (harm.holds, harm.matters))
            found.append((*both, harm.shown_not_to_matter(self.how)[chosen]))
        holds, matters, refuted = (np.stack(parts, axis=-1) for parts in zip(*found, strict=True))
        return holds, matters, refuted

    def _resample(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(R, ...) resampled means of `sums` (n, ...)."""
        means = self.weights @ sums.reshape(len(sums), -1) / (self.weights @ counts)[:, None]
        return means.reshape(-1, *sums.shape[1:])

    def _half(self, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Half-rise of the means of `sums` (n, C, S), (C,), and in each resample, (R, C); NaN without a change."""
        means = self._resample(sums, counts)
        low, high = onsets.percentiles(onsets.change(means))
        changes = (low > 0) | (high < 0)
        mean, resampled = onsets.half_rise(sums.sum(0) / counts.sum()), onsets.half_rise(means)
        return np.where(changes, mean, np.nan), np.where(changes, resampled, np.nan)

    def table(self, holds: np.ndarray, matters: np.ndarray) -> pd.DataFrame:
        """`Emergence.table`, from whether each route is a motif, and matters, at each step (C, S) each."""
        resampled, resampled_matters, refuted = self.resampled()
        effects, masses = (self.by_sequence(column, self.routes) for column in ("harm", "mass"))
        times = {  # in the sample, (C,), and in each resample, (R, C)
            "onset": (onsets.onset(holds, matters), onsets.onset(resampled, resampled_matters)),
            "first_held": (onsets.first(holds), onsets.first(resampled)),
            "effect_half": self._half(effects, self.counts),
            "mass_half": self._half(masses, np.ones(len(self.counts))),
            "accuracy_half": self._half(np.broadcast_to(self.answered[:, None], effects.shape), self.counts),
        }
        found = self._times(times)
        found["onset_high"] = np.fmax(found["onset"], found["onset_high"])
        found["onset_low"] = onsets.at_steps(onsets.last_before(times["onset"][0], refuted), self.steps)
        emerged = ~np.isnan(found["onset"])
        start = np.where(emerged, found["onset"], found["first_held"])
        columns: dict[str, Any] = {
            "motif": [str(route) if route in STUDY_MOTIFS else "" for route in self.routes],
            "status": np.select([emerged, holds.any(1)], ["emerged", "transient"], "never"),
            "p_onset": (~np.isnan(times["onset"][1])).mean(0),
            "last_held": onsets.at_steps(len(self.steps) - 1 - onsets.first(holds[:, ::-1]), self.steps),
            "n_held": holds.sum(1),
            "n_probes": len(self.steps),
            "size": self._size(start),
            "accuracy": self.accuracy().set_index("step")["accuracy"].reindex(start).to_numpy(),
        }
        columns |= {f"{name}_size": self._size(found[name]) for name in HALVES} | found
        to_mean = onsets.onset(*self.found(MARGIN_TO_MEAN))
        columns["onset_to_mean"] = onsets.at_steps(to_mean, self.steps)
        apart = np.abs(to_mean - times["onset"][0])
        columns["margins_agree"] = np.isnan(to_mean) == np.isnan(times["onset"][0])
        columns["margins_agree"] &= ~(apart > 1)
        harm = effects.sum(0) / self.counts.sum()
        of_final, has_final = harm / self.final_margin, not math.isnan(self.final_margin)
        columns |= {"peak": of_final.max(1), "final": of_final[:, -1]}
        columns["peak_step"] = self.steps[harm.argmax(1)] if has_final else math.nan
        columns["effect_change"] = onsets.change(harm)
        columns["mass_change"] = onsets.change(masses.mean(0))
        about = self.effects[["run", "condition", "seed"]].iloc[[0] * len(self.routes)].reset_index(drop=True)
        return pd.concat([about, pd.DataFrame(self.routes), pd.DataFrame(columns)], axis=1)

    def _times(self, times: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """Times as steps, the lags between them, and the intervals of those that are known."""
        found = {
            name: (onsets.at_steps(time, self.steps), *onsets.percentiles(onsets.at_steps(resampled, self.steps)))
            for name, (time, resampled) in times.items()
        }
        for name, (later, earlier) in LAGS.items():
            interval = onsets.lag(times[later][1], times[earlier][1], self.steps)
            found[f"lag_{name}"] = (found[later][0] - found[earlier][0], *interval)
        return {
            f"{name}{end}": np.where(np.isnan(values[0]), np.nan, value)
            for name, values in found.items()
            for end, value in zip(("", "_low", "_high"), values, strict=True)
        }

    def _size(self, steps: np.ndarray) -> list[float]:
        return [size_at(self.sizes, step) for step in steps]

    def curves(self, holds: np.ndarray) -> pd.DataFrame:
        strengths = ["strength", "strength_low", "strength_high", "no_strength", "detectable"]
        curves = self.effects[["step", *ROUTE, *strengths, "mass", "applicable"]].reset_index(drop=True)
        harm = harm_sign(MARGIN) * self.effects[["effect", "ci_low", "ci_high"]].to_numpy(float)
        harm[:, 1:] = np.sort(harm[:, 1:], axis=1)
        places = list(curves[["step", *ROUTE]].itertuples(index=False, name=None))
        masses = self._resample(self.sequences["mass"][places].to_numpy(float), np.ones(len(self.counts)))
        low, high = onsets.percentiles(masses)
        found = {(self.steps[s], *self.routes[c].key) for c, s in np.argwhere(holds)}
        columns: dict[str, Any] = dict(zip(("harm", "harm_low", "harm_high"), harm.T, strict=True))
        columns["harm_of_final"] = harm[:, 0] / self.final_margin
        held = [place in found for place in places]
        return curves.assign(**columns, mass_low=low, mass_high=high, holds=held)

    def accuracy(self) -> pd.DataFrame:
        columns: dict[str, Any] = {"step": self.steps}
        for name, ends, sums in (("accuracy", ("low", "high"), self.answered), ("margin", MARGIN_ENDS, self.margins)):
            columns[name] = sums.sum(0) / self.counts.sum()
            columns |= dict(zip(ends, onsets.percentiles(self._resample(sums, self.counts)), strict=True))
        return pd.DataFrame(columns).assign(size=self._size(self.steps))


def size_at(sizes: pd.Series | None, step: float) -> float:
    """Size of training examples at a step: the last that were logged by then, or before that the first; it grows.

    Args:
        sizes: by step; None or empty where nothing was logged, then NaN.
    """
    if sizes is None or sizes.empty or math.isnan(step):
        return math.nan
    until = sizes[sizes.index <= step]
    return float(until.iloc[-1] if len(until) else sizes.iloc[0])


def after_accuracy(row: Mapping[Any, Any]) -> tuple[str, float, float]:
    """Which time of a row of `table` is set against accuracy's half-rise, and its lag: an interval, in steps.

    The onset; where there is none, the first probe at which the motif held; where it never did, the effect's half-rise.
    """
    name = {"emerged": "onset", "transient": "first_held", "never": "effect"}[row["status"]]
    return name.replace("_", " "), row[f"lag_{name}_accuracy_low"], row[f"lag_{name}_accuracy_high"]


def over_seeds(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The `table`s of the seeds of one experiment: median, smallest and largest of each time.

    A row per condition and route that held at some probe of some seed or is the study's: `n_seeds`, `n_emerged`,
    `n_transient`, and each of `OVER_SEEDS` with each of `SPREAD`, over the seeds that have one.
    """
    groups = pd.concat(tables).groupby(["condition", *ROUTE, "motif"], sort=False)
    spreads = {f"{name}_{what}": (name, how) for name in OVER_SEEDS for what, how in SPREAD.items()}
    table = groups.agg(
        n_seeds=("status", "size"),
        n_emerged=("status", lambda status: (status == "emerged").sum()),
        n_transient=("status", lambda status: (status == "transient").sum()),
        **spreads,
    ).reset_index()
    return table[(table["motif"] != "") | (table["n_emerged"] + table["n_transient"] > 0)].reset_index(drop=True)
