"""What an intervention on a read is (`attnres.Intervention`): a class for each kind, with what all kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnres import FAMILIES, Read, ReadSite
from attnres.configuration_attnres import SOURCES
from probe.vocabulary import LABELS, check_names

NEEDS = (None, "partner", "mean", "priorities")
"""What an ablation's `Context` can hold for it."""
MIN_REMAINING = 1e-3
"""Positions with less than this weight left over are not applicable: renormalising would scale it by over 1,000."""


def source_mask(site: ReadSite, families: Sequence[str], with_aliases: bool = False) -> tuple[bool, ...]:
    """Which of the read's sources belong to `families` (with_aliases: or are the same tensor as one that does)."""
    mask = [name in families for name in site.families]
    if with_aliases and any(mask[i] for i in site.aliased_sources):
        for i in site.aliased_sources:
            mask[i] = True
    return tuple(mask)


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Context:
    """What an ablation may need beside the read itself. All tensors are of the clean batch.

    Attributes:
        positions: (batch, seq) bool, where to act; `None` for everywhere.
        references: "partner" -> by read index, the same read of another example; "mean" -> the read with its sources
            replaced by their means over the data.
        priorities: (batch, seq, reads, sources) random numbers, one draw for each sequence, for kinds that draw.
        view: takes a (batch, seq, ...) tensor to the part of the batch and sequence that is being run.
    """

    positions: Tensor | None = None
    references: Mapping[str, Mapping[int, Read]] = field(default_factory=dict)
    priorities: Tensor | None = None
    view: Callable[[Tensor], Tensor] = _same


@dataclass(frozen=True)
class Ablation(ABC):
    """Acts on families, at chosen reads and positions; elsewhere a read stays bit for bit what it was.

    Args:
        families: the source families.
        reads: indices of the reads at which to act.
        with_aliases: take sources that are the same tensor as one of the families' along.
        context: where to act, and what the kind needs beside the read.
        scope_reads: of kinds that act on `all_depths`, the reads of the route; `None`: `reads`.
    """

    families: Sequence[str]
    reads: frozenset[int]
    with_aliases: bool = False
    context: Context = Context()
    scope_reads: frozenset[int] | None = None

    kind: ClassVar[str]
    needs: ClassVar[str | None] = None  # which of `NEEDS` the context must hold
    attnres_sources: ClassVar[tuple[str, ...]] = SOURCES
    is_signed: ClassVar[bool] = False  # whether it may return weights below zero
    labels: ClassVar[tuple[str, ...]] = FAMILIES  # the sets of families that a grid of this kind is made of
    is_game: ClassVar[bool] = False  # whether its cells are values of a game over the families, not rows of a table
    can_be_estimated: ClassVar[bool] = True  # by integrated gradients
    all_depths: ClassVar[bool] = False  # whether it acts on all reads of the route's sublayers, whatever the scope
    baseline: ClassVar[type[Ablation] | None] = None  # the kind whose row over all layers its rows are read against
    known: ClassVar[dict[str, type[Ablation]]] = {}

    def __init_subclass__(cls) -> None:
        if "kind" not in cls.__dict__:
            return
        if cls.needs not in NEEDS:
            raise ValueError(f"kind '{cls.kind}' needs {cls.needs!r}: choose from {', '.join(map(str, NEEDS))}")
        check_names(f"label of kind '{cls.kind}'", cls.labels, LABELS)
        if place(cls) != place(known := cls.known.setdefault(cls.kind, cls)):
            raise ValueError(f"kind '{cls.kind}' of {place(cls)} is that of {place(known)}: choose another")
        cls.known[cls.kind] = cls

    @classmethod
    def check(cls, attnres_source: str) -> None:
        """Raise a ValueError if the kind means nothing on a model with these sources."""
        if attnres_source not in cls.attnres_sources:
            known = " or ".join(cls.attnres_sources)
            raise ValueError(f"kind '{cls.kind}' is for {known} sources; this model's are {attnres_source}")

    @abstractmethod
    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        """The read as it would be, and (batch, seq) bool: where that is possible.

        Weights and sources have the shape, dtype and device of the read's. Where it is possible they are finite, and no
        weight is below zero unless the kind `is_signed`.
        """

    def outcome(self, read: Read) -> tuple[Read, Tensor]:
        """What `ablated` returns. Raises ValueError if that cannot stand in the place of `read`.

        Values are not looked at, which would make a GPU wait at every read: the observer looks at those of the clean
        run (`check_values`), and the engine at every effect.
        """
        found: Any = self.ablated(read)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Read)):
            raise self.error(read.site, f"returned {_kind_of(found)}", "a Read and where that is possible")
        new, acts = found
        if not isinstance(new.sources, tuple) or len(new.sources) != len(read.sources):
            raise self.error(read.site, f"returned sources {_kind_of(new.sources)}", f"{len(read.sources)} tensors")
        pairs = [("routing_weights", new.routing_weights, read.routing_weights)]
        pairs += [(f"source {i}", *pair) for i, pair in enumerate(zip(new.sources, read.sources, strict=True))]
        for name, value, old in pairs:
            if value is not old and _layout(value) != _layout(old):
                raise self.error(read.site, f"returned {name} as {_kind_of(value)}", _kind_of(old))
        if _layout(acts) != _layout(everywhere(read)):
            expected = f"bool {tuple(read.routing_weights.shape[:-1])} on {read.routing_weights.device}"
            raise self.error(read.site, f"returned where it is possible as {_kind_of(acts)}", expected)
        return new._replace(site=read.site, stream=read.stream), acts

    def check_values(self, read: Read, new: Read, acts: Tensor) -> None:
        """Raise a ValueError if weights or sources, where `acts`, are not finite, or weights are negative."""
        weights = new.routing_weights[acts]
        moved = [value[acts] for value, old in zip(new.sources, read.sources, strict=True) if value is not old]
        if not all(bool(value.isfinite().all()) for value in (weights, *moved)):
            raise self.error(read.site, "returned weights or sources that are not finite", "finite ones where possible")
        if not self.is_signed and bool((weights < 0).any()):
            right = "weights of zero or more, or a kind with is_signed = True"
            raise self.error(read.site, f"returned a weight of {float(weights.min()):g}", right)

    def error(self, site: ReadSite, wrong: str, right: str) -> ValueError:
        """What is raised of the kind at a read."""
        read = f"read {site.index} ({site.sublayer}, layer {site.layer_idx})"
        return ValueError(f"kind '{self.kind}' ({type(self).__qualname__}) {wrong} at {read}: expected {right}")

    def chosen(self, site: ReadSite) -> tuple[bool, ...]:
        """Which of the read's sources are the families', as the kind takes them."""
        return source_mask(site, self.families, self.with_aliases)

    def exists_at(self, site: ReadSite) -> bool:
        """Whether there is something to act on at this read: by default, a family is there and something else too."""
        chosen = self.chosen(site)
        return any(chosen) and not all(chosen)

    def acts_at(self, site: ReadSite) -> bool:
        """Whether this read changes."""
        return site.index in self.reads and self.exists_at(site)

    def is_aliased(self, site: ReadSite) -> bool:
        """Whether one tensor is of the families and of another at this read: what is taken from the one stays reachable
        as the other, and what is kept of the one is kept of the other."""
        one_of_two = len({site.families[i] in self.families for i in site.aliased_sources}) == 2
        return not self.with_aliases and one_of_two

    def members(self, read: Read) -> Tensor:
        """(n,) bool: the read's sources that are acted on."""
        return torch.tensor(self.chosen(read.site), dtype=torch.bool, device=read.routing_weights.device)

    def reference(self, read: Read) -> Read:
        """The same read of the reference run that the kind needs."""
        assert self.needs is not None
        other, view = self.context.references[self.needs][read.site.index], self.context.view
        return Read(read.site, view(other.routing_weights), tuple(view(source) for source in other.sources))

    def __call__(self, read: Read) -> Read:
        if not self.acts_at(read.site):
            return read
        new, acts = self.outcome(read)
        if self.context.positions is not None:
            acts = acts & self.context.view(self.context.positions)
        acts = acts.unsqueeze(-1)
        sources = new.sources
        if sources is not read.sources:
            pairs = zip(sources, read.sources, strict=True)
            sources = tuple(old if value is old else torch.where(acts, value, old) for value, old in pairs)
        weights = torch.where(acts, new.routing_weights, read.routing_weights)
        return Read(read.site, weights, sources, stream=read.stream)


def place(cls: type) -> str:
    """Where a class is, as in my_module.Halve."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _layout(value: Any) -> tuple[Any, ...]:
    """What must be the same for one tensor to stand in the place of another."""
    return (value.dtype, value.device, value.layout, value.shape) if isinstance(value, Tensor) else ()


def _kind_of(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        sparse = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{sparse}{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return type(value).__name__


def everywhere(read: Read) -> Tensor:
    """(batch, seq) bool, all true."""
    return torch.ones(read.routing_weights.shape[:-1], dtype=torch.bool, device=read.routing_weights.device)


@dataclass(frozen=True)
class Together:
    """Several interventions at once, each on its own equal part of the batch (dimension 0)."""

    interventions: tuple[Ablation, ...]

    def __call__(self, read: Read) -> Read:
        if not any(read.site.index in each.reads for each in self.interventions):
            return read
        count = len(self.interventions)
        weights = read.routing_weights.chunk(count)
        sources = zip(*(source.chunk(count) for source in read.sources), strict=True) if read.sources else [()] * count
        others = [[None] * count if value is None else value.chunk(count) for value in (read.logits, read.stream)]
        parts = [Read(read.site, *part) for part in zip(weights, sources, *others, strict=True)]
        new = [each(part) for each, part in zip(self.interventions, parts, strict=True)]
        joined = tuple(
            old
            if all(n.sources[i] is p.sources[i] for n, p in zip(new, parts, strict=True))
            else torch.cat([n.sources[i] for n in new])
            for i, old in enumerate(read.sources)
        )
        return Read(read.site, torch.cat([n.routing_weights for n in new]), joined)
