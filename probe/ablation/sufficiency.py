"""What a family does alone: interventions that keep it, and take everything else.

A mask asks what is *necessary*, and is blind to routes that stand in for each other: without either nothing is missing.
Keeping asks what is *sufficient*, and finds both. Weights that are kept are renormalised from the logits, so that a
family keeps its proportions however light it is: there is no floor, and the dose says how far a read has moved.

Where the newest completed block is the same tensor as `current`, the two are one source here, whichever of them a
family names; `is_aliased` says of such a read that what is kept is of both names.

None has an estimate. With `alpha` the family's weight, `h` the read and `v` the family's mean source,
keeping moves a read by `v - h`, and masking by `alpha / (1 - alpha) (h - v)`: in a linear world both tell the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnres import Read, ReadSite
from probe.ablation.base import Ablation, everywhere, source_mask
from probe.vocabulary import ALL


def keep(read: Read, kept: Tensor) -> Read:
    """All weight on the sources `kept`, (n,) or (batch, seq, n) bool and at least one, in proportion.

    Of a read that was made without logits, the weights are taken for it: those below 1e-38 count as 1e-38.
    """
    logits = read.logits
    if logits is None:
        logits = read.routing_weights.clamp_min(torch.finfo(read.routing_weights.dtype).tiny).log()
    return read._replace(routing_weights=logits.masked_fill(~kept, -torch.inf).softmax(-1))


def silent(read: Read) -> Read:
    """A read of no source: zero, for its sublayer; of an additive read, the running stream alone."""
    return read._replace(routing_weights=torch.zeros_like(read.routing_weights))


class KeepOnly(Ablation):
    """Give the families all of the weight. Reads that have none of them, or nothing else, stay as they are.

    It misleads where another source holds the same content. With cumulative sources every source contains the ones
    before it (content shared): keeping `current` is almost the vanilla model, and says nothing of routing. A light
    family is shown to its sublayer at a weight that it never had: that it would suffice does not say that it is used.
    In an additive model what is kept is added to the running stream, which stays, and holds all content once.
    `KeepRandom` shows what any sources do.
    """

    kind = "keep_only"
    can_be_estimated = False

    def chosen(self, site: ReadSite) -> tuple[bool, ...]:
        return source_mask(site, self.families, with_aliases=True)

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        return keep(read, self.members(read)), everywhere(read)


class KeepRandom(KeepOnly):
    """Control for `KeepOnly`: give all of the weight to as many sources as the families have, drawn at random.

    Drawn for each sequence and read. Where the draw is the families' own set, its last source gives way to the next one
    drawn, so that it never is. A source and its alias count as one.

    It misleads where there is little to draw from: of two sources the one that is not the family's is kept, which is
    what masking the family does; and where families are large, the set drawn holds most of theirs.
    """

    kind = "keep_random"
    needs = "priorities"

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        assert self.context.priorities is not None
        site = read.site
        num_distinct = site.num_sources - site.current_is_alias  # an alias, if there is one, is the last source
        own = self.members(read)[:num_distinct]
        count = int(own.sum())
        order = self.context.view(self.context.priorities)[..., site.index, :num_distinct].argsort(-1)
        drawn = order[..., :count]
        others = torch.cat((order[..., : count - 1], order[..., count : count + 1]), -1)
        drawn = torch.where(own[drawn].all(-1, keepdim=True), others, drawn)
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, drawn, True)
        if site.current_is_alias:
            kept = torch.cat((kept, kept[..., -1:]), -1)
        return keep(read, kept), everywhere(read)


class Silence(Ablation):
    """Make reads zero: what the sublayer is worth there. The baseline of `Rescue`.

    Additive reads become the running stream: what *routing* is worth there. Those that add nothing are not applicable.

    It misleads where the rest of the model has never seen the sublayer silent: all that fails then is put down to it.
    Silencing several layers at once says less and less of each.
    """

    kind = "silence"
    labels = (ALL,)
    can_be_estimated = False

    def exists_at(self, site: ReadSite) -> bool:
        return site.num_sources > 0

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        return silent(read), everywhere(read)


class Rescue(Ablation):
    """Silence a sublayer at all depths, and give one family back in one scope: there reads keep the families only.

    Reads of the scope that have none of them, and all reads of the sublayer outside of it, are zero. The share of the
    loss that comes back is 1 - harm(rescue) / harm(silence over all layers). Rescuing in all layers is not `KeepOnly`,
    which leaves reads without the family as they are; in the final read, which is one read, it is.

    It misleads as a lower bound: a route that needs another depth of the same sublayer before it rescues nothing here,
    and is needed all the same. As with `KeepOnly`, cumulative sources share their content. In an additive model the
    sublayer is not silent: it reads the running stream, and what is given back is a family's part of what is added.
    """

    kind = "rescue"
    can_be_estimated = False
    all_depths = True
    baseline = Silence

    def chosen(self, site: ReadSite) -> tuple[bool, ...]:
        scope = self.reads if self.scope_reads is None else self.scope_reads
        return source_mask(site, self.families if site.index in scope else (), with_aliases=True)

    def exists_at(self, site: ReadSite) -> bool:
        return any(self.chosen(site))

    def acts_at(self, site: ReadSite) -> bool:
        return site.index in self.reads and site.num_sources > 0

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        kept = self.members(read)
        return keep(read, kept) if any(self.chosen(read.site)) else silent(read), everywhere(read)
