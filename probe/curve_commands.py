"""What `attnres-probe curves` does: behaviour and flow through training, on the steps of a run's trail."""

from __future__ import annotations

import sys

import pandas as pd
from jsonargparse import Namespace

from probe.commands import check_device, say
from probe.curves import CURVE_KINDS
from probe.failures import in_words
from probe.files.layout import FIGURES, PROBE
from probe.files.locks import held
from probe.files.runs import load_emergence
from probe.files.tables import read_curves
from probe.files.trail import Trail
from probe.report.curves import ACCURACY, describe_curves, known_curves
from probe.report.figures import style
from probe.report.figures.curves import plot_curves
from probe.settings import CurveSettings
from probe.training.curves import measure_curves
from probe.training.shared import FewFailures
from probe.training.trail import settings_of_run


def curves(options: Namespace) -> None:
    probing, _ = settings_of_run(options.run)
    how = {name: getattr(probing, name) for name in ("batch_size", "num_resamples", "seed")}
    asked = {name: options[name] for name in ("kinds", "num_steps", "num_sequences")}
    settings, found, device = CurveSettings(**asked, **how), Trail.of(options.run), check_device(options)
    if found.last_step is None:
        say(f"training in {options.run} has not ended: these are the steps so far", sys.stderr)
    with found.held():
        done = measure_curves(options.run, settings, device=device, report=_report, on_failure=FewFailures(_leave_out))
    table = read_curves(options.run / PROBE)
    if table is None:
        raise ValueError(f"no step of {found.folder} could be measured")
    say(f"{len(done)} steps were measured now -> {options.run / PROBE}", sys.stderr)
    about = table.iloc[-1]
    title = f"{about['run']} ({about['condition']}, seed {about['seed']})"
    say(describe_curves(table, title, load_emergence(options.run)))
    with held(options.run, "report"):
        written = style.save(plot_curves(table, title), options.run / FIGURES / "curves")
    say("\nwritten:\n" + "\n".join(f"  {path}" for path in written))


def _leave_out(step: int, error: Exception) -> None:
    say(f"step {step} is left out: {in_words(error)}", sys.stderr)


def _report(step: int, rows: pd.DataFrame) -> None:
    accuracy = rows.loc[rows["kind"] == ACCURACY, "value"].iloc[0]
    kinds = ", ".join(CURVE_KINDS[name].title for name in dict.fromkeys(known_curves(rows)["kind"]) if name != ACCURACY)
    say(f"step {step}: accuracy {accuracy:.3f}{'; measured ' if kinds else ''}{kinds}", sys.stderr)
