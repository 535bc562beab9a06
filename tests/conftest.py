"""Tests import the flat files of the repository root; two threads at most, so that results do not depend on the machine."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")         # before torch is imported: spinning threads stall a busy machine
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

MISSING = []


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple) and any(w in report.longrepr[2] for w in ("not installed", "could not import")):
        MISSING.append(f"{report.nodeid}: {report.longrepr[2]}")


def pytest_sessionfinish(session):
    """CI installs every package that a test may want: there, a test that skips for the lack of one has failed."""
    if MISSING and os.environ.get("NANOT2I_NO_SKIPS"):
        print("\nskipped for a missing package:\n" + "\n".join(MISSING))
        session.exitstatus = 1
