"""When motifs emerge: onset and half-rise of every route through a region, from the tables of a run's probes.

1. Take the exact effects (first-order points are a curve of their own) at the steps that can be compared: all regions
   were probed, on the sequences of the last such probe.
2. At each step, ask which routes are motifs (`Reader.motifs`).
3. Resample the sequences, once: all steps and curves share the resamples. Ask the same of each resample, with the
   critical values of the sample (`resampled_criterion`).
4. From the answers, find when each route became a motif: its onset, or else where it held for a time.
5. Find when effect, mass and accuracy made half of their change; where the interval of the whole change includes
   zero, there was none.
6. Set these times against each other. Intervals of times and lags are percentiles over the resamples; those of lags
   are also as wide as the probes are apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from attnres.sites import REGIONS, SUBLAYERS
from probe.analysis import onsets, stats
from probe.analysis.motifs import Reader, resampled_criterion
from probe.vocabulary import ROUTE, STUDY_MOTIFS, Route, primary_rows, routes_of, wide

HALVES = ("effect_half", "mass_half", "accuracy_half")
LAGS = {
    "mass_effect": ("mass_half", "effect_half"),
    "effect_accuracy": ("effect_half", "accuracy_half"),
    "onset_accuracy": ("onset", "accuracy_half"),
    "first_held_accuracy": ("first_held", "accuracy_half"),
    "mass_accuracy": ("mass_half", "accuracy_half"),
}
"""Name -> how much later the first of the two times is than the second."""
OVER_SEEDS = ("onset", *HALVES)
SPREAD = {"median": "median", "smallest": "min", "largest": "max"}
"""What is said of the times of several seeds, and how pandas calls it."""


@dataclass(frozen=True)
class Emergence:
    """When the motifs of one run emerged.

    Attributes:
        table: a row per route through a region that could be ablated, see `find_emergence`.
        curves: a row per step and route of a wide scope: `effect` with `ci_low` and `ci_high` (nats), `mass` with
            `mass_low` and `mass_high`, `applicable`, and whether the motif's criterion `holds` at that step.
        accuracy: a row per step: `accuracy` on the probe split with `low` and `high`, `pairs` in training.
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
        found: dict[str, Any] = {"steps": [int(step) for step in self.accuracy["step"]]}
        found |= {"left_out": list(self.left_out)} | {name: float(self.table[name].iloc[0]) for name in half}
        return found | {"motifs": self.shown.drop(columns=["run", "condition", "seed", *half]).to_dict("records")}


def find_emergence(
    effects: pd.DataFrame,
    clusters: pd.DataFrame,
    num_pairs: int,
    pairs: pd.Series | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    regions: Collection[str] = REGIONS,
) -> Emergence | None:
    """Find when motifs emerge in the tables of one run, probed at several steps.

    None where fewer than two steps can be compared, or where they have no route through a region in common that could
    be ablated.

    The rows of `table`, all times being probed steps and NaN "never":

    - `motif`: the study's name, or "".
    - `status`: "emerged" (it has an onset), "transient" (it held at some probe, not to the end), "never".
    - `onset`: the first probe from which the motif holds at every later one, at least two of them. `onset_low` and
      `onset_high` are the interval over the resamples that have one, and `p_onset` is the share of resamples that do.
    - `first_held` (with `_low` and `_high`, as the onset's), `last_held`, `n_held` of `n_probes`: where it holds.
    - `pairs`, `accuracy`: at the onset, or at `first_held`; `effect_half_pairs`, `mass_half_pairs`,
      `accuracy_half_pairs`: pairs at the half-rises.
    - `effect_half`, `mass_half`, `accuracy_half` (each with `_low` and `_high`): the half-rise (`onsets.half_rise`);
      NaN where the 95 % interval of the whole change, `effect_change` or `mass_change`, includes zero.
    - `lag_mass_effect`, `lag_effect_accuracy`, `lag_mass_accuracy`, `lag_onset_accuracy`, `lag_first_held_accuracy`
      (each with `_low` and `_high`): how much later the first is than the second (`onsets.lag`).

    Args:
        effects, clusters: the tables of the probes.
        num_pairs: K.
        pairs: pairs in training by step, where logged.
        num_resamples, seed: of the bootstraps.
        regions: those that the model has. A motif is of one region as against all others.
    """
    rows = wide(primary_rows(effects))
    if rows.empty:
        return None
    run = primary_rows(effects)["run"].iloc[-1]
    rows = rows[rows["run"] == run]
    steps = _comparable_steps(rows, regions)
    if len(steps) < 2:
        return None
    left_out = tuple(sorted(int(step) for step in set(rows["step"]) - steps))
    rows = rows[rows["step"].isin(steps)]
    clusters = clusters[(clusters["run"] == run) & clusters["step"].isin(steps)]
    finder = _Finder(rows, clusters, num_pairs, pairs, num_resamples, seed)
    return finder.find(left_out) if finder.routes else None


def _comparable_steps(rows: pd.DataFrame, regions: Collection[str]) -> set[int]:
    """Steps at which all `regions` were probed, on the sequences of the last of them."""
    probed = rows[rows["sublayer"].isin(SUBLAYERS)].groupby("step")["scope"].agg(set)
    whole = {step for step, scopes in probed.items() if scopes >= set(regions)}
    if not whole:
        return set()
    data_id = rows.loc[rows["step"] == max(whole), "data_id"].iloc[0]  # type: ignore[type-var]
    return set(rows.loc[rows["data_id"] == data_id, "step"]) & whole


class _Event(NamedTuple):
    """A time, and what it is in each resample, (R,)."""

    time: float
    resampled: np.ndarray


@dataclass
class _Finder:
    """`find_emergence` on steps that can be compared. S probes, C routes, R resamples, n sequences.

    Attributes:
        grid: the routes that all probes have and that could be ablated at some; they share the multiplicity control.
        routes: those of them that can be motifs.
    """

    effects: pd.DataFrame
    clusters: pd.DataFrame
    num_pairs: int
    pairs: pd.Series | None
    num_resamples: int
    seed: int

    def __post_init__(self) -> None:
        self.steps = np.sort(self.effects["step"].unique())
        probed = self.effects.groupby(ROUTE)["step"].nunique()  # a last probe may be of more
        applicable = dict.fromkeys(routes_of(self.effects[self.effects["applicable"]]))
        self.grid = [route for route in applicable if probed[route.key] == len(self.steps)]
        self.routes = [route for route in self.grid if route.sublayer in SUBLAYERS and route.scope in REGIONS]
        rows = primary_rows(self.clusters)
        self.counts = rows.groupby("sequence")["n_queries"].first().to_numpy()
        self.sequences = rows.pivot(index="sequence", columns=["step", *ROUTE], values=["summed_effect", "mass"])
        # (R, n) how often each sequence is drawn: the one bootstrap of all intervals.
        self.weights = stats.resample_weights(len(self.counts), self.num_resamples, self.seed)

    def by_sequence(self, column: str, route: Route) -> np.ndarray:
        """(n, S) `column` of a route's clusters."""
        return np.stack([self.sequences[(column, step, *route.key)].to_numpy(float) for step in self.steps], axis=1)

    @cached_property
    def answered(self) -> np.ndarray | None:
        """(n, S) right answers of each sequence; None where accuracy was not probed."""
        rows = primary_rows(self.clusters, metric="accuracy").drop_duplicates(["step", "sequence"])
        if rows.empty:
            return None
        return rows.pivot(index="sequence", columns="step", values="summed_clean")[self.steps].to_numpy(float)

    def find(self, left_out: tuple[int, ...]) -> Emergence:
        holds, resampled = self._holds(), self._resampled_holds()
        accuracy_half = _Event(math.nan, np.full(self.num_resamples, np.nan))
        if self.answered is not None:
            accuracy_half = self._half(self.answered, self.counts)
        rows = [self._row(route, holds[:, i], resampled[..., i], accuracy_half) for i, route in enumerate(self.routes)]
        return Emergence(pd.DataFrame(rows), self._curves(holds), self._accuracy(), left_out)

    def _holds(self) -> np.ndarray:
        """(S, C) whether the causal probe finds the motif at a step."""
        effects, clusters = (dict(list(table.groupby("step"))) for table in (self.effects, self.clusters))
        found = np.zeros((len(self.steps), len(self.routes)), dtype=bool)
        for holds, step in zip(found, self.steps, strict=True):
            reader = Reader(effects[step], clusters[step], self.num_pairs, self.num_resamples, self.seed)
            motifs = {Route.of(motif) for motif in reader.motifs()}
            holds[:] = [route in motifs for route in self.routes]
        return found

    def _resampled_holds(self) -> np.ndarray:
        """(R, S, C) the same criterion on resampled effects, with the critical values of the sample."""
        sums = np.stack([self.by_sequence("summed_effect", route) for route in self.grid], axis=-1)  # (n, S, grid)
        n_reads = self.effects.pivot(index="step", columns=ROUTE, values="n_reads")[[r.key for r in self.grid]]
        chosen = [self.grid.index(route) for route in self.routes]
        found = [
            resampled_criterion(
                sums[:, number],
                self.counts,
                self.grid,
                n_reads.loc[step].to_numpy(float),
                self.num_pairs,
                self.weights,
                self.num_resamples,
                self.seed,
            )[:, chosen]
            for number, step in enumerate(self.steps)
        ]
        return np.stack(found, axis=1)

    def _half(self, sums: np.ndarray, counts: np.ndarray) -> _Event:
        """Half-rise of the mean of `sums` (n, S); NaN if there is no change."""
        means = self._resample(sums, counts)
        low, high = onsets.percentiles(onsets.change(means), onsets.change(means))
        if not (low > 0 or high < 0):
            return _Event(math.nan, np.full(self.num_resamples, np.nan))
        return _Event(float(onsets.half_rise(sums.sum(0) / counts.sum())), onsets.half_rise(means))

    def _resample(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(R, S) resampled means of `sums` (n, S)."""
        return (self.weights @ sums) / (self.weights @ counts)[:, None]

    def _row(self, route: Route, holds: np.ndarray, resampled: np.ndarray, accuracy_half: _Event) -> dict[str, Any]:
        """The row of `table`, from whether the route is a motif at each step (S,) and in each resample (R, S)."""
        effects, masses = self.by_sequence("summed_effect", route), self.by_sequence("mass", route)
        events = {
            "onset": _Event(float(onsets.first_lasting(holds)), onsets.first_lasting(resampled)),
            "first_held": _Event(float(onsets.first(holds)), onsets.first(resampled)),
            "effect_half": self._half(effects, self.counts),
            "mass_half": self._half(masses, np.ones(len(self.counts))),
            "accuracy_half": accuracy_half,
        }
        first = self.effects.iloc[0]
        row: dict[str, Any] = {"run": first["run"], "condition": first["condition"], "seed": int(first["seed"])}
        row |= asdict(route)
        row |= {"motif": str(route) if route in STUDY_MOTIFS else ""}
        row |= self._held(holds, events) | self._times(events)
        row |= {"effect_change": float(onsets.change(effects.sum(0) / self.counts.sum()))}
        return row | {"mass_change": float(onsets.change(masses.mean(0)))}

    def _held(self, holds: np.ndarray, events: Mapping[str, _Event]) -> dict[str, Any]:
        """Where the motif holds, and what there was then."""
        onset, first_held = events["onset"], events["first_held"]
        start = first_held.time if math.isnan(onset.time) else onset.time
        accuracy = math.nan
        if self.answered is not None and holds.any():
            accuracy = float(self.answered[:, int(start)].sum() / self.counts.sum())
        row = {
            "status": "never" if not holds.any() else "transient" if math.isnan(onset.time) else "emerged",
            "p_onset": float((~np.isnan(onset.resampled)).mean()),
            "last_held": float(self.steps[holds][-1]) if holds.any() else math.nan,
            "n_held": int(holds.sum()),
            "n_probes": len(self.steps),
            "pairs": self._pairs(start),
            "accuracy": accuracy,
        }
        return row | {f"{name}_pairs": self._pairs(events[name].time) for name in HALVES}

    def _times(self, events: Mapping[str, _Event]) -> dict[str, float]:
        """Times, the lags between them, and their intervals."""
        row: dict[str, float] = {}
        for name, (time, resampled) in events.items():
            low, high = onsets.UNKNOWN if math.isnan(time) else onsets.interval(resampled, self.steps)
            row |= {name: onsets.at_step(time, self.steps), f"{name}_low": low, f"{name}_high": high}
        for name, (later, earlier) in LAGS.items():
            gap = row[later] - row[earlier]
            resampled = events[later].resampled, events[earlier].resampled
            low, high = onsets.UNKNOWN if math.isnan(gap) else onsets.lag(*resampled, self.steps)
            row |= {f"lag_{name}": gap, f"lag_{name}_low": low, f"lag_{name}_high": high}
        return row

    def _pairs(self, time: float) -> float:
        return pairs_at(self.pairs, onsets.at_step(time, self.steps))

    def _curves(self, holds: np.ndarray) -> pd.DataFrame:
        columns = ["step", *ROUTE, "effect", "ci_low", "ci_high", "mass", "applicable"]
        curves = self.effects[columns].reset_index(drop=True)
        places = list(curves[["step", *ROUTE]].itertuples(index=False, name=None))
        masses = self._resample(self.sequences["mass"][places].to_numpy(float), np.ones(len(self.counts)))
        low, high = onsets.percentiles(masses, masses)
        found = {(self.steps[s], *self.routes[c].key) for s, c in np.argwhere(holds)}
        return curves.assign(mass_low=low, mass_high=high, holds=[place in found for place in places])

    def _accuracy(self) -> pd.DataFrame:
        mean = low = high = np.full(len(self.steps), np.nan)
        if self.answered is not None:
            mean, resampled = self.answered.sum(0) / self.counts.sum(), self._resample(self.answered, self.counts)
            low, high = onsets.percentiles(resampled, resampled)
        pairs = [pairs_at(self.pairs, float(step)) for step in self.steps]
        return pd.DataFrame({"step": self.steps, "accuracy": mean, "low": low, "high": high, "pairs": pairs})


def pairs_at(pairs: pd.Series | None, step: float) -> float:
    """Pairs in training at a step: the last that were logged by then, or before that the first; pairs grow.

    Args:
        pairs: by step; None or empty where nothing was logged, then NaN.
    """
    if pairs is None or pairs.empty or math.isnan(step):
        return math.nan
    until = pairs[pairs.index <= step]
    return float(until.iloc[-1] if len(until) else pairs.iloc[0])


def after_accuracy(row: Mapping[Any, Any]) -> tuple[str, float, float]:
    """Which time of a row of `table` is set against accuracy's half-rise, and its lag: an interval, in steps.

    The onset; where there is none, the first probe at which the motif held; where it never did, the effect's half-rise.
    """
    name = {"emerged": "onset", "transient": "first_held", "never": "effect"}[row["status"]]
    return name.replace("_", " "), row[f"lag_{name}_accuracy_low"], row[f"lag_{name}_accuracy_high"]


def over_seeds(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The `table`s of the seeds of one experiment: median, smallest and largest of each time.

    A row per condition and route that held at some probe of some seed or is the study's: `n_seeds`, `n_emerged`,
    `n_transient`, and `{onset, effect_half, mass_half, accuracy_half}_{median, smallest, largest}` over the seeds that
    have one.
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
