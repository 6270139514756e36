"""Where reads are, and which of their sources are one and the same tensor, against what a model really reads."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attnres import FAMILIES, REGIONS, SUBLAYERS, Read, read_sites
from attnres.sites import regions_of
from tests.conftest import BOTH, small_config


@st.composite
def depths(draw: st.DrawFn, most: int = 12) -> dict[str, int]:
    num_layers = draw(st.integers(1, most))
    return {"num_hidden_layers": num_layers, "attnres_num_blocks": draw(st.integers(1, num_layers))}


@BOTH
@given(depth=depths())
def test_sites_are_the_reads_in_order_and_families_partition_their_sources(source, mode, depth):
    sites = read_sites(small_config(attnres_source=source, attnres_mode=mode, **depth))
    places = [(layer_idx, sublayer) for layer_idx in range(depth["num_hidden_layers"]) for sublayer in SUBLAYERS]
    places += [(None, "final")] * (source == "block_sum")
    assert [(site.layer_idx, site.sublayer) for site in sites] == places
    assert isinstance(hash(sites[-1]), int)  # probes key their tables by site
    for number, site in enumerate(sites):
        assert (site.index, site.num_layers) == (number, depth["num_hidden_layers"])
        assert not site.has_current or (source, mode) != ("block_sum", "full")
        families = list(site.families)
        assert len(families) == site.num_sources == site.num_completed + site.has_current
        assert set(families) <= set(FAMILIES)
        assert bool(families) == (site.index > 0 or source != "delta_block")  # there the first read has no sources
        assert families.count("embedding") == bool(families)
        assert families.count("current") == site.has_current
        assert families.count("prev_completed") == (site.num_completed > 1)
        assert families.count("older") == max(0, site.num_completed - 2)
        assert families == sorted(families, key=["embedding", "older", "prev_completed", "current"].index)


@given(depth=depths())
def test_regions_are_thirds_of_the_layers(depth):
    num_layers = depth["num_hidden_layers"]
    sites = read_sites(small_config(attnres_source="block_sum", **depth))
    assert [site.region for site in sites if site.layer_idx is None] == ["final"]
    layers = {region: [s.layer_idx for s in sites if s.region == region and s.sublayer == "mlp"] for region in REGIONS}
    assert [layer_idx for region in REGIONS for layer_idx in layers[region]] == list(range(num_layers))
    for boundary, region in enumerate(REGIONS):
        assert all(boundary * num_layers <= 3 * i < (boundary + 1) * num_layers for i in layers[region])


def test_regions_of_28_layers():
    sites = read_sites(small_config(num_hidden_layers=28, attnres_num_blocks=1))
    assert [site.region for site in sites[::2]] == ["early"] * 10 + ["middle"] * 9 + ["late"] * 9
    assert [regions_of(num_layers) for num_layers in (1, 2, 3)] == [REGIONS[:1], REGIONS[:2], REGIONS]


@BOTH
@settings(max_examples=15)
@given(depth=depths(most=7), seed=st.integers(0, 2**31))
@example(depth={"num_hidden_layers": 7, "attnres_num_blocks": 3}, seed=0)
def test_aliased_sources_are_the_equal_tensors_and_only_they(make_model, make_tokens, source, mode, depth, seed):
    model = make_model(seed=seed, attnres_source=source, attnres_mode=mode, **depth)
    reads: list[Read] = []

    def record(read: Read) -> Read:
        reads.append(read)
        return read

    with torch.no_grad():
        model(make_tokens(model, seed=seed), intervention=record)
    assert tuple(read.site for read in reads) == read_sites(model.config)
    for read in reads:
        assert len(read.sources) == read.routing_weights.shape[-1] == read.site.num_sources
        equal = [
            pair
            for pair in combinations(range(len(read.sources)), 2)
            if torch.equal(read.sources[pair[0]], read.sources[pair[1]])
        ]
        assert equal == ([read.site.aliased_sources] if read.site.current_is_alias else [])
        assert bool(read.site.aliased_sources) == read.site.current_is_alias


def test_cumulative_8_layers_in_4_blocks():
    sites = read_sites(small_config(num_hidden_layers=8, attnres_num_blocks=4))
    assert len(sites) == 16
    assert [site.num_sources for site in sites] == [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4
    # With two-layer blocks half of the attention reads are aliased: those that open a block.
    assert [site.index for site in sites if site.current_is_alias] == [0, 4, 8, 12]
    assert [site.aliased_sources for site in sites[::4]] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert sites[0].families == ("embedding", "current")
    assert sites[4].families == ("embedding", "prev_completed", "current")
    assert sites[15].families == ("embedding", "older", "older", "prev_completed", "current")


def test_block_sum_8_layers_in_4_blocks():
    sites = read_sites(small_config(num_hidden_layers=8, attnres_num_blocks=4, attnres_source="block_sum"))
    assert len(sites) == 17
    # A block's first read sees completed sources only; the final read sees the embedding and all four blocks.
    assert [site.num_sources for site in sites] == [1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5]
    assert [site.index for site in sites if not site.has_current] == [0, 4, 8, 12, 16]
    assert not any(site.aliased_sources for site in sites)
    final = sites[-1]
    assert (final.sublayer, final.region, final.layer_idx) == ("final", "final", None)
    assert final.families == ("embedding", "older", "older", "older", "prev_completed")


def test_delta_block_8_layers_in_4_blocks():
    sites = read_sites(small_config(num_hidden_layers=8, attnres_num_blocks=4, attnres_source="delta_block"))
    # The attention that opens a block does not see the block before it; the stream is no source; no read is the last.
    assert [site.num_sources for site in sites] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4]
    assert all(site.is_additive and not site.has_current for site in sites)
    assert sites[0].families == ()
    assert sites[-1].families == ("embedding", "older", "older", "prev_completed")
    fields = {"num_hidden_layers": 3, "attnres_num_blocks": 1, "attnres_source": "delta_block", "attnres_mode": "full"}
    full = read_sites(small_config(**fields))
    assert [site.num_sources for site in full] == [0, 2, 3, 4, 5, 6]  # the embedding and all outputs so far
