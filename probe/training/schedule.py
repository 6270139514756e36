"""When to probe: steps that a schedule names, and when motifs have settled; and what probes have cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


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


@dataclass
class Cost:
    """What the probes of a run have cost, beside the seconds that it trained. It decides nothing.

    Attributes:
        in_training: seconds of probes at steps of training.
        on_trail: seconds of those of the trail, when training has ended.
        after_training: seconds of the last one.
        on_curves: seconds of curves of behaviour and flow, on the trail, when training has ended.
        num_probed: probes in training.
        num_of_trail: probes of the trail.
        trained: seconds of all else, up to the last call of `train_until_now`.
    """

    in_training: float = 0.0
    on_trail: float = 0.0
    after_training: float = 0.0
    on_curves: float = 0.0
    num_probed: int = 0
    num_of_trail: int = 0
    trained: float = 0.0
    _since: float | None = None

    def start(self) -> None:
        """Training begins, or goes on."""
        self._since = time.perf_counter()

    @contextmanager
    def counted(self, part: str) -> Iterator[None]:
        """What is done inside counts as `part`, the name of an attribute, and not as training."""
        began = time.perf_counter()
        self.train_until_now(began)
        try:
            yield
        finally:
            self._since = time.perf_counter()
            setattr(self, part, getattr(self, part) + self._since - began)

    def train_until_now(self, now: float | None = None) -> None:
        """Bring `trained` up to date."""
        now = time.perf_counter() if now is None else now
        if self._since is not None:
            self.trained, self._since = self.trained + now - self._since, now

    @property
    def fraction(self) -> float | None:
        """Seconds of all probes before the last one, as a fraction of the seconds trained; None before any training."""
        return (self.in_training + self.on_trail) / self.trained if self.trained > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """For `summary.json`."""
        self.train_until_now()
        return {
            "in_training_seconds": self.in_training,
            "trail_seconds": self.on_trail,
            "after_training_seconds": self.after_training,
            "curves_seconds": self.on_curves,
            "training_seconds": self.trained,
            "fraction": self.fraction,
            "n_probed": self.num_probed,
            "n_of_trail": self.num_of_trail,
        }

    def __str__(self) -> str:
        """What probes have cost, in a line."""
        curves = f"; curves, {self.on_curves:.1f} s" if self.on_curves else ""
        return (
            f"probes: {self.num_probed} while training, {self.in_training:.1f} s; {self.num_of_trail} of the trail, "
            f"{self.on_trail:.1f} s; together {percent(self.fraction)} of training time; the last one, "
            f"{self.after_training:.1f} s{curves}"
        )

    def state_dict(self) -> dict[str, Any]:
        self.train_until_now()
        return {name: getattr(self, name) for name in COST_STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in COST_STATE:
            setattr(self, name, state.get(name, getattr(self, name)))


COST_STATE = ("in_training", "on_trail", "after_training", "on_curves", "num_probed", "num_of_trail", "trained")


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
