"""An estimate as text: one block for each question, numbers aligned; or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

from probe.training.schedule import percent
from train.estimate.cost import Estimate, Hours

MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "moments": "AdamW's moments",
    "activations": "activations kept for the backward pass",
    "weight_casts": "weights cast to 16 bits",
    "logits": "logits",
    "temporary": "temporary, recomputed layers among it",
    "ddp_buckets": "gradient buckets of DDP",
}
FLOPS = {
    "projections": "attention's projections",
    "attention": "attention",
    "mlp": "MLPs",
    "head": "output head, at queries",
    "routing_logits": "routing, logits",
    "routing_sums": "routing, weighted sums",
}
WIDTH = 44


def table(estimate: Estimate) -> str:
    blocks = [_model(estimate), _parameters(estimate), _flops(estimate), _memory(estimate), _tokens(estimate)]
    blocks += [_probing(estimate), _hours(estimate.hours), [f"- {note}" for note in estimate.notes]]
    return "\n\n".join("\n".join(block) for block in blocks)


def as_json(estimate: Estimate) -> str:
    return json.dumps(asdict(estimate), indent=2)


def amount(value: float) -> str:
    """Three digits and a decimal prefix: 12.3 M."""
    for prefix in ("", " k", " M", " G", " T", " P", " E"):
        if abs(value) < 999.5 or prefix == " E":
            return f"{value:.3g}{prefix}" if prefix else f"{value:.0f}"
        value /= 1000
    raise AssertionError


def size(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.1f} MiB"


def duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def _line(name: str, value: str, share: float | None = None) -> str:
    text = f"{name:<{WIDTH}}{value:>14}"
    return text if share is None else f"{text}  {share:>5.1%}"


def _parts(parts: Mapping[str, float], names: Mapping[str, str], write: Callable[[float], str]) -> Iterable[str]:
    total = sum(parts.values())
    return [_line(f"  {names[part]}", write(value), value / total) for part, value in parts.items() if value]


def _model(estimate: Estimate) -> list[str]:
    about = estimate.model
    shape = f"{about['condition']}, {about['num_hidden_layers']} layers, hidden {about['hidden_size']}"
    data = f"K = {about['num_pairs']}, batch {about['batch_size']}"
    if about["accumulate_grad_batches"] > 1:
        data += f" x {about['accumulate_grad_batches']}"
    devices = f"{about['devices']} device" + "s" * (about["devices"] > 1)
    return [f"{shape}; {data}, {about['precision']}, {about['max_steps']:,} steps on {devices}"]


def _parameters(estimate: Estimate) -> list[str]:
    counts = estimate.parameters
    parts = {name: counts[name] for name in counts if name not in ("total", "trainable") and counts[name]}
    lines = [
        _line(f"  {name.replace('_', ' ')}", f"{value:,}", value / counts["total"]) for name, value in parts.items()
    ]
    return [_line("parameters", f"{counts['total']:,}"), *lines, _line("  trainable", f"{counts['trainable']:,}")]


def _flops(estimate: Estimate) -> list[str]:
    per_token, flops = estimate.flops_per_token, estimate.flops
    return [
        _line("FLOPs per token, forward and backward", amount(sum(per_token.values()))),
        *_parts(per_token, FLOPS, amount),
        _line("FLOPs per step, all devices", amount(flops["step"])),
        _line("FLOPs of training", amount(flops["training"])),
    ]


def _memory(estimate: Estimate) -> list[str]:
    lines = [_line("memory at the peak of a step, one device", size(sum(estimate.memory.values())))]
    lines += _parts(estimate.memory, MEMORY, size)
    if estimate.process_bytes is not None:
        lines.append(_line("the process beside it, host memory", size(estimate.process_bytes)))
    return lines


def _tokens(estimate: Estimate) -> list[str]:
    tokens = estimate.tokens
    return [
        _line("tokens per step, all devices", f"{tokens['step']:,}"),
        _line("tokens of training", amount(tokens["total"])),
    ]


def _probing(estimate: Estimate) -> list[str]:
    probing, flops = estimate.probing, estimate.flops
    lines = []
    if probing["probes"]:
        each = f"each {probing['forward_passes']:.1f} forward passes over {probing['sequences']} sequences"
        each += f"; the one after training {probing['last_forward_passes']:.1f}"
        lines += [_line("scheduled probes", f"{probing['probes']}"), f"  {each}"]
    if probing["max_fraction"] is not None:
        lines.append(f"  and at most {percent(probing['max_fraction'])} of training's time: then fewer")
    lines.append(_line("probing's FLOPs, of training's", f"{probing['share_of_training']:.1%}"))
    return [*lines, _line("validation's FLOPs, of training's", f"{flops['validation'] / flops['training']:.1%}")]


def _hours(hours: list[Hours]) -> list[str]:
    width = max(len(each.hardware) for each in hours) + 2
    head = ("fits", "training", "validation", "probing", "total")
    lines = [f"{'time on':<{width}}" + "".join(f"{name:>12}" for name in head)]
    for each in hours:
        fits = "?" if each.fits is None else "step: yes" if each.fits else "step: NO"  # a probe's memory is not in it
        times = (each.training, each.validation, each.probing, each.total)
        lines.append(f"{each.hardware:<{width}}{fits:>12}" + "".join(f"{duration(value):>12}" for value in times))
    return lines


__all__ = ["as_json", "table"]
