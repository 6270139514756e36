"""The layout of a W&B workspace for runs of attnres (`attnres-train panels`); docs/loggers.md has it as a table."""

from __future__ import annotations

from typing import Any

from attnres import FAMILIES, REGIONS, SUBLAYERS
from probe.training.publish import (
    ACCURACY,
    CLEAN_MARGIN,
    CURVES_FIGURE,
    EFFECTS_TABLE,
    HARM,
    HEAT_MAPS,
    INTEGRATED,
    MASS,
    MOTIFS_TABLE,
    NLL,
    STRENGTH,
    metric_name,
)
from probe.vocabulary import ALL, SUBLAYER_TITLES
from train.loggers.wandb_files import STEP

PACKAGE = "wandb_workspaces"
NAME = "attnres"


def _families(quantity: str, sublayer: str, scope: str) -> tuple[str, ...]:
    return tuple(metric_name(quantity, sublayer, scope, family) for family in FAMILIES)


def _grid(quantity: str) -> dict[str, tuple[str, ...]]:
    """A panel for each region of each sublayer, with a curve for each family."""
    cells = [(sublayer, scope) for sublayer in SUBLAYERS for scope in (*REGIONS, ALL)]
    return {f"{SUBLAYER_TITLES[sublayer]} {scope}": _families(quantity, sublayer, scope) for sublayer, scope in cells}


TRAINING = ("learning_rate", "grad_norm_queries", "grad_norm_gains", "grad_norm_biases")
LAYOUT = {
    "Learning": {
        "accuracy": ("val/accuracy", ACCURACY, "train/accuracy"),
        "margin (nats)": (CLEAN_MARGIN,),
        "size of training examples": ("train/size",),
        "mass and strength, region by family": (HEAT_MAPS,),
        "loss": ("val/loss", NLL, "train/loss"),
    },
    "Strength of masking a family (share of the margin)": _grid(STRENGTH),
    "Routing mass": _grid(MASS),
    "Does the output follow a changed value?": {
        "flip test": tuple(f"probe_flip/{name}/{ALL}" for name in ("follows", "moves", "follows_other", "moves_other")),
        "behaviour and flow, with onsets": (CURVES_FIGURE,),
    },
    "Results at the end": {
        "effects with intervals, of every probe": (EFFECTS_TABLE,),
        "motifs: when they emerged": (MOTIFS_TABLE,),
    },
    "Harm of masking a family (nats of the margin)": _grid(HARM),
    "Strength, estimated (probe.mode integrated or both)": _grid(INTEGRATED[STRENGTH]),
    "Final read (block_sum)": {
        "strength of masking a family": _families(STRENGTH, "final", "final"),
        "routing mass": _families(MASS, "final", "final"),
    },
    "Training": {name: (name,) for name in (*(f"train/{n}" for n in TRAINING), "throughput/tokens_per_second")},
}
"""Sections from the top: the metrics of each panel by its title. An image or a table has one name."""
NUM_OPEN = 5
"""Sections after these are folded."""


def layout_table() -> str:
    """The layout in Markdown."""
    lines = ["| section | panels | metrics |", "|---|---|---|"]
    for index, (section, panels) in enumerate(LAYOUT.items()):
        patterns = dict.fromkeys(f"`{_pattern(name)}`" for names in panels.values() for name in names)
        folded = " (folded)" if index >= NUM_OPEN else ""
        lines.append(f"| {section}{folded} | {'; '.join(panels)} | {', '.join(patterns)} |")
    return "\n".join(lines)


def _pattern(name: str) -> str:
    """A name that stands for those of all cells."""
    quantity, *cell = name.split("/")
    if len(cell) != 3:
        return name
    return metric_name(quantity, *(("final", "final") if cell[0] == "final" else ("SUBLAYER", "REGION")), "FAMILY")


def build_workspace(entity: str, project: str) -> Any:
    """The layout as a `wandb_workspaces` Workspace, which is not saved yet; needs no network."""
    from wandb_workspaces import workspaces  # type: ignore[import-not-found]

    columns = workspaces.SectionLayoutSettings(columns=4)
    sections = [
        workspaces.Section(
            name,
            [_panel(title, list(metrics)) for title, metrics in panels.items()],
            is_open=index < NUM_OPEN,
            layout_settings=columns,
        )
        for index, (name, panels) in enumerate(LAYOUT.items())
    ]
    settings = workspaces.WorkspaceSettings(x_axis=STEP, group_by_prefix="first", max_runs=20)
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def _panel(title: str, metrics: list[Any]) -> Any:
    from wandb_workspaces.reports import v2 as reports  # type: ignore[import-not-found]

    if metrics[0] in (HEAT_MAPS, CURVES_FIGURE):
        return reports.MediaBrowser(title=title, media_keys=metrics)
    if metrics[0] in (EFFECTS_TABLE, MOTIFS_TABLE):
        return reports.WeavePanelSummaryTable(table_name=metrics[0])
    return reports.LinePlot(title=title, x=STEP, y=metrics)
