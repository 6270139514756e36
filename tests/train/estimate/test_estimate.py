"""`attnres-train estimate` against what training then takes: bytes given out, operations counted, probes run."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from attnres.tasks import MQAR
from probe.ablation import interventions
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.examples.examples import Examples
from probe.runner import grid, plan_probe
from probe.settings import TrainingProbeSettings
from probe.training import shared
from probe.training.shared import settings_of_probe
from tests.conftest import SOURCES
from tests.support.paths import CONFIGS
from tests.train.cli.test_fit import TINY, refused
from train.cli import main
from train.estimate.cost import ISSUE_SECONDS, count_devices, count_parameters
from train.estimate.memory import Workload, simulate_step
from train.recall.flops import forward_flops, training_flops
from train.recall.module import RetrievalModule

pytestmark = pytest.mark.usefixtures("quiet_wandb")

PROBED = "--probe.enabled=true"
FEW = ["--data.batch_size=8"]
SHALLOW = ["--model.num_hidden_layers=2", "--model.attnres_num_blocks=2"]
MIXED = "--trainer.precision=bf16-mixed"
PEAK = "--peak_tflops=1e-3"
PER_HOUR = 1e9 * 0.3 * 3600  # FLOPs at PEAK and the default share of it
CASES = {
    "tiny": ["demo", "cumulative"],
    "tiny, vanilla, checkpointing": ["demo", "vanilla", *SHALLOW, "--model.gradient_checkpointing=true"],
    "tiny, frozen, noise, mixed": ["demo", "frozen", *SHALLOW, "--data.task.noise_tokens=32", MIXED],
    "20m, accumulating": ["20m", "cumulative", *FEW, *SHALLOW, "--trainer.accumulate_grad_batches=2"],
    "20m, block_sum, checkpointing": ["20m", "block_sum", *FEW, *SHALLOW, "--model.gradient_checkpointing=true"],
    "20m, vanilla, float32": ["20m", "vanilla", *FEW, *SHALLOW, "--trainer.precision=32-true"],
}
STEP_ALONE = ["--probe.enabled=false", "--data.curriculum.kind=off", "--data.num_workers=0", "--trainer.max_steps=2"]
STEP_ALONE += ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
STEP_ALONE += ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
# FlopCounterMode does not know the attention kernels of CPUs.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def options_of(size: str, condition: str, *options: str) -> list[str]:
    files = (CONFIGS / f"{size}.yaml", CONFIGS / "conditions" / f"{condition}.yaml")
    return [*(f"--config={file}" for file in files), "--trainer.accelerator=cpu", *options]


def estimated(*options: str) -> dict:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["estimate", *options, "--json=true"])
    return json.loads(printed.getvalue())


def given_out(function: Callable[[], object]) -> int:
    """Most bytes that PyTorch's allocator had given out at once, by its own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    now = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_memory_is_what_a_run_is_given(case, tmp_path):
    options = options_of(*case)
    measured = given_out(lambda: main(["fit", *options, *STEP_ALONE, f"--run_dir={tmp_path / 'run'}"]))
    assert sum(estimated(*options)["memory"].values()) == pytest.approx(measured, rel=0.05)


def module_of(device: str = "cpu", **options) -> RetrievalModule:
    with torch.device(device):
        return RetrievalModule(**options)


def counted(function: Callable[[], object]) -> float:
    """FLOPs by torch, which leaves out weighted sums."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


def without_sums(flops: dict[str, float]) -> float:
    return sum(value for part, value in flops.items() if part != "routing_sums")


OPTIONS = ({}, {"architecture": "vanilla"}, {"attnres_source": "block_sum"}, {"attnres_mode": "full"})
OPTIONS += ({"attnres_source": "delta_block"}, {"attnres_source": "delta_block", "attnres_mode": "full"})
OPTIONS += ({"attnres_routing": "frozen"}, {"gradient_checkpointing": True})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flops_are_those_that_torch_counts(options):
    module = module_of(num_hidden_layers=5, num_key_value_heads=2, **options)
    batch = MQAR().batch("train", [0])
    with torch.no_grad():
        assert counted(lambda: module(batch)) == without_sums(forward_flops(module.model.config, 48, 16))
    step = counted(lambda: module.answer(batch)[0].backward())
    tolerance = 0.05 if "gradient_checkpointing" in options else 0.001  # it stops a little before the end of a layer
    assert without_sums(training_flops(module.model, 48, 16)) == pytest.approx(step, rel=tolerance)


def test_weighted_sums_are_counted_source_by_source():
    """Two layers in two blocks: the reads see 2, 2, 3, 3 sources (cumulative)."""
    config = module_of("meta", num_hidden_layers=2, attnres_num_blocks=2).model.config
    assert forward_flops(config, 12, 4)["routing_sums"] == 2 * 12 * config.hidden_size * (2 + 2 + 3 + 3)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attnres_routing": "frozen"}])
def test_parameters_are_counted_once(options):
    counts = count_parameters(module_of("meta", **options))
    model = module_of(**options).model
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["embedding"] + counts["head"] == 64 * 256 * (1 if options.get("tie_word_embeddings") else 2)
    assert counts["routing"] == sum(p.numel() for p in model.routing_parameters().values())
    assert sum(counts.values()) == 2 * counts["total"] + counts["trainable"]


def bytes_of(workload: Workload, foreach: bool = False, layers: int = 1, **options) -> int:
    module = module_of("meta", num_hidden_layers=layers, attnres_num_blocks=1, **options)
    memory, _ = simulate_step(module, workload, foreach)
    return sum(memory.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch, when it may compile
def test_memory_grows_with_the_work_and_shrinks_with_the_options_that_save_it():
    workload = Workload(16, 48, 16)
    plain = bytes_of(workload)
    assert bytes_of(replace(workload, batch_size=32)) > 1.8 * plain  # activations are nearly all of it
    assert bytes_of(replace(workload, seq=2 * workload.seq, queries=2 * workload.queries)) > 1.8 * plain
    assert bytes_of(workload, layers=3, gradient_checkpointing=True) < 0.8 * bytes_of(workload, layers=3)
    assert bytes_of(replace(workload, autocast=torch.bfloat16)) < plain
    assert 1.7 * plain < bytes_of(replace(workload, dtype=torch.float64)) < 2 * plain  # logits stay in float32
    assert bytes_of(workload, compile=True) == plain  # and nothing is compiled
    small = Workload(1, 3, 1)  # its peak is the optimiser's
    assert bytes_of(small, foreach=True) > bytes_of(small)


def test_a_large_model_is_not_allocated():
    options = [f"--config={CONFIGS / '0.6b.yaml'}", "--model.num_hidden_layers=2", "--model.attnres_num_blocks=2"]
    found = {}
    assert given_out(lambda: found.update(estimated(*options))) < 2**20
    assert sum(found["memory"].values()) > 2**31


SHIPPED = [kind for kind in interventions.Ablation.known.values() if kind.__module__.startswith("probe.ablation.")]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("positions", [("all",), ("query",), ("all", "query")])
def test_a_sweep_takes_the_passes_that_were_planned(source, positions, make_model):
    model = make_model(attnres_source=source, num_hidden_layers=2)
    kinds = [Kind(known) for known in SHIPPED if source in known.attnres_sources]
    masks, integrated = Kind(interventions.MaskRenormalise), Kind(interventions.MaskRenormalise, integrated=True)
    examples = Examples.from_batch(MQAR(num_pairs=4, vocab_size=40).batch("probe", range(5)))
    for chosen in ([masks], [integrated], kinds, [integrated, *kinds]):
        cells = [cell for kind in chosen for cell in build_grid(model.model.sites, kind, kind.intervention.labels)]
        engine = Engine(model, cells, positions, batch_size=2)
        assert engine.plan(examples).forward_passes == pytest.approx(engine.run(examples).forward_passes)


def test_probes_are_those_that_a_run_makes(tmp_path, monkeypatch):
    options = [*TINY, PROBED, "--probe.every_n_steps=3", "--probe.accuracy_jump=0", "--trail.every_n_steps=1"]
    options += ["--probe.log_spaced=false", "--probe.num_resamples=20", "--data.batch_size=16", "--trainer.max_steps=3"]
    found, summaries, probe_model = estimated(*options)["probing"], [], shared.probe_model

    def note(*args, **kwargs):
        made = probe_model(*args, **kwargs)
        summaries.append(made.summary)
        return made

    monkeypatch.setattr("probe.training.shared.probe_model", note)
    main(["fit", *options, f"--run_dir={tmp_path / 'run'}"])
    *in_training, last = summaries
    assert [summary["step"] for summary in in_training] == [0, 1, 2]
    assert (found["probes"], found["of_trail"]) == (1, 2)
    for summary in in_training:
        assert summary["flip"] is None
        assert found["sequences"] == summary["probe"]["n_sequences"]
        assert found["forward_passes"] == pytest.approx(summary["probe"]["forward_passes"])
    assert found["last_forward_passes"] == pytest.approx(
        last["probe"]["forward_passes"] + 5
    )  # and the flip test: before and after four changes


@pytest.mark.parametrize(
    ("options", "probes", "of_trail"),
    [
        (["--probe.every_n_steps=1"], 100, 0),
        (["--probe.every_n_steps=50", "--trail.every_n_steps=10"], 2, 8),  # 11 steps, 3 of which are scheduled
        (["--probe.every_n_steps=50", "--trail.every_n_steps=10", "--probe.trail_probes=5"], 2, 2),
        (["--probe.every_n_steps=1", "--trail.every_n_steps=10"], 100, 0),
        (["--probe.every_n_steps=50", "--trail.every_n_steps=10", "--probe.trail_probes=0"], 2, 0),
    ],
)
def test_scheduled_probes_those_of_the_trail_and_the_last_are_counted(options, probes, of_trail):
    found = estimated(*TINY, PROBED, PEAK, "--probe.log_spaced=false", "--trainer.max_steps=100", *options)
    probing = found["probing"]
    assert (probing["probes"], probing["of_trail"]) == (probes, of_trail)
    kept = found["trail"]["steps"]
    most = next((int(option.split("=")[1]) for option in options if "trail_probes" in option), 24)
    assert probing["curves"] == min(kept, most)
    for amount, unit in ((found["flops"], 1), (found["hours"][0], PER_HOUR)):
        each, last, curves = (probing[name] / unit for name in ("flops", "last_flops", "curve_flops"))
        expected = (probes + of_trail) * each + last + probing["curves"] * curves
        assert amount["probing"] == pytest.approx(expected)


@pytest.mark.parametrize("architecture", ["attnres", "vanilla"])
def test_curves_are_counted_for_any_architecture(architecture):
    options = ["--trail.every_n_steps=10", "--trainer.max_steps=100", f"--model.architecture={architecture}"]
    found = estimated(*TINY, PROBED, PEAK, *options)
    probing = found["probing"]
    assert (probing["curves"], probing["curve_sequences"]) == (11, 64)
    assert probing["curve_forward_passes"] == 1 + 1 + 4  # accuracy, before and after four changes
    assert found["flops"]["probing"] >= 11 * probing["curve_flops"] > 0
    more = estimated(*TINY, PROBED, PEAK, *options, "--probe.curves=[flip,trace,heads]")["probing"]
    assert more["curve_forward_passes"] > 10
    assert estimated(*TINY, PROBED, PEAK, *options, "--probe.curves=[]")["probing"]["curves"] == 0


def test_the_head_is_part_of_a_probes_cost():
    """Every ablation reads out all queries, however short its replay; so do the clean run and the flip test."""
    module = module_of("meta", num_hidden_layers=2, attnres_num_blocks=2)
    settings = settings_of_probe(TrainingProbeSettings(), MQAR(), module.model, full=True)
    cost = plan_probe(module.model, MQAR(), settings)
    assert 4 < cost.readouts <= len(grid(module.model, settings)) + 1 + 4
    assert cost.readouts > cost.forward_passes


@pytest.mark.parametrize("options", [["--model.architecture=vanilla", PROBED], []], ids=["vanilla", "off"])
def test_probing_is_free_where_there_is_none(options):
    found = estimated(*TINY, *options)
    assert found["probing"]["probes"] == found["flops"]["probing"] == found["hours"][0]["probing"] == 0


def test_work_and_hours_are_in_proportion():
    options = [*TINY, PROBED, PEAK, "--data.task.num_pairs=8"]
    options += ["--trainer.precision=64-true"]  # at the rate that is stated
    one = estimated(*options, "--trainer.max_steps=100")
    two = estimated(*options, "--trainer.max_steps=200", "--mfu=0.6")
    four = estimated(*options, "--trainer.max_steps=100", "--trainer.devices=4", "--trainer.strategy=ddp")
    assert two["tokens"]["total"] == 2 * one["tokens"]["total"] == 2 * 100 * 8 * 24
    assert four["tokens"]["step"] == 4 * one["tokens"]["step"]
    assert two["flops"]["training"] == 200 * sum(one["flops_per_token"].values()) * one["tokens"]["step"]
    assert two["hours"][0]["training"] == pytest.approx(one["hours"][0]["training"])
    assert four["hours"][0]["training"] == pytest.approx(one["hours"][0]["training"])
    assert four["hours"][0]["probing"] == pytest.approx(one["hours"][0]["probing"] / 4, rel=1e-6)
    for part in ("training", "validation", "probing"):
        assert one["hours"][0][part] == pytest.approx(one["flops"][part] / PER_HOUR)
        assert one["flops"][part] > 0
    assert four["memory"]["ddp_buckets"] == 8 * one["parameters"]["trainable"]


def test_validations_are_those_of_the_interval():
    """A sequence's forward pass is a third of training it, but for attention, whose backward pass costs more."""
    every_epoch = "--trainer.check_val_every_n_epoch=1"
    for times, options in (
        (3, ["--trainer.val_check_interval=3"]),
        (1.5, ["--trainer.val_check_interval=3", "--trainer.limit_val_batches=0.5"]),
        (0, ["--trainer.val_check_interval=3", "--trainer.limit_val_batches=0"]),
        (0, ["--trainer.val_check_interval=20"]),
        (4, ["--trainer.val_check_interval=0.25", every_epoch]),
    ):
        found = estimated(*TINY, "--trainer.max_steps=10", *options)
        parts = found["flops_per_token"]
        forward = 12 * sum(value / (3.5 if part == "attention" else 3) for part, value in parts.items())
        assert found["flops"]["validation"] == pytest.approx(times * 8 * forward)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch, when it may compile
def test_small_steps_take_the_time_to_issue_their_operations():
    options = [*TINY, "--hardware=h100", "--trainer.max_steps=1000", PROBED]
    found = estimated(*options)
    (hours,) = found["hours"]
    module = module_of("meta", num_hidden_layers=2, attnres_num_blocks=2)
    _, operations = simulate_step(module, Workload(8, 12, 4), foreach=True)
    assert 300 < operations < 3000
    assert hours["training"] * 3600 == pytest.approx(1000 * operations * ISSUE_SECONDS)
    for part in ("validation", "probing"):  # as slow as training is
        assert hours[part] / hours["training"] == pytest.approx(found["flops"][part] / found["flops"]["training"])
    assert hours["total"] == pytest.approx(hours["training"] + hours["validation"] + hours["probing"])
    compiled = estimated(*options, "--model.compile=true")["hours"][0]
    assert compiled["training"] == pytest.approx(found["flops"]["training"] / (67e12 * 0.3 * 3600))


FITS = [("fsdp2", 1.01, True), ("fsdp2", 0.2, False), ("ddp", 1.01, True), ("ddp", 0.99, False)]
FITS += [("fsdp2", 0.99, None)]  # it depends on how the step is divided


@pytest.mark.parametrize(("strategy", "share", "fits"), FITS)
def test_what_fits_is_said(strategy, share, fits):
    options = [*TINY, "--peak_tflops=1", "--trainer.devices=4", f"--trainer.strategy={strategy}"]
    found = estimated(*options)
    assert found["hours"][0]["fits"] is None  # nothing is said of the device's memory
    memory_gb = share * sum(found["memory"].values()) / 1e9
    assert estimated(*options, f"--memory_gb={memory_gb}")["hours"][0]["fits"] is fits


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_the_table_says_it_all_and_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not any("curriculum" in note for note in estimated(*TINY, "--data.curriculum.kind=off")["notes"])
    main(["estimate", *TINY, "--trainer.devices=2", "--trainer.strategy=ddp", PROBED, "--data.task.min_pairs=2"])
    captured = capsys.readouterr()
    assert captured.err == ""
    words = ["parameters", "FLOPs per token", "memory at the peak", "ddp buckets", "scheduled probes", "h200"]
    words += ["step: yes", "on 2 devices", "curriculum", "min_pairs", "30%", "jumps"]
    assert [word for word in words if word not in captured.out] == []
    main(["estimate", *TINY, "--trainer.strategy=fsdp2", "--model.compile=true"])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("trainer.devices auto", "fsdp2 divides", "torch.compile"))
    assert not list(tmp_path.iterdir())


BAD_INPUT = {
    "unknown hardware": (["--hardware=here"], ["hardware 'here'", "h100", "peak_tflops"]),
    "two kinds of hardware": (["--hardware=h100", "--peak_tflops=3"], ["hardware", "peak_tflops"]),
    "memory of what": (["--memory_gb=3"], ["memory_gb", "peak_tflops"]),
    "no rate": (["--peak_tflops=0"], ["peak_tflops", "positive"]),
    "utilisation": (["--mfu=1.5"], ["mfu", "at most 1"]),
    "unknown option": (["--hardwar=h100"], ["hardwar", "did you mean hardware?"]),
    "precision": (["--trainer.precision=transformer-engine"], ["trainer.precision", "bf16-mixed"]),
    "rates of doubles": (["--trainer.precision=64-true"], ["trainer.precision 64-true", "peak_tflops"]),
    "accelerator": (["--trainer.accelerator=foo"], ["trainer.accelerator foo", "cpu"]),
    "devices": (["--trainer.devices=many"], ["trainer.devices", "many"]),
    "no devices": (["--trainer.devices=0"], ["trainer.devices", "at least 1"]),
    "more blocks than layers": (["--model.attnres_num_blocks=3"], ["attnres_num_blocks"]),
    "few queries": ([PROBED, "--probe.num_sequences=64"], ["probe.num_sequences"]),
}


@pytest.mark.parametrize(("options", "words"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_refused_in_one_line(options, words, capsys):
    message = refused(capsys, "estimate", *TINY, *options)
    for word in words:
        assert word in message


def test_devices_are_counted_as_lightning_does():
    counts = {"auto": 1, -1: 1, "-1": 1, 3: 3, "3": 3, "0,2": 2, "1,": 1}
    assert {devices: count_devices(devices) for devices in counts} == counts
    assert count_devices([0, 3]) == 2
