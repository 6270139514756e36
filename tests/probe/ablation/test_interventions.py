"""What the kinds do to one read, and that a kind of one's own takes ten lines."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from attnres import FAMILIES, Read
from attnres.tasks import MQAR
from probe.ablation.interventions import (
    Ablation,
    Context,
    Increment,
    MatchedMass,
    Together,
    Uniform,
    grid_kinds,
    source_mask,
)
from probe.ablation.observer import GEOMETRY, geometry
from probe.examples.examples import Examples
from probe.vocabulary import LABELS, label
from tests.support.paths import ROOT

INPUTS = Examples.from_batch(MQAR(num_pairs=4, vocab_size=40).batch("probe", range(6)))


def record(model) -> list[Read]:
    reads: list[Read] = []
    with torch.no_grad():
        model(INPUTS.input_ids, intervention=lambda read: reads.append(read) or read)
    return reads


def context(reads: list[Read]) -> Context:
    """Another example's reads (the batch turned round), and draws."""

    def turned(read: Read) -> Read:
        return Read(read.site, read.routing_weights.flip(0), tuple(source.flip(0) for source in read.sources))

    other = {read.site.index: turned(read) for read in reads}
    batch, seq = reads[0].routing_weights.shape[:2]
    draws = torch.rand(batch, 1, len(reads), max(read.site.num_sources for read in reads)).expand(-1, seq, -1, -1)
    return Context(references={"partner": other, "mean": other}, priorities=draws)


@pytest.fixture(scope="module")
def reads(make_model):
    return record(make_model(num_hidden_layers=6, attnres_num_blocks=3))


@pytest.mark.parametrize("kind", grid_kinds())
def test_nothing_happens_at_other_reads_and_other_positions(reads, kind):
    cls, everything = Ablation.known[kind], context(reads)
    where = torch.zeros(reads[0].routing_weights.shape[:2], dtype=torch.bool)
    where[:, 1::3] = True
    acted = 0
    for name in cls.labels:
        at_some = Context(where, everything.references, everything.priorities)
        for read in reads:
            assert cls(LABELS[name], frozenset(), False, everything)(read) is read
            new = cls(LABELS[name], frozenset([read.site.index]), False, at_some)(read)
            pairs = [(new.routing_weights, read.routing_weights), *zip(new.sources, read.sources, strict=True)]
            assert all(torch.equal(a[~where], b[~where]) for a, b in pairs)
            acted += any(not torch.equal(a, b) for a, b in pairs)
    assert acted > len(reads) / 2


@pytest.mark.parametrize("kind", ["mask_renormalise", "uniform", "patch_weights", "matched_mass"])
def test_weights_stay_weights(reads, kind):
    cls = Ablation.known[kind]
    for name in cls.labels:
        for read in reads:
            new = cls(LABELS[name], frozenset([read.site.index]), False, context(reads))(read).routing_weights
            torch.testing.assert_close(new.sum(-1), torch.ones_like(new[..., 0]))
            assert (new >= 0).all()


def test_increments_of_all_families_but_one_leave_that_one(reads):
    """h - (contributions of d_1 ... d_n) is the embedding, since its coefficient is the sum of all weights."""
    checked = 0
    for read in reads:
        others = [family for family in FAMILIES if family != "embedding"]
        ablation = Increment(others, frozenset([read.site.index]))
        if not ablation.exists_at(read.site):
            continue
        new = ablation(read)
        hidden = sum(w.unsqueeze(-1) * v for w, v in zip(new.routing_weights.unbind(-1), new.sources, strict=True))
        torch.testing.assert_close(hidden, read.sources[0], atol=1e-5, rtol=1e-5)
        checked += 1
    assert checked > 8


def test_uniform_over_all_families_is_an_even_read(reads):
    for read in reads:
        new = Uniform(FAMILIES, frozenset([read.site.index]))(read).routing_weights
        torch.testing.assert_close(new, torch.full_like(new, 1 / read.site.num_sources))


def test_matched_mass_takes_as_much_from_others_and_nothing_from_the_family(reads):
    checked = 0
    for read in reads:
        for family in FAMILIES:
            members = torch.tensor(source_mask(read.site, [family]))
            ablation = MatchedMass([family], frozenset([read.site.index]), False, context(reads))
            if not ablation.exists_at(read.site):
                continue
            new, possible = ablation.ablated(read)
            mass = read.routing_weights[..., members].sum(-1)
            torch.testing.assert_close(possible, mass <= read.routing_weights[..., ~members].sum(-1))
            kept = new.routing_weights[..., members].sum(-1) * (1 - mass)  # before scaling back
            torch.testing.assert_close(kept[possible], mass[possible], atol=1e-5, rtol=1e-4)
            checked += int(possible.sum())
    assert checked > 100


def test_several_at_once_are_each_on_its_own_part(reads):
    read = reads[-1]
    three = Read(read.site, read.routing_weights.repeat(3, 1, 1), tuple(s.repeat(3, 1, 1) for s in read.sources))
    members = frozenset([read.site.index])
    each = [Ablation.known[kind](["current"], members, False, context(reads)) for kind in ("zero", "resample")]
    idle = Ablation.known["zero"](["current"], frozenset())
    together = Together((each[0], idle, each[1]))(three)
    alone = [each[0](read), read, each[1](read)]
    assert torch.equal(together.routing_weights, torch.cat([a.routing_weights for a in alone]))
    for i, source in enumerate(together.sources):
        assert torch.equal(source, torch.cat([a.sources[i] for a in alone]))


def test_a_kind_of_your_own(make_model):
    """The example of docs/probes.md, as it stands there, from the definition to the table."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "probes.md").read_text(encoding="utf-8"), re.S)
    names: dict = {"model": make_model(max_position_embeddings=64, vocab_size=256)}
    try:
        exec(next(block for block in blocks if "class Halve" in block), names)
        table = names["found"].effects
        assert set(table["kind"]) == {"mask_renormalise", "halve"}
        assert table.loc[table["kind"] == "halve", "effect"].abs().max() > 0
    finally:
        Ablation.known.pop("halve", None)


def test_geometry_against_loops(reads):
    for read in (reads[0], reads[5], reads[-1]):
        found = geometry(read)
        for b, t in ((0, 3), (4, 7)):
            weights = read.routing_weights[b, t].double()
            values = [source[b, t].double() for source in read.sources]
            cosine = [[float(torch.cosine_similarity(a, c, dim=0)) for c in values] for a in values]
            entropy = -sum(float(w * w.log()) for w in weights)
            overlap = sum(
                float(weights[i] * weights[j]) * cosine[i][j] ** 2
                for i in range(len(values))
                for j in range(len(values))
            )
            row = dict(zip(GEOMETRY, found[b, t].tolist(), strict=True))
            assert row["entropy"] == pytest.approx(entropy, abs=1e-5)
            assert row["effective_sources"] == pytest.approx(np.exp(entropy), rel=1e-5)
            assert row["effective_distinct_sources"] == pytest.approx(1 / overlap, rel=1e-4)
            names = read.site.families
            pairs = [
                cosine[i][j]
                for i, a in enumerate(names)
                for j, c in enumerate(names)
                if (a, c) == ("embedding", "current")
            ]
            assert row["cosine_embedding_current"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert float(geometry(reads[0])[0, 0, 2]) == pytest.approx(1, abs=1e-4)  # layer 0: two names of one tensor


def test_labels_name_every_set_of_families():
    assert len(LABELS) == 15
    assert label(FAMILIES) == "all"
    assert LABELS["embedding+older"] == ("embedding", "older")
