"""Tests import the flat files of the repository root; two threads at most, so that results do not depend on the machine."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")         # before torch is imported: spinning threads stall a busy machine
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
