"""The ground truth of tests/support/planted.py, checked without the probe: a full forward for each mask.

A probe is graded against `Planted.sites`, so those must be right by a road the probe does not take: masking the
planted sites breaks the model, no other single family in a region does, and the sources hold what the docstrings say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from attnres import FAMILIES, REGIONS, SUBLAYERS, AttnResForCausalLM
from attnres.routing import Intervention, Read
from attnres.sites import ReadSite
from attnres.tasks.mqar import RecallBatch
from tests.support import planted
from tests.support.planted import Planted

NUM_SEQUENCES = 32
NEGLIGIBLE = 0.15  # nats of a margin of 16 or more: a hundredth
HARMFUL = 1.5  # nats
BUILDERS: dict[str, Callable[[], Planted]] = {
    "embedding_to_early_mlp": planted.embedding_to_early_mlp,
    "older_to_late_attention": planted.older_to_late_attention,
    "mass_without_role": planted.mass_without_role,
    "redundant_pair": planted.redundant_pair,
    "saturated": planted.saturated,
    "redundant_blocks": planted.redundant_blocks,
    "degenerate_cells": planted.degenerate_cells,
}
SITES = {
    "embedding_to_early_mlp": {("embedding", "mlp", "early")},
    "older_to_late_attention": {("older", "self_attn", "late")},
    "mass_without_role": {("older", "self_attn", "late")},
    "redundant_pair": set(),
    "saturated": {("older", "self_attn", "late")},
    "redundant_blocks": set(),
    "degenerate_cells": {("older", "self_attn", "late")},
}
ZERO_MEAN_LAYER = (1, 2, 1, 2, 2, 1, 2, 2)  # by seed; of three layers, so one in each region
PLANTED_LAYER = dict.fromkeys(BUILDERS, 4) | {"embedding_to_early_mlp": 0, "redundant_pair": 5}
Cell = tuple[str, str, str]


def in_scope(site: ReadSite, sublayer: str, region: str) -> bool:
    return site.sublayer == sublayer and region in (site.region, "all")


def mask(families: Iterable[str], sublayer: str, region: str, layer_idx: int | None = None) -> Intervention:
    """Give `families` no weight at all positions and scale the rest to sum to one; leave inapplicable reads alone."""

    def intervene(read: Read) -> Read:
        dropped = torch.tensor([family in families for family in read.site.families])
        elsewhere = not in_scope(read.site, sublayer, region) or layer_idx not in (None, read.site.layer_idx)
        if elsewhere or dropped.all() or not dropped.any():
            return read
        kept = read.routing_weights.masked_fill(dropped, 0.0)
        return read._replace(routing_weights=kept / kept.sum(-1, keepdim=True))

    return intervene


def num_masked(model: AttnResForCausalLM, cell: Cell) -> int:
    family, sublayer, region = cell
    sites = [site for site in model.model.sites if in_scope(site, sublayer, region)]
    return sum(family in site.families and set(site.families) != {family} for site in sites)


@torch.inference_mode()
def query_logits(model: AttnResForCausalLM, batch: RecallBatch, intervention: Intervention | None = None) -> Tensor:
    """(batch, pairs, vocabulary)."""
    num_queries = batch.answers.shape[1]
    return model(batch.input_ids, intervention=intervention, use_cache=False).logits[:, -num_queries:]


def answer_nll(logits: Tensor, batch: RecallBatch) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, batch.answers.unsqueeze(-1)).squeeze(-1)


def margin(logits: Tensor, batch: RecallBatch, distractors: Tensor) -> Tensor:
    """(batch, pairs) logit of the answer less that of its distractor."""
    answers, others = (logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) for ids in (batch.answers, distractors))
    return answers - others


def strongest(logits: Tensor, batch: RecallBatch) -> Tensor:
    """(batch, pairs) the value of the context with the largest logit, of those that are not the answer."""
    values = batch.values.unsqueeze(1).expand(-1, logits.shape[1], -1)
    others = logits.gather(-1, values).masked_fill(values == batch.answers.unsqueeze(-1), -torch.inf)
    return values.gather(-1, others.argmax(-1, keepdim=True)).squeeze(-1)


class Solver:
    """A planted model, its clean run on the probe split, and what masking does to it."""

    def __init__(self, name: str) -> None:
        self.name, self.found = name, BUILDERS[name]()
        self.model = self.found.model
        self.batch = self.found.task.batch("probe", range(NUM_SEQUENCES))
        self.logits = query_logits(self.model, self.batch)
        self.distractors = strongest(self.logits, self.batch)
        self.clean = margin(self.logits, self.batch, self.distractors)
        self.reads = self._record()

    @torch.inference_mode()
    def _record(self) -> dict[tuple[str, int | None], Read]:
        reads: dict[tuple[str, int | None], Read] = {}

        def record(read: Read) -> Read:
            reads[read.site.sublayer, read.site.layer_idx] = read
            return read

        self.model(self.batch.input_ids, intervention=record, use_cache=False)
        return reads

    def harm(self, families: Iterable[str], sublayer: str, region: str, layer_idx: int | None = None) -> float:
        """The mean fall of the margin, in nats."""
        logits = query_logits(self.model, self.batch, mask(families, sublayer, region, layer_idx))
        return float((self.clean - margin(logits, self.batch, self.distractors)).mean())

    def masses(self, cell: Cell) -> list[Tensor]:
        """(batch, seq) of the family for each read in scope; zero where it is absent."""
        family, sublayer, region = cell
        chosen = [read for read in self.reads.values() if in_scope(read.site, sublayer, region)]
        here = [torch.tensor([other == family for other in read.site.families]) for read in chosen]
        return [(read.routing_weights * mine).sum(-1) for read, mine in zip(chosen, here, strict=True)]

    def holders(self, sublayer: str, layer_idx: int, code: slice) -> set[str]:
        """The families with anything in slice `code`, at a context position after the first, at one read."""
        read = self.reads[sublayer, layer_idx]
        sources = zip(read.site.families, read.sources, strict=True)
        return {family for family, value in sources if value[:, 1:16, code].abs().max() > 1e-3}


@pytest.fixture(scope="module", params=BUILDERS)
def solver(request: pytest.FixtureRequest) -> Solver:
    return Solver(request.param)


@pytest.fixture(scope="module")
def harms(solver: Solver) -> dict[Cell, float]:
    """Of every single-family mask that applies somewhere, in each region and in all at once."""
    cells = [(f, s, r) for f in FAMILIES for s in SUBLAYERS for r in (*REGIONS, "all")]
    return {cell: solver.harm(cell[:1], *cell[1:]) for cell in cells if num_masked(solver.model, cell)}


def test_the_task_is_solved(solver: Solver) -> None:
    assert answer_nll(solver.logits, solver.batch).mean() < 1e-3
    assert solver.clean.mean() > 15
    assert torch.equal(solver.logits.argmax(-1), solver.batch.answers)


def test_masking_breaks_the_planted_sites_and_no_other(solver: Solver, harms: dict[Cell, float]) -> None:
    assert set(solver.found.sites) == SITES[solver.name]
    assert solver.found.sites <= harms.keys()
    for cell, harm in harms.items():
        family, sublayer, region = cell
        holds_site = cell in solver.found.sites or (
            region == "all" and any((family, sublayer, third) in solver.found.sites for third in REGIONS)
        )
        if holds_site:
            assert harm > HARMFUL, cell
            assert harm / num_masked(solver.model, cell) > 0.3, cell
        else:
            assert abs(harm) < NEGLIGIBLE, cell


def test_one_layer_alone_carries_the_mechanism(solver: Solver, harms: dict[Cell, float]) -> None:
    for family, sublayer, region in solver.found.sites:
        harm = solver.harm((family,), sublayer, region, PLANTED_LAYER[solver.name])
        assert harm == pytest.approx(harms[family, sublayer, region], abs=1e-3)


def test_the_planted_family_carries_most_of_the_mass_and_can_be_masked(solver: Solver) -> None:
    low, high = (0.4, 0.5) if solver.name == "mass_without_role" else (0.8, 0.9)
    for cell in solver.found.sites:
        for mass in solver.masses(cell):
            assert mass.min() >= low, cell
            assert mass.max() <= high, cell


def test_sources_hold_what_the_mechanism_says(solver: Solver) -> None:
    holders, layer = solver.holders, PLANTED_LAYER[solver.name]
    if solver.name == "embedding_to_early_mlp":
        assert holders("mlp", layer, planted.R) == {"embedding"}
        assert {"prev_completed", "current"} == holders("self_attn", 3, planted.W) == holders("self_attn", 3, planted.P)
    elif solver.name in ("older_to_late_attention", "degenerate_cells"):
        assert holders("self_attn", layer, planted.P) == {"older"}
    elif solver.name == "saturated":
        assert holders("self_attn", layer, planted.P) == {"older"}
        assert holders("self_attn", layer, planted.W) == {"older", "prev_completed", "current"}
    elif solver.name == "redundant_blocks":
        for code in (planted.P, planted.W):
            assert holders("self_attn", layer, code) == {"older", "prev_completed"}
    elif solver.name == "mass_without_role":
        assert holders("self_attn", layer, planted.P) == holders("self_attn", layer, planted.W) == {"older"}
        assert holders("self_attn", layer, planted.J) == {"prev_completed"}
    else:
        assert holders("self_attn", layer, planted.P) == {"prev_completed", "current"}


def test_mass_without_role() -> None:
    """prev_completed: a third of all attention mass, nothing of it aliased, and not needed at any sublayer's read.

    Only the final read of block_sum needs it: there it is the block that holds the output.
    """
    solver = Solver("mass_without_role")
    mean = torch.stack([mass.mean() for mass in solver.masses(("prev_completed", "self_attn", "all"))]).mean()
    assert mean >= 0.3
    assert not any(read.site.aliased_sources for read in solver.reads.values())
    junk = solver.reads["self_attn", 4].sources[-1][:, :, planted.J]
    assert junk[:, 1:].argmax(-1).unique().numel() > 30  # it differs from token to token
    assert solver.harm(("prev_completed",), "final", "final") > HARMFUL
    for family in ("embedding", "older"):
        assert abs(solver.harm((family,), "final", "final")) < NEGLIGIBLE


def test_a_redundant_pair_shows_only_when_both_are_masked() -> None:
    solver, pair = Solver("redundant_pair"), {"prev_completed", "current"}
    assert not solver.reads["self_attn", 5].site.current_is_alias
    for family in pair:
        assert solver.masses((family, "self_attn", "late"))[-1].mean() == pytest.approx(0.45, abs=0.01)
    for both in combinations(FAMILIES, 2):
        harm = solver.harm(both, "self_attn", "late")
        assert harm > HARMFUL if set(both) == pair else abs(harm) < NEGLIGIBLE, both


# --- zero_mean: no systematic dependence


@pytest.mark.parametrize("seed", range(8))
def test_zero_mean_is_exact_for_each_model(seed: int) -> None:
    """Masking the embedding in one region's MLP reads has effects that are large and cancel, and no other mask has any.

    The effect depends on the query's token and the answer alone, and over all answers of a token it sums to zero.
    """
    found = planted.zero_mean(seed)
    assert found.sites == frozenset()
    batch = found.task.batch("probe", range(NUM_SEQUENCES))
    clean = query_logits(found.model, batch)
    assert answer_nll(clean, batch).mean() > math.log(found.task.num_pairs)  # it has not learned the task
    cells = [(f, s, r) for f in ("embedding", "current") for s in SUBLAYERS for r in REGIONS]
    runs = {cell: query_logits(found.model, batch, mask(cell[:1], *cell[1:])) for cell in cells}
    effects = {cell: answer_nll(masked, batch) - answer_nll(clean, batch) for cell, masked in runs.items()}
    ((cell, effect),) = [(cell, effect) for cell, effect in effects.items() if effect.abs().max() > NEGLIGIBLE]
    assert cell == ("embedding", "mlp", REGIONS[ZERO_MEAN_LAYER[seed]])
    assert effect.std() >= 0.5
    assert effect.mean(1).std() >= 0.3
    masked = runs[cell]
    torch.testing.assert_close(clean.logsumexp(-1), masked.logsumexp(-1), atol=1e-3, rtol=0)
    change = (clean.log_softmax(-1) - masked.log_softmax(-1))[..., found.task.vocab_size // 2 :]  # NLL, each answer
    assert change.mean(-1).abs().max() < 1e-3
    queries = batch.input_ids[:, -found.task.num_pairs :]
    for token in queries.unique():
        same = change[queries == token]
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-3, rtol=0)
