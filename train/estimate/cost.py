"""What a configured run will cost before it is run: parameters, FLOPs, memory, tokens, hours, and probing's share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry

from probe.files.trail import step_size
from probe.settings import TrailSettings
from probe.training.callback import ProbeCallback
from train.estimate.hardware import Hardware, Target
from train.estimate.memory import Workload, simulate_step
from train.estimate.probing import ProbePlan, plan_probes
from train.recall.data import TaskDataModule
from train.recall.flops import forward_flops, training_flops
from train.recall.module import RetrievalModule
from train.recall.optim import kind_of
from train.run.sharding import divides

DTYPES = {"64": torch.float64, "32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
ISSUE_SECONDS = 5e-6
"""The least time that eager PyTorch takes to issue an operation to a GPU, a rule of thumb. It bounds small steps."""
ALL_DEVICES = ("auto", "-1", -1)


@dataclass(frozen=True)
class Hours:
    """Wall-clock hours of a run on one kind of device, and whether a step fits into its memory (`None`: not known)."""

    hardware: str
    fits: bool | None
    training: float
    validation: float
    probing: float
    total: float


@dataclass(frozen=True)
class CostEstimate:
    """All of it, in numbers. Tokens and FLOPs are of full sequences."""

    run: str  # what is estimated
    parameters: dict[str, int]  # by part
    flops_per_token: dict[str, float]  # of a training step, by part
    flops: dict[str, float]  # of a step, and of all training, validation and probing, over all devices
    memory: dict[str, int]  # bytes at the peak of a step on one device, by part
    tokens: dict[str, int]  # of a sequence, of a step and in total, over all devices
    trail: dict[str, int]  # its steps, and bytes of all of them on disk
    probing: ProbePlan
    hours: list[Hours]  # by device
    notes: list[str]  # what is left out or assumed


@dataclass(frozen=True)
class ConfiguredRun:
    """A run as the command line configures it. `trainer` holds the options of Lightning's Trainer."""

    module: RetrievalModule
    datamodule: TaskDataModule
    probe: ProbeCallback
    trail: TrailSettings
    trainer: Mapping[str, Any]

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        return count_devices(self.trainer["devices"]) * self.trainer["num_nodes"]

    @property
    def is_divided(self) -> bool:
        """Whether each device holds only a part of the model."""
        return divides(self.trainer["strategy"])

    @property
    def is_compiled(self) -> bool:
        return self.module.model._compiled_call_impl is not None

    @property
    def workload(self) -> Workload:
        """Raises ValueError for a precision whose memory is not known here."""
        precision, task = str(self.trainer["precision"] or "32"), self.datamodule.task
        name, _, kind = precision.partition("-")
        if name not in DTYPES or kind not in ("", "true", "mixed"):
            raise ValueError(f"trainer.precision {precision} is not covered; choose 32-true, bf16-mixed or bf16-true")
        is_mixed = name in ("16", "bf16") and kind != "true"
        return Workload(
            batch_size=self.datamodule.batch_size,
            seq=task.num_tokens,
            queries=task.num_queries,
            accumulate=self.trainer["accumulate_grad_batches"],
            dtype=torch.float32 if is_mixed else DTYPES[name],
            autocast=DTYPES[name] if is_mixed else None,
            clip=bool(self.trainer["gradient_clip_val"]),
        )

    @property
    def validated(self) -> int:
        """Sequences validated in the whole run."""
        interval, limit = self.trainer["val_check_interval"], self.trainer["limit_val_batches"]
        count, batch = self.datamodule.num_validation_examples, self.datamodule.batch_size
        if isinstance(limit, float):
            count = int(count * limit)
        elif limit is not None:
            count = min(count, limit * batch * self.num_devices)
        if isinstance(interval, float):  # of an epoch, and the run is one
            return int(1 / interval) * count
        return (0 if interval is None else self.trainer["max_steps"] // interval) * count

    def __str__(self) -> str:
        config, data, trainer = self.module.model.config, self.datamodule, self.trainer
        batches = f"batch {data.batch_size} x {trainer['accumulate_grad_batches']}".removesuffix(" x 1")
        devices = f"{self.num_devices} device" + "s" * (self.num_devices > 1)
        return (
            f"{self.module.condition}, {config.num_hidden_layers} layers, hidden {config.hidden_size}; "
            f"{data.task.name}, {data.task.unit} {data.task.size}, {batches}, {trainer['precision']}, "
            f"{trainer['max_steps']:,} steps on {devices}"
        )


def check_devices(options: Mapping[str, Any]) -> None:
    """Raises ValueError for devices that Lightning does not know, or none; whether they are here does not matter."""
    accelerator, known = options["accelerator"], ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if isinstance(accelerator, str) and accelerator not in known:
        raise ValueError(f"trainer.accelerator {accelerator} does not exist; choose from {', '.join(known)}")
    if count_devices(options["devices"]) < 1 or options["num_nodes"] < 1:
        raise ValueError("trainer.devices and trainer.num_nodes must be at least 1")


def count_devices(devices: Any) -> int:
    """The number that `trainer.devices` means; all that there are ("auto", -1) count as one.

    Raises:
        ValueError: it means none.
    """
    if devices in ALL_DEVICES:
        return 1
    if isinstance(devices, list | tuple):
        return len(devices)
    if not re.fullmatch(r"\d+(,\d*)*", str(devices)):
        raise ValueError(f"trainer.devices must be a number of devices, a list of them or auto, got {devices}")
    first, *others = str(devices).split(",")
    return 1 + sum(other != "" for other in others) if others else int(first)


def estimate_cost(run: ConfiguredRun, target: Target) -> CostEstimate:
    """What `run` will cost on `target`. The model is not run, and may be on the "meta" device.

    Raises:
        ValueError: rates or memory in the run's precision are not known.
    """
    workload, model, steps = run.workload, run.module.model, run.trainer["max_steps"]
    if workload.dtype == torch.float64 and target.peak_tflops is None:
        raise ValueError(f"trainer.precision {run.trainer['precision']} has no rates here; set peak_tflops")
    on_cpu = run.trainer["accelerator"] == "cpu" and target.hardware is None
    memory, operations = simulate_step(run.module, workload, foreach=not on_cpu)
    parameters = count_parameters(run.module)
    sequences = workload.batch_size * workload.accumulate * run.num_devices  # of a step
    if run.num_devices > 1 and not run.is_divided:
        memory["ddp_buckets"] = parameters["trainable"] * workload.dtype.itemsize  # copies of gradients, to reduce
    training = training_flops(model, workload.seq, workload.queries)
    forward = forward_flops(model.config, workload.seq, workload.queries)
    flops = {
        "step": sum(training.values()) * sequences,
        "training": sum(training.values()) * sequences * steps,
        "validation": sum(forward.values()) * run.validated,
    }
    probing = plan_probes(run.probe, run.trail, model, run.datamodule.task, steps, run.num_devices, forward)
    tokens = {"sequence": workload.seq, "step": sequences * workload.seq, "total": sequences * workload.seq * steps}
    flops["probing"] = probing.all_flops
    issuing = 0 if run.is_compiled else steps * operations * ISSUE_SECONDS / 3600
    return CostEstimate(
        run=str(run),
        parameters=parameters,
        flops_per_token={part: value / workload.seq for part, value in training.items()},
        flops=flops,
        memory=memory,
        tokens=tokens,
        trail={"steps": (kept := len(run.trail.steps(steps))), "bytes": kept * step_size(model)},
        probing=probing,
        hours=[hours_on(device, run, target.mfu, flops, probing, memory, issuing) for device in target.devices()],
        notes=notes_of(run, target),
    )


def count_parameters(module: RetrievalModule) -> dict[str, int]:
    """Parameters by part; `trainable` of the `total`."""
    counts: dict[str, int] = dict.fromkeys(
        ("total", "trainable", "embedding", "layers", "routing", "head", "final_norm"), 0
    )
    for name, parameter in module.model.named_parameters():  # a tied head is the embedding, and comes once
        part = "embedding" if "embed_tokens" in name else "head" if "lm_head" in name else None
        part = part or ("routing" if kind_of(name) else "layers" if ".layers." in name else "final_norm")
        counts[part] += parameter.numel()
        counts["total"] += parameter.numel()
        counts["trainable"] += parameter.numel() * parameter.requires_grad
    return counts


def hours_on(
    device: Hardware,
    run: ConfiguredRun,
    mfu: float,
    flops: Mapping[str, float],
    probing: ProbePlan,
    memory: Mapping[str, int],
    issuing: float,
) -> Hours:
    """Hours on `device`, with work shared evenly among the run's devices.

    Args:
        issuing: hours to issue the operations of training, which takes no less. Where it takes that long, validation
            and probes are slowed down as much.
    """
    workload, per_tflops = run.workload, 1e12 * mfu * 3600 * run.num_devices  # operations an hour
    rate = device.tflops(workload.autocast or workload.dtype) * per_tflops
    training, validation = flops["training"] / rate, flops["validation"] / rate
    # Probes run outside of autocast, in the precision of the parameters.
    probes = probing.all_flops / (device.tflops(workload.dtype) * per_tflops)
    hours = [part * max(1, issuing / training) for part in (training, validation, probes)]
    fits = None if device.memory_gb is None else step_fits(run, memory, device.memory_gb * 1e9)
    return Hours(device.name, fits, *hours, total=sum(hours))


def step_fits(run: ConfiguredRun, memory: Mapping[str, int], available: float) -> bool | None:
    """Whether a step fits into `available` bytes; `None` where that depends on how it is divided over devices."""
    whole = sum(memory.values())
    kept = memory["activations"] + memory["logits"]  # FSDP2 divides the rest, and gathers some of it for a while
    least = kept + (whole - kept) / run.num_devices if run.is_divided else whole
    return True if whole <= available else None if least <= available else False


def notes_of(run: ConfiguredRun, target: Target) -> list[str]:
    """What is left out or assumed."""
    has_curriculum = run.datamodule.curriculum.config.kind != "off"
    found = {
        "the curriculum starts with shorter sequences: tokens, FLOPs and hours are upper bounds": has_curriculum,
        "data.task.min_pairs is left out: all sequences count as full ones": bool(
            getattr(run.datamodule.task, "min_pairs", None)
        ),
        f"trainer.devices {run.trainer['devices']} is counted as one device": run.trainer["devices"] in ALL_DEVICES,
        f"hours assume {target.mfu:.0%} of the peak rate, and devices that do not wait for each other": True,
        "memory is of tensors alone: the process, a GPU's context and fragmentation come on top": True,
        "fsdp2 divides parameters, gradients and moments over devices: memory is of a device that holds them all, and "
        "where only a share of them fits is '?'": run.is_divided,
        "torch.compile is left out of memory": run.is_compiled,
        "probes at accuracy jumps, and statistics and memory of each probe, come on top": run.probe.settings.enabled,
    }
    return [note for note, applies in found.items() if applies]
