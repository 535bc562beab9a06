"""Two hundred archives, cut off and flipped at random: read, skipped and counted, or one line; never a
traceback or a dead process.
"""

import json

import pytest

import fresh


@pytest.mark.parametrize("first", [0, 100])
def test_damaged_archives(first, tmp_path):
    done = fresh.run("tests/fuzz.py", first, first + 100, cwd=tmp_path, timeout=100)
    assert done.code == 0, done.err[-3000:]
    counts = json.loads(done.out.splitlines()[-1])
    assert "wrong" not in counts, done.out
    assert (
        sum(counts.values()) == 100 and counts["read"] > 5 and counts["skipped"] > 5 and counts["stopped"] > 5
    ), counts
