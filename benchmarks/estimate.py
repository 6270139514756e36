"""`attnres-train estimate` against what training takes on this machine, at the configurations' own batch sizes.

    python benchmarks/estimate.py --output benchmarks/results/estimate.json

Memory: peak resident memory of two steps of `attnres-train fit`, above that of a process which trains a model of
almost no size: as it is, and with a malloc that gives freed memory back at once (`MALLOC_MMAP_THRESHOLD_`), as the
estimate leaves fragmentation out. And the most that PyTorch's allocator had given out, by its own record.
FLOPs: of a step as torch's `FlopCounterMode` counts them, which is all parts but routing's weighted sums.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from step_memory import STEP_ALONE, peak_of_fit
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from train.cli import main as train

CASES = {
    "tiny": ["--config=configs/demo.yaml"],
    "20m": ["--config=configs/20m.yaml"],
    "20m, checkpointing": ["--config=configs/20m.yaml", "--model.gradient_checkpointing=true"],
}
# Nothing but Python and its libraries.
NO_MODEL = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
NO_MODEL = [f"--model.{name}=1" for name in (*NO_MODEL, "attnres_num_blocks")] + ["--model.head_dim=2"]
NO_DATA = ["--data.batch_size=1", "--data.task.num_pairs=1", "--data.task.vocab_size=2"]
NO_DATA += ["--data.num_validation_examples=1"]
STEPS = 2
MAIN = "from train.cli import main; main()"
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# FlopCounterMode does not know the attention kernels of CPUs.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def estimated(options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-c", MAIN, "estimate", *options, "--trainer.accelerator=cpu", "--json=true"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def fit(options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"WANDB_MODE": "disabled"}):
        quiet = ["--trainer.enable_progress_bar=false", f"--trainer.max_steps={STEPS}", f"--run_dir={folder}/run"]
        train(["fit", *options, *STEP_ALONE, *quiet])


def allocated_peak(options: list[str]) -> int:
    """Most bytes that PyTorch's allocator had given out at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fit(options)
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, now)
    return peak


def counted_flops(options: list[str]) -> float:
    """Operations of a step, by torch."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        fit(options)
    return counter.get_total_flops() / STEPS


def compare_resident(found: dict[str, Any], options: list[str], baseline_kib: int) -> dict[str, Any]:
    memory = sum(found["memory"].values())
    resident = 1024 * (peak_of_fit(options, STEPS) - baseline_kib)
    given_back = 1024 * (peak_of_fit(options, STEPS, **GIVE_BACK) - baseline_kib)
    return {
        "estimated_mib": round(memory / 2**20, 1),
        "resident_mib": round(resident / 2**20, 1),
        "resident_given_back_mib": round(given_back / 2**20, 1),
        "estimated_over_resident": round(memory / resident, 3),
        "estimated_over_resident_given_back": round(memory / given_back, 3),
    }


def compare_counted(found: dict[str, Any], options: list[str]) -> dict[str, Any]:
    memory, per_token = sum(found["memory"].values()), found["flops_per_token"]
    flops = (sum(per_token.values()) - per_token["routing_sums"]) * found["tokens"]["step"]
    allocated, counted = allocated_peak(options), counted_flops(options)
    return {
        "allocated_mib": round(allocated / 2**20, 1),
        "estimated_over_allocated": round(memory / allocated, 3),
        "estimated_gflops": round(flops / 1e9, 2),
        "counted_gflops": round(counted / 1e9, 2),
        "estimated_over_counted": round(flops / counted, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    # First all that runs in processes of its own: Linux hands the peak of a process down to those that it starts.
    baseline = peak_of_fit(["--config=configs/demo.yaml", *NO_MODEL, *NO_DATA], STEPS)
    found = {name: estimated(CASES[name]) for name in args.cases}
    resident = {name: compare_resident(found[name], CASES[name], baseline) for name in args.cases}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seed": 0,
        "process_mib": round(baseline / 1024, 1),
        "cases": {
            name: {"options": CASES[name], **resident[name], **compare_counted(found[name], CASES[name])}
            for name in args.cases
        },
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
