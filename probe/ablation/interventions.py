"""Interventions on a read (`attnres.Intervention`), one small class for each kind.

Your own is a subclass of `Ablation` with a `kind` and the method `ablated`. Defining the class makes its kind known:

    class Halve(Ablation):
        kind = "halve"

        def ablated(self, read):
            members = self.members(read)
            weights = torch.where(members, read.routing_weights / 2, read.routing_weights)
            return read._replace(routing_weights=weights), everywhere(read)

Settings name it by its kind, or, where nothing has imported it yet, by its place: `kinds: [my_module.Halve]`.
"""

from __future__ import annotations

import importlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attnres import FAMILIES, Read, ReadSite
from probe.vocabulary import ALL, check_names

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
    """

    families: Sequence[str]
    reads: frozenset[int]
    with_aliases: bool = False
    context: Context = Context()

    kind: ClassVar[str]
    needs: ClassVar[str | None] = None  # "partner", "mean" or "priorities": what `context` must hold
    attnres_sources: ClassVar[tuple[str, ...]] = ("cumulative", "block_sum")
    labels: ClassVar[tuple[str, ...]] = FAMILIES  # the sets of families that a grid of this kind is made of
    is_game: ClassVar[bool] = False  # whether its cells are values of a game over the families, not rows of a table
    known: ClassVar[dict[str, type[Ablation]]] = {}

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            cls.known[cls.kind] = cls

    @classmethod
    def check(cls, attnres_source: str) -> None:
        """Raise a ValueError if the kind means nothing on a model with these sources."""
        if attnres_source not in cls.attnres_sources:
            known = " or ".join(cls.attnres_sources)
            raise ValueError(f"kind '{cls.kind}' is for {known} sources; this model's are {attnres_source}")

    @abstractmethod
    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        """The read as it would be, and (batch, seq) bool: where that is possible."""

    def exists_at(self, site: ReadSite) -> bool:
        """Whether there is something to act on at this read: by default, a family is there and something else too."""
        mask = source_mask(site, self.families, self.with_aliases)
        return any(mask) and not all(mask)

    def is_aliased(self, site: ReadSite) -> bool:
        """Whether what is taken away at this read stays reachable as another family."""
        one_of_two = len({site.families[i] in self.families for i in site.aliased_sources}) == 2
        return not self.with_aliases and one_of_two

    def members(self, read: Read) -> Tensor:
        """(n,) bool: the read's sources that are acted on."""
        return torch.tensor(
            source_mask(read.site, self.families, self.with_aliases), device=read.routing_weights.device
        )

    def reference(self, read: Read) -> Read:
        """The same read of the reference run that the kind needs."""
        assert self.needs is not None
        other, view = self.context.references[self.needs][read.site.index], self.context.view
        return Read(read.site, view(other.routing_weights), tuple(view(source) for source in other.sources))

    def __call__(self, read: Read) -> Read:
        if read.site.index not in self.reads or not self.exists_at(read.site):
            return read
        new, acts = self.ablated(read)
        if self.context.positions is not None:
            acts = acts & self.context.view(self.context.positions)
        acts = acts.unsqueeze(-1)
        sources = new.sources
        if sources is not read.sources:
            pairs = zip(sources, read.sources, strict=True)
            sources = tuple(
                old if value is old else torch.where(acts, value.to(old.dtype), old) for value, old in pairs
            )
        return Read(read.site, torch.where(acts, new.routing_weights, read.routing_weights), sources)


def everywhere(read: Read) -> Tensor:
    """(batch, seq) bool, all true."""
    return torch.ones(read.routing_weights.shape[:-1], dtype=torch.bool, device=read.routing_weights.device)


class MaskRenormalise(Ablation):
    """Set the families' weights to zero and scale the rest back to sum to one.

    The read moves by `alpha / (1 - alpha) * (h - mean source of the families)`: the dose grows with the mass `alpha`.
    Not possible at a position where less than `MIN_REMAINING` would be left.

    It misleads where another source holds the same content: with cumulative sources every source contains the ones
    before it, so that masking `embedding` re-weights the embedding's content and never removes it. Two families that
    stand in for each other both look idle.
    """

    kind = "mask_renormalise"

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        weights = read.routing_weights.masked_fill(self.members(read), 0.0)
        remaining = weights.sum(-1)
        weights = weights / remaining.clamp_min(MIN_REMAINING).unsqueeze(-1)
        return read._replace(routing_weights=weights), remaining >= MIN_REMAINING


class Coalition(Ablation):
    """As `MaskRenormalise`, but where nothing would be left the read is zero: the value of every subset is defined.

    For games over the families (`probe.analysis.coalitions`), not for the grid. It misleads with aliased families: they
    are redundant by construction.
    """

    kind = "coalition"
    is_game = True

    def exists_at(self, site: ReadSite) -> bool:
        return any(source_mask(site, self.families, self.with_aliases))

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        weights = read.routing_weights.masked_fill(self.members(read), 0.0)
        remaining = weights.sum(-1, keepdim=True)
        weights = torch.where(remaining >= MIN_REMAINING, weights / remaining.clamp_min(MIN_REMAINING), 0.0)
        return read._replace(routing_weights=weights), everywhere(read)


class Zero(Ablation):
    """Set the families' weights to zero; the rest stay as they are, so the read shrinks.

    It misleads where the sublayer minds the size of its input; the input norm undoes most of that.
    """

    kind = "zero"

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        weights = read.routing_weights.masked_fill(self.members(read), 0.0)
        return read._replace(routing_weights=weights), everywhere(read)


class _Replace(Ablation):
    """Replace the content of the families' sources by that of the reference; weights stay."""

    def exists_at(self, site: ReadSite) -> bool:
        return any(source_mask(site, self.families, self.with_aliases))

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        others = self.reference(read).sources
        mask = source_mask(read.site, self.families, self.with_aliases)
        sources = tuple(new if chosen else old for chosen, old, new in zip(mask, read.sources, others, strict=True))
        return read._replace(sources=sources), everywhere(read)


class Mean(_Replace):
    """Replace the families' sources by their mean over the sequences of the data, at each position.

    It misleads where positions differ in meaning from sequence to sequence: then the mean is of unlike things. No
    sequence ever has this content, so what the model does with it may say little of what it does otherwise.
    """

    kind = "mean"
    needs = "mean"


class Resample(_Replace):
    """Replace the families' sources by those of another example, at the same position (`Examples.partners`).

    It misleads where the two examples agree on what matters: what both hold counts as without effect.
    """

    kind = "resample"
    needs = "partner"


class Uniform(Ablation):
    """Spread the families' mass evenly over their sources; over all families, a read with equal weights.

    It misleads where routing is near to even already: then its dose is small, whatever the routing does.
    """

    kind = "uniform"
    labels = (ALL,)

    def exists_at(self, site: ReadSite) -> bool:
        return sum(source_mask(site, self.families, self.with_aliases)) > 1

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        members = self.members(read)
        mean = (read.routing_weights * members).sum(-1, keepdim=True) / members.sum()
        return read._replace(routing_weights=torch.where(members, mean, read.routing_weights)), everywhere(read)


class Increment(Ablation):
    """Take the families' increments out of a cumulative read, so that their contribution is really gone.

    A snapshot is the sum of the increments before it: `v_n = d_0 + ... + d_n`, `d_0` the embedding, the last one what
    was written since the newest block. So `h = sum_j c_j d_j` with `c_j = sum_{n >= j} w_n`, and taking out
    `c_j (v_j - v_{j-1})` changes weights only. `family` names the increment by the source that it ends at; nothing
    is renormalised. An increment of zero (`current` where it is an alias) does not exist, and no alias hides one.

    It misleads where later increments are answers to the one that is taken out: they stay in the read.
    """

    kind = "increment"
    attnres_sources = ("cumulative",)  # those of block_sum are increments already: `Zero` takes them out

    def _members(self, site: ReadSite) -> tuple[bool, ...]:
        mask = source_mask(site, self.families)
        return (*mask[:-1], False) if site.current_is_alias else mask

    def exists_at(self, site: ReadSite) -> bool:
        num_increments = site.num_sources - site.current_is_alias
        return 0 < sum(self._members(site)) < num_increments

    def is_aliased(self, site: ReadSite) -> bool:
        return False

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        weights = read.routing_weights
        coefficients = weights.flip(-1).cumsum(-1).flip(-1)
        taken = coefficients * torch.tensor(self._members(read.site), device=weights.device)
        given = torch.nn.functional.pad(taken[..., 1:], (0, 1))
        return read._replace(routing_weights=weights - taken + given), everywhere(read)


class PatchWeights(Ablation):
    """Give the families the weights that they have in a second, corrupted run; the rest are scaled to fit.

    The corrupted run is that of another example (`Examples.partners`): content changes, structure does not. Over all
    families, the whole read's weights are the other run's.

    It misleads where weights hardly depend on the example: no effect then says that they carry no information about it,
    not that they do not matter.
    """

    kind = "patch_weights"
    needs = "partner"
    labels = (*FAMILIES, ALL)

    def exists_at(self, site: ReadSite) -> bool:
        mask = source_mask(site, self.families, self.with_aliases)
        return any(mask) and site.num_sources > 1

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        members, corrupted = self.members(read), self.reference(read).routing_weights
        rest = read.routing_weights.masked_fill(members, 0.0).sum(-1, keepdim=True)
        new_rest = corrupted.masked_fill(members, 0.0).sum(-1, keepdim=True)
        scaled = read.routing_weights * (new_rest / rest.clamp_min(MIN_REMAINING))
        possible = everywhere(read) if bool(members.all()) else rest.squeeze(-1) >= MIN_REMAINING
        return read._replace(routing_weights=torch.where(members, corrupted, scaled)), possible


class MatchedMass(Ablation):
    """Control: take as much mass as the families have from other sources, drawn at random, and renormalise.

    The others are emptied one after the other, in an order drawn for each sequence and read, until the amount is
    reached. Not possible where the others have less than the families.

    It misleads as a control where the other sources hold the families' content, too: with cumulative sources they do.
    """

    kind = "matched_mass"
    needs = "priorities"

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        assert self.context.priorities is not None
        members, weights = self.members(read), read.routing_weights
        drawn = self.context.view(self.context.priorities)[..., read.site.index, : weights.shape[-1]]
        order = drawn.masked_fill(members, torch.inf).argsort(-1)  # the families last: none of theirs is taken
        others = weights.masked_fill(members, 0.0)
        mass = (weights * members).sum(-1, keepdim=True)
        in_order = others.gather(-1, order)
        before = in_order.cumsum(-1) - in_order
        taken = (mass - before).clamp_min(0.0).minimum(in_order)
        left = weights - torch.zeros_like(weights).scatter(-1, order, taken)
        possible = (others.sum(-1) >= mass.squeeze(-1)) & (left.sum(-1) >= MIN_REMAINING)
        scaled = left / left.sum(-1, keepdim=True).clamp_min(MIN_REMAINING)
        return read._replace(routing_weights=scaled), possible


def grid_kinds() -> tuple[str, ...]:
    """The kinds that a grid can be made of, your own among them."""
    return tuple(kind for kind, cls in Ablation.known.items() if not cls.is_game)


def find_kind(name: str) -> type[Ablation]:
    """The class of a kind: its `kind`, or the place of a class of your own, as in my_module.Halve.

    Raises:
        ValueError: there is no such kind, or no such class there.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        check_names("kind", [name], grid_kinds())
        return Ablation.known[name]
    if os.getcwd() not in sys.path:  # a console script does not look beside itself
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"kind '{name}' cannot be imported ({error}): give module.Class") from error
    if not (isinstance(found, type) and issubclass(found, Ablation) and "kind" in vars(found)):
        raise ValueError(f"kind '{name}' must be a subclass of probe.Ablation with a `kind` of its own")
    return found


@dataclass(frozen=True)
class Together:
    """Several interventions at once, each on its own equal part of the batch (dimension 0)."""

    interventions: tuple[Ablation, ...]

    def __call__(self, read: Read) -> Read:
        if not any(read.site.index in each.reads for each in self.interventions):
            return read
        count = len(self.interventions)
        weights = read.routing_weights.chunk(count)
        sources = zip(*(source.chunk(count) for source in read.sources), strict=True)
        parts = [Read(read.site, w, s) for w, s in zip(weights, sources, strict=True)]
        new = [each(part) for each, part in zip(self.interventions, parts, strict=True)]
        joined = tuple(
            old
            if all(n.sources[i] is p.sources[i] for n, p in zip(new, parts, strict=True))
            else torch.cat([n.sources[i] for n in new])
            for i, old in enumerate(read.sources)
        )
        return Read(read.site, torch.cat([n.routing_weights for n in new]), joined)
