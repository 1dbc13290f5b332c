"""A few of the random kills and one of each fault of benchmarks/robustness.py, which does hundreds."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_killed_and_faulty_runs_end_as_if_nothing_had_been(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/robustness.py", "--kills", "3", "--faults", "9", "--processes", "1", "--seed", "7",
               "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["kills"]["runs_with_equal_parameters"] == 3 and result["kills"]["kills"] >= 1
    assert result["faults"]["wrong_ends"] == result["faults"]["silent"] == 0 and len(result["faults"]["by_kind"]) == 9
