"""Estimates by integrated gradients against finite differences along the path, and what they say of themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attnres import FAMILIES, SUBLAYERS, Read
from attnres.tasks import MQAR
from probe.ablation import integrated
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import Ablation, MaskRenormalise
from probe.ablation.metrics import CleanRun
from probe.ablation.references import References
from probe.analysis import effects as results
from probe.analysis.inference import Inference
from probe.examples.examples import Examples
from probe.runner import probe_model
from probe.settings import ProbeSettings
from probe.vocabulary import MARGINS, primary_rows

INPUTS = Examples.from_batch(MQAR(num_pairs=4, vocab_size=40).batch("probe", range(6)))


@torch.no_grad()
def sums(model, run: CleanRun, intervention=None) -> dict[str, np.ndarray]:
    """[metric] -> (sequences,) summed, of what is compared with `run`; float64."""
    logits = model(INPUTS.input_ids, intervention=intervention).logits[INPUTS.queries]
    return {name: values.reshape(len(INPUTS), -1).sum(1).numpy() for name, values in run.metrics(logits).items()}


def output(read: Read) -> torch.Tensor:
    pairs = zip(read.routing_weights.unbind(-1), read.sources, strict=True)
    return torch.stack([weight.unsqueeze(-1) * source for weight, source in pairs]).sum(0)


def on_the_way(ablation: Ablation, shares: dict[int, float]):
    """Every read `i` of the path at `shares[i]` of the way from what it is to what it would be ablated."""

    def act(read: Read) -> Read:
        if not ablation.acts_at(read.site):
            return read
        weights = torch.nn.functional.pad(read.routing_weights, (0, 1), value=shares[read.site.index])
        return Read(read.site, weights, (*read.sources, output(ablation(read)) - output(read)))

    return act


@pytest.mark.parametrize("kind", ["mask_renormalise", "increment", "resample"])
def test_it_is_the_mean_derivative_along_the_path(make_model, kind):
    """Central differences in the place of each read alone, at both points of the path; in float64."""
    model = make_model(num_hidden_layers=3).double().requires_grad_(False)
    known, sites = Ablation.known[kind], model.model.sites
    cells = build_grid(sites, Kind(known, True), ["current"], scopes=["all", "late", "layer:1"])
    result = Engine(model, cells, ("all", "query"), seed=3).run(INPUTS)
    logits = model(INPUTS.input_ids).logits[INPUTS.queries]
    run = CleanRun.from_logits(logits, INPUTS.labels[INPUTS.queries], INPUTS.rivals)
    context = References(model, INPUTS, {known.needs}, 6, 3).context(np.arange(6))
    share = 0.01  # Qwen3's norms compute in float32: a smaller one drowns in rounding
    reads = [site.index for site in sites if site.sublayer in SUBLAYERS]
    for positions, where in (("all", None), ("query", INPUTS.queries)):
        ablation = replace(cells[0].ablation(replace(context, positions=where)), reads=frozenset(reads))
        parts: dict[int, dict[str, np.ndarray]] = {}
        for index in filter(lambda index: ablation.acts_at(sites[index]), reads):
            differences = []
            for point in (0.25, 0.75):
                shares = dict.fromkeys(reads, point)
                up, down = (
                    sums(model, run, on_the_way(ablation, shares | {index: point + e})) for e in (share, -share)
                )
                differences.append({m: (up[m] - down[m]) / (2 * share) for m in MARGINS})
            parts[index] = {m: (differences[0][m] + differences[1][m]) / 2 for m in MARGINS}
        compared = 0
        for (index, name), effects in result.effects.items():
            if name == positions:
                assert set(effects) == set(MARGINS)
                acting = [parts[i] for i in cells[index].reads if i in parts]
                for metric, values in effects.items():
                    expected = sum(part[metric] for part in acting)
                    np.testing.assert_allclose(values, expected, atol=1e-4, rtol=2e-3)
                compared += 1
        assert compared > 5


@pytest.mark.parametrize("source", ["cumulative", "delta_block"])
def test_all_parts_add_up_to_the_exact_effect_of_the_path(make_model, monkeypatch, source):
    """Completeness: with many points, the cell of all layers and both sublayers is the exact one."""
    monkeypatch.setattr(integrated, "POINTS", 32)
    model = make_model(attnres_source=source, attnres_num_blocks=4).double().requires_grad_(False)
    kinds = [Kind(MaskRenormalise, estimated) for estimated in (False, True)]
    cells = [c for kind in kinds for c in build_grid(model.model.sites, kind, FAMILIES, ["both"], ["all"])]
    found = Engine(model, cells, ("all",)).run(INPUTS).effects
    pairs = [(found[place, name], found[place + len(FAMILIES), name]) for place, name in found if place < len(FAMILIES)]
    assert len(pairs) >= 3
    for exact, estimated in pairs:
        for metric in MARGINS:
            np.testing.assert_allclose(estimated[metric], exact[metric], atol=2e-3 * np.abs(exact[metric]).max())


def test_it_is_marked_and_never_among_the_exact_rows(make_model, tmp_path):
    task = MQAR(num_pairs=4, vocab_size=40)
    settings = ProbeSettings(num_sequences=8, mode="both", num_resamples=50)
    probe = probe_model(make_model(), task, settings, tmp_path, run="r", condition="c", seed=0, step=0)
    kinds = set(probe.effects["kind"])
    assert kinds == {"mask_renormalise", "mask_renormalise_integrated"}
    assert set(primary_rows(probe.effects)["kind"]) == {"mask_renormalise"}
    linear = probe.effects[probe.effects["kind"] == "mask_renormalise_integrated"]
    assert set(linear["metric"]) == set(MARGINS)
    agreement = probe.summary["integrated"]
    assert {entry["positions"] for entry in agreement} == {"all", "query"}
    assert all(-1 <= entry["spearman"] <= 1 and entry["n_cells"] > 5 for entry in agreement)


def test_it_ranks_cells_as_exact_effects_do(make_model):
    """Also where masks move much, and the gradient of the clean run says little."""
    model = make_model()
    kinds = [Kind(MaskRenormalise, estimated) for estimated in (False, True)]
    cells = [cell for kind in kinds for cell in build_grid(model.model.sites, kind)]
    info = results.RunInfo("r", "c", 0, 0, "d", 4)
    effects, _ = results.build_tables(Engine(model, cells, ("all",)).run(INPUTS), info, Inference(num_resamples=20))
    found = {e["metric"]: e for e in results.integrated_agreement(effects) if e["grid"] == "layers"}
    assert set(found) == set(MARGINS)
    assert all(entry["spearman"] > 0.8 for entry in found.values()), found


@pytest.mark.parametrize("depth", [4, 8])
def test_its_cost_does_not_depend_on_the_depth(make_model, tmp_path, depth):
    task = MQAR(num_pairs=4, vocab_size=40)
    settings = ProbeSettings(num_sequences=8, mode="integrated", num_resamples=50, sublayers=SUBLAYERS)
    model = make_model(num_hidden_layers=depth, attnres_num_blocks=4)
    probe = probe_model(model, task, settings, tmp_path, run="r", condition="c", seed=0, step=0)
    # A clean run; for each family and positions two points, of a forward and two backward passes.
    assert probe.summary["probe"]["forward_passes"] == 1 + 2 * 2 * 4 * 3
    assert probe.summary["motifs"] == []
    assert probe.summary["dissociation"] == {}
