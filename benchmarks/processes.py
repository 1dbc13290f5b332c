"""Do the weights depend on the number of processes? One run on 1 -> 2 -> 4 -> 1 processes, stopped between them, against 1 alone.

    python benchmarks/processes.py [--out benchmarks/results/processes.json]

configs/tiny.yaml under `accelerate launch` on gloo, in deterministic mode (the same bits are promised) and without (1e-6; with
Adam's eps at 1e-6, because at 1e-8 a weight whose gradient is all rounding error moves by a few 1e-6 at once).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from latte import checkpoint

ROOT = Path(__file__).parent.parent
CHANGES = ["configs/tiny.yaml", "stages.0.steps=4", "stages.1.steps=4", "train.save_every_steps=100", "preview.count=0",
           "optim.eps=1e-6"]
LEGS = ((1, 2), (2, 2), (4, 2), (1, 2))  # processes, updates


def leg(run: Path, processes: int, updates: int | None, *changes: str) -> None:
    several = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"] if processes > 1 else []
    program = ["tests/stopping.py", "step", str(updates), "SIGTERM"] if updates else ["train.py"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *several, *program, *CHANGES, f"run={run}", *changes], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    if f"on {processes} process(es)" not in done.stdout + done.stderr:
        raise RuntimeError(done.stderr[-2000:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "processes.json"))
    args = parser.parse_args()
    result = {}
    for mode, changes in (("deterministic", ["train.deterministic=true"]), ("plain", [])):
        with tempfile.TemporaryDirectory() as folder:
            alone, mixed = Path(folder) / "alone", Path(folder) / "mixed"
            leg(alone, 1, None, *changes)
            for processes, updates in LEGS:
                leg(mixed, processes, updates, *changes)
            ends = [checkpoint.latest(run) for run in (alone, mixed)]
            assert ends[0].name == ends[1].name, ends
            result[mode] = {}
            for name in ("model", "ema"):
                a, b = (load_file(end / f"{name}.safetensors") for end in ends)
                result[mode][f"largest difference in {name}"] = max((a[key] - b[key]).abs().max().item() for key in a)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {"command": " ".join(["python", "benchmarks/processes.py", *sys.argv[1:]]), "commit": commit,
              "versions": checkpoint.versions(), "processes_and_updates": LEGS, **result}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(any(result["deterministic"].values()) or max(result["plain"].values()) > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
