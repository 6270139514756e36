"""First-order effects against finite differences, and what they say of themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attnres import Read
from attnres.tasks import MQAR
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
from probe.vocabulary import primary_rows

LINEAR = {"logit_diff", "logit_diff_mean", "nll"}
INPUTS = Examples.from_recall(MQAR(num_pairs=4, vocab_size=40).batch("probe", range(6)))


@torch.no_grad()
def sums(model, run: CleanRun, intervention=None) -> dict[str, np.ndarray]:
    """[metric] -> (sequences,) summed, of what is compared with `run`; float64."""
    logits = model(INPUTS.input_ids, intervention=intervention).logits[INPUTS.queries]
    return {name: values.reshape(len(INPUTS), -1).sum(1).numpy() for name, values in run.metrics(logits).items()}


@pytest.mark.parametrize("kind", ["mask_renormalise", "increment", "resample"])
def test_it_is_the_derivative_of_a_partial_ablation(make_model, kind):
    """d/de of the effect of moving every read by a share e of its ablation; in float64."""
    model = make_model().double().requires_grad_(False)
    cells = build_grid(model.model.sites, Kind(Ablation.known[kind], True), scopes=["all", "late", "layer:1"])
    engine = Engine(model, cells, ("all", "query"), seed=3)
    result = engine.run(INPUTS)
    reads: dict[int, Read] = {}
    logits = model(INPUTS.input_ids).logits[INPUTS.queries]
    run = CleanRun.from_logits(logits, INPUTS.labels[INPUTS.queries], INPUTS.rivals)
    model(INPUTS.input_ids, intervention=lambda read: reads.setdefault(read.site.index, read))
    context = References(model, INPUTS, {Ablation.known[kind].needs}, 6, 3).context(np.arange(6))
    checked, share = 0, 0.01  # Qwen3's norms compute in float32: a smaller share drowns in rounding
    for (index, positions), effects in result.effects.items():
        cell = cells[index]
        where = INPUTS.queries if positions == "query" else None
        ablation = cell.ablation(replace(context, positions=where))

        def part(read: Read, share: float, ablation=ablation) -> Read:
            clean = reads[read.site.index]  # the ablation of the clean read, added to whatever the read is now
            new = ablation(clean)
            move = sum(w.unsqueeze(-1) * v for w, v in zip(new.routing_weights.unbind(-1), new.sources, strict=True))
            move = move - sum(
                w.unsqueeze(-1) * v for w, v in zip(clean.routing_weights.unbind(-1), clean.sources, strict=True)
            )
            weights = torch.nn.functional.pad(read.routing_weights, (0, 1), value=share)
            return Read(read.site, weights, (*read.sources, move))

        up, down = (sums(model, run, lambda read, s=s, part=part: part(read, s)) for s in (share, -share))
        assert set(effects) == LINEAR
        for name, values in effects.items():
            np.testing.assert_allclose(values, (up[name] - down[name]) / (2 * share), atol=1e-4, rtol=2e-3)
        checked += 1
    assert checked > 20


def test_it_is_marked_and_never_among_the_exact_rows(make_model, tmp_path):
    task = MQAR(num_pairs=4, vocab_size=40)
    settings = ProbeSettings(num_sequences=8, mode="both", num_resamples=50)
    probe = probe_model(make_model(), task, settings, tmp_path, run="r", condition="c", seed=0, step=0)
    kinds = set(probe.effects["kind"])
    assert kinds == {"mask_renormalise", "mask_renormalise_first_order"}
    assert set(primary_rows(probe.effects)["kind"]) == {"mask_renormalise"}
    linear = probe.effects[probe.effects["kind"] == "mask_renormalise_first_order"]
    assert set(linear["metric"]) == LINEAR
    agreement = probe.summary["first_order"]
    assert {entry["positions"] for entry in agreement} == {"all", "query"}
    assert all(-1 <= entry["spearman"] <= 1 and entry["n_cells"] > 5 for entry in agreement)


def test_it_agrees_with_small_exact_effects(make_model):
    """Where masks move little (embeddings close to each other), the two are one."""
    model = make_model(randomize=False)  # even routing of near-equal, small sources
    kinds = [Kind(MaskRenormalise, first_order) for first_order in (False, True)]
    cells = [cell for kind in kinds for cell in build_grid(model.model.sites, kind)]
    info = results.RunInfo("r", "c", 0, 0, "d", 4)
    effects, _ = results.build_tables(Engine(model, cells, ("all",)).run(INPUTS), info, Inference(num_resamples=20))
    found = {e["metric"]: e for e in results.first_order_agreement(effects) if e["grid"] == "layers"}
    assert set(found) == LINEAR
    assert all(entry["spearman"] > 0.5 for entry in found.values()), found


def test_alone_it_costs_a_few_forwards(make_model, tmp_path):
    task = MQAR(num_pairs=4, vocab_size=40)
    settings = ProbeSettings(num_sequences=8, mode="first_order", num_resamples=50)
    probe = probe_model(make_model(), task, settings, tmp_path, run="r", condition="c", seed=0, step=0)
    assert probe.summary["probe"]["forward_passes"] == 4  # one forward, a backward pass for each metric
    assert probe.summary["motifs"] == []
    assert probe.summary["dissociation"] == {}
