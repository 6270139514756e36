"""What a configuration will cost before it is run: parameters, FLOPs, memory, tokens, hours, and probing's share.

The model is on the "meta" device throughout; only hours of `--hardware here` run anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry

from attnres import AttnResForCausalLM
from probe.training.callback import ProbeCallback
from train.estimate.flops import forward_flops, training_flops
from train.estimate.hardware import HERE, KNOWN, Hardware
from train.estimate.measure import local_device, memory_of, time_steps
from train.estimate.probe_cost import NOTHING, cost_of_probes, plan_probes
from train.estimate.simulate import Workload, simulate_step
from train.recall.data import MQARDataModule
from train.recall.module import RetrievalModule
from train.recall.optim import kind_of
from train.run.sharding import divides

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}
"""`trainer.precision` -> precision of parameters, and of matrix products where that is another."""
ALIASES = {"64": "64-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": "32-true"}
ISSUE_SECONDS = 5e-6
"""What eager PyTorch takes, or more, to issue an operation to a GPU: a rule of thumb. Small steps are bound by it."""
DEFAULT_MFU = 0.3
"""Large trainings have reached 21 to 46 % (arXiv:2204.02311, table 3). Small models keep a GPU less busy: measure."""
ALL_DEVICES = ("auto", "-1", -1)


@dataclass(frozen=True)
class Target:
    """What hours are wanted for.

    Args:
        hardware: a name of `train.estimate.hardware.KNOWN`, "here", or `None` for all that are known.
        peak_tflops: the peak of a device that is not known, in the precision of matrix products.
        memory_gb: its memory, in 10^9 bytes.
        mfu: share of the peak that is reached, recomputation counted as work.

    Raises:
        ValueError: an unknown name, a number out of range, or two statements of the hardware.
    """

    hardware: str | None = None
    peak_tflops: float | None = None
    memory_gb: float | None = None
    mfu: float = DEFAULT_MFU

    def __post_init__(self) -> None:
        if self.hardware not in (None, HERE, *KNOWN):
            known = ", ".join((HERE, *KNOWN))
            raise ValueError(f"hardware '{self.hardware}' is not known; choose from {known}, or give its peak_tflops")
        if self.hardware is not None and self.peak_tflops is not None:
            raise ValueError("give one of hardware and peak_tflops")
        if self.memory_gb is not None and self.peak_tflops is None:
            raise ValueError("memory_gb is that of a device with peak_tflops; give both")
        for name, value in (("peak_tflops", self.peak_tflops), ("memory_gb", self.memory_gb)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must be above 0 and at most 1, got {self.mfu}")

    def devices(self) -> list[Hardware]:
        if self.peak_tflops is not None:
            return [Hardware("as stated", self.peak_tflops, self.peak_tflops, self.memory_gb)]
        return list(KNOWN.values()) if self.hardware is None else [KNOWN[self.hardware]]


@dataclass(frozen=True)
class Hours:
    """Wall-clock hours of a run on one kind of device, and whether a step fits into it (`None`: not known)."""

    hardware: str
    fits: bool | None
    training: float
    validation: float
    probing: float
    total: float


@dataclass(frozen=True)
class Estimate:
    """All of it, in numbers; `train.estimate.table` prints it.

    Attributes:
        model: what is estimated.
        parameters: their number, by part.
        flops_per_token: of a training step, by part; over the tokens of full sequences.
        flops: of a step, and of all training, validation and probing, over all devices.
        memory: bytes at the peak of a step on one device, by part.
        process_bytes: of host memory that Python and its libraries take beside it; `None` where the system does not
            tell.
        tokens: per step and in total, over all devices, with sequences of full length.
        probing: scheduled probes and the one after training, and what one costs.
        hours: by device.
        notes: what is left out or assumed.
    """

    model: dict[str, Any]
    parameters: dict[str, int]
    flops_per_token: dict[str, float]
    flops: dict[str, float]
    memory: dict[str, int]
    process_bytes: int | None
    tokens: dict[str, int]
    probing: dict[str, Any]
    hours: list[Hours]
    notes: list[str]


@dataclass(frozen=True)
class Run:
    """A configured run, as the command line has it: `trainer` holds the options of Lightning's Trainer."""

    module: RetrievalModule
    datamodule: MQARDataModule
    probe: ProbeCallback
    trainer: Mapping[str, Any]

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        return count_devices(self.trainer["devices"]) * self.trainer["num_nodes"]

    @property
    def is_divided(self) -> bool:
        """Whether devices hold parts of the model."""
        return divides(self.trainer["strategy"])

    @property
    def workload(self) -> Workload:
        """Raises ValueError for a precision whose memory is not known here."""
        precision = str(self.trainer["precision"])
        precision = ALIASES.get(precision, precision)
        if precision not in PRECISIONS:
            raise ValueError(f"trainer.precision {precision} is not covered; choose from {', '.join(PRECISIONS)}")
        dtype, autocast = PRECISIONS[precision]
        clip = bool(self.trainer["gradient_clip_val"])
        task, accumulate = self.datamodule.task, self.trainer["accumulate_grad_batches"]
        sizes = (self.datamodule.batch_size, task.num_pairs, task.noise_tokens, accumulate)
        return Workload(*sizes, dtype, autocast, clip)

    @property
    def sequences(self) -> int:
        """Training sequences of a step, over all devices."""
        return self.datamodule.batch_size * self.trainer["accumulate_grad_batches"] * self.num_devices

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

    @property
    def is_probed(self) -> bool:
        return self.probe.settings.enabled and isinstance(self.module.model, AttnResForCausalLM)


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
    parts = str(devices).split(",")
    return int(parts[0]) if len(parts) == 1 else sum(part != "" for part in parts)


def estimate(run: Run, target: Target, build: Callable[[], RetrievalModule]) -> Estimate:
    """What `run` will cost on `target`.

    Args:
        build: the run's module with weights, for `--hardware here`.

    Raises:
        ValueError: the step is to be measured here and does not fit into this machine's memory, or this machine has
            no such device; or rates in its precision are not known.
    """
    process, workload, config = process_bytes(), run.workload, run.module.model.config
    if workload.dtype == torch.float64 and target.hardware != HERE and target.peak_tflops is None:
        raise ValueError(
            f"trainer.precision {run.trainer['precision']} has no rates here; set hardware to '{HERE}', or peak_tflops"
        )
    shape = (workload.seq, workload.num_pairs)
    on_cpu = run.trainer["accelerator"] == "cpu" and target.hardware not in KNOWN
    if target.hardware == HERE:
        on_cpu = local_device(run.trainer["accelerator"]).type == "cpu"
    step = simulate_step(run.module, workload, foreach=not on_cpu)
    memory, parameters = dict(step.memory), count_parameters(run.module)
    if run.num_devices > 1 and not run.is_divided:
        memory["ddp_buckets"] = parameters["trainable"] * workload.dtype.itemsize  # copies of gradients, to reduce
    training, forward = training_flops(run.module.model, *shape), forward_flops(config, *shape)
    steps, probing = run.trainer["max_steps"], plan(run, forward)
    flops = {"step": sum(training.values()) * run.sequences, "training": sum(training.values()) * run.sequences * steps}
    flops |= {"validation": sum(forward.values()) * run.validated}
    trained = flops["training"] + flops["validation"]
    flops |= {"probing": cost_of_probes(probing, probing["flops"], probing["last_flops"], trained)}
    tokens = run.sequences * workload.seq
    return Estimate(
        model=describe(run),
        parameters=parameters,
        flops_per_token={part: value / workload.seq for part, value in training.items()},
        flops=flops,
        memory=memory,
        process_bytes=process,
        tokens={"sequence": workload.seq, "step": tokens, "total": tokens * steps},
        probing={**probing, "share_of_training": flops["probing"] / flops["training"]},
        hours=hours_of(run, target, flops, probing, memory, step.operations, build),
        notes=notes_of(run, target, on_cpu),
    )


def describe(run: Run) -> dict[str, Any]:
    config = run.module.model.config
    keys = ("num_hidden_layers", "hidden_size", "vocab_size")
    sizes = {"num_pairs": run.datamodule.task.num_pairs, "batch_size": run.datamodule.batch_size}
    trainer = {key: run.trainer[key] for key in ("accumulate_grad_batches", "precision", "max_steps")}
    about = {key: getattr(config, key) for key in keys}
    return {"condition": run.module.condition, **about, **sizes, **trainer, "devices": run.num_devices}


def count_parameters(module: RetrievalModule) -> dict[str, int]:
    """Parameters by part; `trainable` of the `total`."""
    names = ("total", "trainable", "embedding", "layers", "routing", "head", "final_norm")
    counts: dict[str, int] = dict.fromkeys(names, 0)
    for name, parameter in module.model.named_parameters():  # a tied head is the embedding, and comes once
        size = parameter.numel()
        part = next((part for key, part in (("embed_tokens", "embedding"), ("lm_head", "head")) if key in name), None)
        part = part or ("routing" if kind_of(name) else "layers" if ".layers." in name else "final_norm")
        counts[part] += size
        counts["total"] += size
        counts["trainable"] += size * parameter.requires_grad
    return counts


def plan(run: Run, forward: Mapping[str, float]) -> dict[str, Any]:
    """The run's probes: `plan_probes`."""
    if not run.is_probed:
        return dict(NOTHING)
    model, steps = run.module.model, run.trainer["max_steps"]
    return plan_probes(run.probe, model, run.datamodule.task, steps, run.num_devices, forward)  # type: ignore[arg-type]


def hours_of(
    run: Run,
    target: Target,
    flops: Mapping[str, float],
    probing: Mapping[str, Any],
    memory: Mapping[str, int],
    operations: int,
    build: Callable[[], RetrievalModule],
) -> list[Hours]:
    """Hours on each device of `target`, work being shared evenly among the run's devices.

    Args:
        operations: of a step; the time to issue them is the least that it takes, unless they are compiled. Passes of
            validation and probes are slowed down as much as a step's.
    """
    if target.hardware == HERE:
        return [measured_hours(run, probing, sum(memory.values()), build)]
    found = []
    for device in target.devices():
        in_half = (run.workload.autocast or run.workload.dtype) in (torch.bfloat16, torch.float16)
        full, half = (
            rate * 1e12 * target.mfu * 3600 * run.num_devices for rate in (device.tflops_32, device.tflops_16)
        )
        trained, validated = (flops[part] / (half if in_half else full) for part in ("training", "validation"))
        # Probes run outside of autocast: in the precision of the parameters.
        each, last = (
            probing[name] / (half if run.workload.dtype.itemsize == 2 else full) for name in ("flops", "last_flops")
        )
        probed = cost_of_probes(probing, each, last, trained + validated)
        if not is_compiled(run.module):
            slower = max(1, run.trainer["max_steps"] * operations * ISSUE_SECONDS / 3600 / trained)
            trained, validated, probed = slower * trained, slower * validated, slower * probed
        fits = None if device.memory_gb is None else step_fits(run, memory, device.memory_gb * 1e9)
        found.append(Hours(device.name, fits, trained, validated, probed, trained + validated + probed))
    return found


def step_fits(run: Run, memory: Mapping[str, int], available: float) -> bool | None:
    """Whether a step fits into `available` bytes; `None` where that depends on how it is divided over devices."""
    whole = sum(memory.values())
    kept = memory["activations"] + memory["logits"]  # FSDP2 divides the rest, and gathers some of it for a while
    least = kept + (whole - kept) / run.num_devices if run.is_divided else whole
    return True if whole <= available else None if least <= available else False


def measured_hours(run: Run, probing: Mapping[str, Any], memory: int, build: Callable[[], RetrievalModule]) -> Hours:
    """Hours at the speed of this machine. Raises ValueError if the step does not fit into it."""
    workload, device = run.workload, local_device(run.trainer["accelerator"])
    available = memory_of(device)
    if available is not None and memory > available:
        raise ValueError(
            f"a step takes {memory / 2**30:.1f} GiB and {device} has {available / 2**30:.1f}: hardware cannot be "
            f"'{HERE}'; name another, or set a smaller data.batch_size or model.gradient_checkpointing"
        )
    timing = time_steps(build(), run.datamodule.task, workload, device)
    sequence = 1 / workload.batch_size / 3600 / run.num_devices
    trained = timing.step * run.trainer["max_steps"] / 3600
    validated = timing.forward * run.validated * sequence
    passes = (probing[name] * probing["sequences"] for name in ("forward_passes", "last_forward_passes"))
    each, last = (timing.probe_forward * number * sequence for number in passes)
    probed = cost_of_probes(probing, each, last, trained + validated)
    fits = None if available is None else True
    return Hours(f"{HERE} ({timing.device})", fits, trained, validated, probed, trained + validated + probed)


def notes_of(run: Run, target: Target, on_cpu: bool) -> list[str]:
    """What is left out or assumed."""
    measured = target.hardware == HERE
    bounded = ", within probe.max_probe_fraction" if run.probe.budget.max_fraction is not None else ""
    share = f"{target.mfu:.0%} of the peak rate" if not measured else "the speed of full steps here"
    found = {
        "the curriculum starts with shorter sequences: tokens, FLOPs and hours are upper bounds": (
            run.datamodule.curriculum.config.kind != "off"
        ),
        "data.min_pairs is left out: all sequences count as full ones": run.datamodule.task.min_pairs is not None,
        f"trainer.devices {run.trainer['devices']} is counted as one device": run.trainer["devices"] in ALL_DEVICES,
        f"hours assume {share}, and devices that do not wait for each other": True,
        "a GPU's context (about 0.5 GB) and fragmentation come on top of the memory": not on_cpu,
        "glibc's malloc can hold far more, in fragments, unless MALLOC_MMAP_THRESHOLD_=65536 is set": on_cpu,
        "fsdp2 divides parameters, gradients and moments over devices: memory is of a device that holds them all, and "
        "where only a share of them fits is '?'": (run.is_divided),
        "torch.compile is left out of memory": is_compiled(run.module),
        "probes at accuracy jumps come on top" + bounded: run.is_probed,
        "the statistics of each probe, and a probe's own memory, come on top": run.is_probed,
    }
    return [note for note, applies in found.items() if applies]


def is_compiled(module: RetrievalModule) -> bool:
    """Whether `model.compile` is set."""
    return module.model._compiled_call_impl is not None


def process_bytes() -> int | None:
    """Peak resident memory of this process, which has the libraries of training loaded and no tensors yet."""
    try:
        import resource
        import sys
    except ImportError:  # no such thing on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


__all__ = [
    "DEFAULT_MFU",
    "Estimate",
    "Hours",
    "Run",
    "Target",
    "check_devices",
    "count_parameters",
    "estimate",
    "plan",
    "process_bytes",
]
