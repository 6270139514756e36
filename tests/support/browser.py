"""A browser for the tests of the report page."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

HOW = "no chromium was found: `make browser` installs one (one on PATH, or that ATTNRES_CHROMIUM names, also does)"


@pytest.fixture(scope="module")
def browser():
    """The chromium that ATTNRES_CHROMIUM names, else the one on PATH, else playwright's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = os.environ.get("ATTNRES_CHROMIUM") or shutil.which("chromium")
        if chromium is None:
            chromium = playwright.chromium.executable_path
            if not Path(chromium).is_file():
                pytest.skip(HOW)
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()
