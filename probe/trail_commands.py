"""What the commands of `attnres-probe` do that are about a run's trail."""

from __future__ import annotations

import sys
from dataclasses import replace

from jsonargparse import Namespace

from probe.commands import check_device
from probe.files.layout import PROBE
from probe.files.tables import probed_steps
from probe.files.trail import Trail
from probe.runner import Effects
from probe.training.trail import conclude, probe_trail, settings_of_run, watch_trail


def trail(options: Namespace) -> None:
    settings, planned = settings_of_run(options.run)
    found, device = Trail.of(options.run), check_device(options)
    if options.num_probes is not None:
        settings = replace(settings, trail_probes=options.num_probes)
    if settings.trail_probes < 1:
        raise ValueError(f"--num_probes must be at least 1, got {settings.trail_probes}")
    if found.last_step is None and not options.watch:
        _say(f"training in {options.run} has not ended: these are the steps so far")
    with found.held():
        if options.watch:
            done = watch_trail(options.run, settings, planned, device=device, report=_report)
        else:
            done = probe_trail(options.run, settings, device=device, report=_report)
        emergence = conclude(options.run, settings, {})
    if emergence:
        _say(emergence)
    probed = probed_steps(options.run / PROBE).intersection(found.steps)
    _say(f"{len(probed)} of {len(found.steps)} steps are probed, {len(done)} of them now -> {options.run / PROBE}")


def prune(options: Namespace) -> None:
    found, probed = Trail.of(options.run), probed_steps(options.run / PROBE)
    if found.last_step is None:
        raise ValueError(f"training in {options.run} has not ended: which steps will be probed is not known yet")
    if not probed.intersection(found.steps):
        raise ValueError(f"no step of {found.folder} was probed; attnres-probe trail {options.run} does so")
    with found.held():
        removed = found.prune(probed)
    _say(f"{len(found.steps)} steps are left, {len(removed)} were removed")


def export(options: Namespace) -> None:
    Trail.of(options.run).export(options.step, options.folder)
    _say(f"step {options.step} -> {options.folder}")


def _report(step: int, probe: Effects) -> None:
    _say(f"probed step {step}: accuracy {probe.accuracy:.3f}, {probe.seconds:.1f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
