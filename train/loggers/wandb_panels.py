"""The layout of a W&B workspace for runs of attnres (`attnres-train panels`); docs/training.md has it as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from attnres import FAMILIES, REGIONS, SUBLAYERS
from probe.training.publish import ACCURACY, EFFECTS_TABLE, HEAT_MAPS, MASS, MOTIFS_TABLE, NLL, metric_name
from train.loggers.wandb_files import STEP

PACKAGE = "wandb_workspaces"
NAME = "attnres"
TITLES = {"self_attn": "attention", "mlp": "MLP"}


@dataclass(frozen=True)
class Panel:
    """Curves over training steps, or an image or a table, of which `metrics` has the one name."""

    title: str
    metrics: tuple[str, ...]
    kind: Literal["lines", "image", "table"] = "lines"


@dataclass(frozen=True)
class Section:
    name: str
    panels: tuple[Panel, ...]
    is_open: bool = True


def _families(quantity: str, sublayer: str, scope: str) -> tuple[str, ...]:
    return tuple(metric_name(quantity, sublayer, scope, family) for family in FAMILIES)


def _grid(quantity: str) -> tuple[Panel, ...]:
    """A panel for each region of each sublayer, with a curve for each family."""
    cells = [(sublayer, scope) for sublayer in SUBLAYERS for scope in (*REGIONS, "all")]
    return tuple(Panel(f"{TITLES[s]} {scope}", _families(quantity, s, scope)) for s, scope in cells)


def _single(*names: str) -> tuple[Panel, ...]:
    return tuple(Panel(name, (name,)) for name in names)


LAYOUT = (
    Section(
        "Learning",
        (
            Panel("accuracy", ("val/accuracy", ACCURACY, "train/accuracy")),
            Panel("loss", ("val/loss", NLL, "train/loss")),
            Panel("pairs in training", ("train/pairs",)),
            Panel("mass and effect, layer by family", (HEAT_MAPS,), "image"),
        ),
    ),
    Section("Effect of masking a family (nats)", _grid("probe_effect")),
    Section("Routing mass", _grid(MASS)),
    Section(
        "Results at the end",
        (
            Panel("effects with intervals, of every probe", (EFFECTS_TABLE,), "table"),
            Panel("motifs: when they emerged", (MOTIFS_TABLE,), "table"),
        ),
    ),
    Section("Effect to first order (nats; probe.mode first_order or both)", _grid("probe_first_order"), False),
    Section(
        "Final read (block_sum)",
        (
            Panel("effect of masking a family (nats)", _families("probe_effect", "final", "final")),
            Panel("routing mass", _families(MASS, "final", "final")),
        ),
        False,
    ),
    Section(
        "Training",
        _single("train/learning_rate", *(f"train/grad_norm_{kind}" for kind in ("queries", "gains", "biases")))
        + _single("throughput/tokens_per_second"),
        False,
    ),
)
"""Sections from the top, each with its panels."""


def layout_table() -> str:
    """The layout in Markdown."""
    lines = ["| section | panels | metrics |", "|---|---|---|"]
    for section in LAYOUT:
        titles = "; ".join(panel.title for panel in section.panels)
        names = ", ".join(f"`{name}`" for name in _abridged([name for p in section.panels for name in p.metrics]))
        lines.append(f"| {section.name}{'' if section.is_open else ' (folded)'} | {titles} | {names} |")
    return "\n".join(lines)


def _abridged(names: Sequence[str]) -> list[str]:
    """Names of cells (three slashes) as one pattern for each quantity."""
    short = [f"{name.split('/')[0]}/SUBLAYER/REGION/FAMILY" if name.count("/") == 3 else name for name in names]
    if all("/final/final/" in name for name in names):
        short = [f"{name.split('/')[0]}/final/final/FAMILY" for name in names]
    return list(dict.fromkeys(short))


def build_workspace(entity: str, project: str) -> Any:
    """The layout as a `wandb_workspaces` Workspace, which is not saved yet; needs no network."""
    from wandb_workspaces import workspaces  # type: ignore[import-not-found]

    columns = workspaces.SectionLayoutSettings(columns=4)
    sections = [
        workspaces.Section(section.name, [_panel(p) for p in section.panels], section.is_open, layout_settings=columns)
        for section in LAYOUT
    ]
    settings = workspaces.WorkspaceSettings(x_axis=STEP, group_by_prefix="first", max_runs=20)
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def _panel(panel: Panel) -> Any:
    from wandb_workspaces.reports import v2 as reports  # type: ignore[import-not-found]

    if panel.kind == "image":
        return reports.MediaBrowser(title=panel.title, media_keys=list(panel.metrics))
    if panel.kind == "table":
        return reports.WeavePanelSummaryTable(table_name=panel.metrics[0])
    return reports.LinePlot(title=panel.title, x=STEP, y=list(panel.metrics))


__all__ = ["LAYOUT", "PACKAGE", "Panel", "Section", "build_workspace", "layout_table"]
