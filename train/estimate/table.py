"""An estimate as text: one block for each question, numbers aligned; or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from train.estimate.cost import CostEstimate

WIDTH = 44


def table(found: CostEstimate) -> str:
    counts = dict(found.parameters)
    total, trainable = counts.pop("total"), counts.pop("trainable")
    per_token, memory = sum(found.flops_per_token.values()), sum(found.memory.values())
    parameters = [_line("parameters", f"{total:,}"), *_parts(counts, "{:,}".format)]
    parameters += [_line("  trainable", f"{trainable:,}")]
    flops = [_line("FLOPs per token, forward and backward", amount(per_token)), *_parts(found.flops_per_token, amount)]
    flops += [_line("FLOPs per step, all devices", amount(found.flops["step"]))]
    flops += [_line("FLOPs of training", amount(found.flops["training"]))]
    at_peak = [_line("memory at the peak of a step, one device", size(memory)), *_parts(found.memory, size)]
    tokens = [_line("tokens per step, all devices", f"{found.tokens['step']:,}")]
    tokens += [_line("tokens of training", amount(found.tokens["total"]))]
    trail = [_line("steps of the trail", f"{found.trail['steps']:,}"), _line("  on disk", size(found.trail["bytes"]))]
    notes = [f"- {note}" for note in found.notes]
    trail = trail if found.trail["steps"] else []
    blocks = [[found.run], parameters, flops, at_peak, tokens, trail, _probing(found), _hours(found), notes]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def as_json(found: CostEstimate) -> str:
    return json.dumps(asdict(found), indent=2)


def amount(value: float) -> str:
    """Three digits and a decimal prefix: 12.3 M."""
    for prefix in ("", " k", " M", " G", " T", " P"):
        if abs(value) < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g} E"


def size(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{num_bytes / 2**20:.1f} MiB"


def duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def _line(name: str, value: str) -> str:
    return f"{name:<{WIDTH}}{value:>14}"


def _parts(parts: Mapping[str, float], write: Callable[[Any], str]) -> list[str]:
    total = sum(parts.values())
    shares = {part: f"  {value / total:>5.1%}" for part, value in parts.items() if value}
    return [_line(f"  {part.replace('_', ' ')}", write(parts[part])) + share for part, share in shares.items()]


def _probing(found: CostEstimate) -> list[str]:
    plan, flops, lines = found.probing, found.flops, []
    if plan.probes:
        each = f"each {plan.forward_passes:.1f} forward passes over {plan.sequences} sequences"
        each += f"; the one after training {plan.last_forward_passes:.1f}"
        lines += [_line("scheduled probes, and of the trail", f"{plan.probes} + {plan.of_trail}"), f"  {each}"]
    if plan.curves:
        each = f"each {plan.curve_forward_passes:.1f} forward passes over {plan.curve_sequences} sequences"
        lines += [_line("steps with curves of behaviour and flow", f"{plan.curves}"), f"  {each}"]
    for part in ("probing", "validation"):
        lines.append(_line(f"{part}'s FLOPs, of training's", f"{flops[part] / flops['training']:.1%}"))
    return lines


def _hours(found: CostEstimate) -> list[str]:
    rows = [["time on", "fits", "training", "validation", "probing", "total"]]
    for each in found.hours:
        fits = "?" if each.fits is None else "step: yes" if each.fits else "step: NO"  # a probe's memory is not in it
        times = (each.training, each.validation, each.probing, each.total)
        rows.append([each.hardware, fits, *map(duration, times)])
    return [f"{name:<11}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in rows]
