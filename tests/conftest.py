"""Tests import the flat files of the repository root; two threads at most, so that results do not depend on the machine."""
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")         # before torch is imported: spinning threads stall a busy machine
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

MISSING = []
CONSOLE = []                                                # what the pages of `browser` complained of


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium: browser(width, scheme) -> a new page, whose complaints go to CONSOLE."""
    why = "no browser to be had here" if os.environ.get("NANOT2I_NO_BROWSER") else "not installed"         # the first: .ci/run tried
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None) or pytest.skip(f"chromium: {why}")
    playwright = pytest.importorskip("playwright.sync_api", reason=f"playwright: {why}")
    with playwright.sync_playwright() as driver:
        program = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def page(width=1280, scheme="light"):
            new = program.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
            new.on("console", lambda message: CONSOLE.append(message.text))
            new.on("pageerror", lambda error: CONSOLE.append(str(error)))
            return new
        yield page
        program.close()


@pytest.fixture
def quiet():
    """No page of the test may have complained."""
    CONSOLE.clear()
    yield
    assert CONSOLE == []


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple) and any(w in report.longrepr[2] for w in ("not installed", "could not import")):
        MISSING.append(f"{report.nodeid}: {report.longrepr[2]}")


def pytest_sessionfinish(session):
    """CI installs every package that a test may want: there, a test that skips for the lack of one has failed."""
    if MISSING and os.environ.get("NANOT2I_NO_SKIPS"):
        print("\nskipped for a missing package:\n" + "\n".join(MISSING))
        session.exitstatus = 1
