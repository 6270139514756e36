"""When to probe: steps that a schedule names, what probes may cost, and when motifs have settled. Arithmetic alone."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

RECENT_STEPS = 20
"""Steps over which the present speed of training is taken."""
RECENT_PROBES = 5
"""Probes from whose cost that of the next one is foretold: their median, as one may have been disturbed."""
MARGIN = 1.1
"""Probes differ in cost; the next one is taken to cost this much more."""


@dataclass(frozen=True)
class Schedule:
    """Steps at which a run of known length is probed; step 0 and the last one always are.

    Args:
        every_n_steps: evenly spaced; 0 for none.
        log_spaced: also 1, 2, 4, 8, …
        at_steps: also these.
    """

    every_n_steps: int = 0
    log_spaced: bool = False
    at_steps: frozenset[int] = frozenset()

    def names(self, step: int, max_steps: int) -> bool:
        return (
            step in (0, max_steps)
            or (self.every_n_steps > 0 and step % self.every_n_steps == 0)
            or (self.log_spaced and step & (step - 1) == 0)
            or step in self.at_steps
        )

    def steps(self, max_steps: int) -> list[int]:
        """All that `names` names, in order."""
        found = {0, max_steps, *self.at_steps}
        if self.every_n_steps:
            found.update(range(0, max_steps, self.every_n_steps))
        if self.log_spaced:
            found.update(1 << exponent for exponent in range(max_steps.bit_length()))
        return sorted(step for step in found if step <= max_steps)

    def always(self, max_steps: int) -> list[int]:
        """Those before the last step that are probed whatever they cost: step 0, and what was asked for by name."""
        return sorted({0, *(step for step in self.at_steps if step < max_steps)})


@dataclass
class Budget:
    """What probes may cost while a run trains: a fraction of the seconds that it trains, probes left out.

    How long the run will train is not known before its end. It is *likely* to go on at the speed of its last steps; the
    *least* to be expected is the smaller of this and of what the mean speed so far comes to (under a curriculum steps
    become slower; a first compilation makes the mean useless). No probe may take all of them together above the
    fraction of the least, minus what is kept for those that are made in any case. A scheduled one must, besides, wait
    for its turn: after the i-th of n scheduled steps, i / n of what is likely to be there may be spent. One at an
    accuracy jump need not, and takes from what is left for later.

    Args:
        max_fraction: None for no limit.
        clock: seconds since anything.

    Attributes:
        spent: seconds of probes in training, those that are always made among them (`obligatory`).
        after_training: seconds of the probe after it, which is not limited.
        costs: seconds of each of the last probes.
        num_probed: probes in training.
        skipped: scheduled steps that were not probed.
    """

    max_fraction: float | None
    clock: Callable[[], float] = time.perf_counter
    spent: float = 0.0
    obligatory: float = 0.0
    after_training: float = 0.0
    num_probed: int = 0
    skipped: list[int] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    _trained: float = 0.0  # before the start
    _started: float | None = None
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS + 1))

    @property
    def training(self) -> float:
        """Seconds trained so far, before the run was resumed among them."""
        return self._trained + (0.0 if self._started is None else self.clock() - self._started)

    @property
    def fraction(self) -> float | None:
        """What has been spent, as a fraction of the seconds trained; None before any training."""
        training = self.training
        return self.spent / training if training > 0 else None

    def start(self) -> None:
        """Training begins, or goes on."""
        self._trained, self._started = self.training, self.clock()
        self._recent.clear()

    def step_done(self, step: int) -> None:
        """To be called once after every step."""
        self._recent.append((step, self.training))

    def add(self, step: int, seconds: float, obligatory: bool) -> None:
        """The last `seconds` were a probe's."""
        self._leave_out(seconds)
        self.spent += seconds
        self.obligatory += seconds * obligatory
        self.costs = [*self.costs, seconds][-RECENT_PROBES:]
        self.num_probed += 1
        self.skipped = [skipped for skipped in self.skipped if skipped != step]

    def add_after_training(self, seconds: float) -> None:
        """The last `seconds` were those of the probe after training."""
        self._leave_out(seconds)
        self.after_training += seconds

    def _leave_out(self, seconds: float) -> None:
        assert self._started is not None
        self._started += seconds

    def durations(self, step: int, max_steps: int) -> tuple[float, float]:
        """Seconds that the whole run will have trained, at least and likely, guessed after `step` > 0."""
        now = self.training
        mean = recent = now / step
        first_step, then = self._recent[0] if self._recent else (step, now)
        if first_step < step:
            recent = (now - then) / (step - first_step)
        return now + (max_steps - step) * min(mean, recent), now + (max_steps - step) * recent

    def allows(self, step: int, max_steps: int, schedule: Schedule, jump: bool = False) -> bool:
        """Whether a probe that need not be made can be, after `step` > 0; `jump`: at an accuracy jump."""
        if self.max_fraction is None:
            return True
        cost = MARGIN * median(self.costs) if self.costs else 0.0
        kept = cost * sum(later > step for later in schedule.always(max_steps))
        least, likely = (self.max_fraction * duration - kept for duration in self.durations(step, max_steps))
        if self.spent + cost > least:
            return False
        steps = schedule.steps(max_steps)[:-1]
        return jump or self.spent + cost <= likely * bisect_right(steps, step) / len(steps)

    def to_dict(self) -> dict[str, Any]:
        """For `summary.json`."""
        training = self.training  # now, for both
        return {
            "in_training_seconds": self.spent,
            "obligatory_seconds": self.obligatory,
            "training_seconds": training,
            "fraction": self.spent / training if training > 0 else None,
            "max_probe_fraction": self.max_fraction,
            "n_probed": self.num_probed,
            "skipped_steps": self.skipped,
            "after_training_seconds": self.after_training,
        }

    def __str__(self) -> str:
        """What probes have cost, in a line; that it was too much, if it was."""
        fraction = self.fraction
        text = (
            f"probes: {self.num_probed} while training, {self.spent:.1f} s, {percent(fraction)} of training time; "
            f"one after it, {self.after_training:.1f} s"
        )
        if self.skipped:
            text += f"; scheduled steps skipped: {len(self.skipped)}"
        if fraction is not None and self.max_fraction is not None and fraction > self.max_fraction:
            text += (
                f". This is more than probe.max_probe_fraction, {percent(self.max_fraction)}: step 0 and those of "
                f"probe.at_steps, probed whatever it costs, took {self.obligatory:.1f} s"
            )
        return text

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in BUDGET_STATE} | {"training": self.training}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in BUDGET_STATE:
            setattr(self, name, state[name])
        self._trained, self._started = state["training"], None


BUDGET_STATE = ("spent", "obligatory", "after_training", "num_probed", "skipped", "costs")


def percent(fraction: float | None) -> str:
    return "?" if fraction is None else f"{100 * fraction:.3g} %"


@dataclass
class Settled:
    """Whether a model has learned its task and its motifs have stayed the same over some probes in a row.

    Args:
        num_probes: how many.

    Attributes:
        motifs: (sublayer, scope, family) of each motif at the last probe.
        count: probes in a row, up to the last one, that have found these; 0 where there are none.
    """

    num_probes: int
    motifs: list[list[str]] = field(default_factory=list)
    count: int = 0

    @property
    def is_settled(self) -> bool:
        return self.count >= self.num_probes

    def update(self, motifs: Iterable[Sequence[str]], task_learned: bool) -> None:
        """The motifs of one more probe."""
        found = sorted(list(motif) for motif in motifs) if task_learned else []
        self.count = 0 if not found else self.count + 1 if found == self.motifs else 1
        self.motifs = found

    def state_dict(self) -> dict[str, Any]:
        return {"motifs": self.motifs, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.motifs, self.count = [list(motif) for motif in state["motifs"]], state["count"]
