"""Does a run end in the same weights whatever happens to it? Random kills, and every kind of fault that a run can meet.

    python benchmarks/robustness.py [--kills 100] [--faults 1000] [--processes 2] [--out benchmarks/results/robustness.json]

Kills: SIGKILL at a random point (in a loader process, after an update, at a change of stage, at every point of a checkpoint's
writing, or at any moment), up to three times a run, each time with other loader workers; the run must end in the parameters of the
uninterrupted one. Faults: each is injected into a small run of its own; a run must then either go on as if nothing had been (its
end has the parameters of a run without the fault, or without the batch) and say so in its log, or stop with one error and be
resumable. Lost updates are those that a resumed run does again. A checkpoint is written beside the training, so a kill during that
costs the updates done meanwhile besides the interval; those are counted apart.
"""

import argparse
import contextlib
import ctypes
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import stopping

import train
from latte import checkpoint, keyed, video
from latte.command import SAVED

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")  # imports are paid once
INTERVAL = 3
KILL_STAGES = ("stages=[{steps: 4, frames: 1, height: 32, width: 32, batch_size: 4}, {steps: 4, frames: 4, height: 32, width: 32, "
               "batch_size: 2}, {steps: 4, frames: 8, height: 32, width: 32, batch_size: 2, fps: [2, 8]}]")
KILLS = ["configs/tiny.yaml", KILL_STAGES, f"train.save_every_steps={INTERVAL}", "train.log_every_steps=2", "preview.count=0"]
# no text, hardly any weights: a run takes half a second
SMALL = ["configs/tiny.yaml", "model.conditioning=none", "model.modulation=block", "model.head_dim=8", "model.heads=1",
         "stages=[{steps: 12, frames: 2, height: 16, width: 16, batch_size: 2}]", f"train.save_every_steps={INTERVAL}",
         "train.log_every_steps=4", "preview.count=0", "guard.window=8", "data.clips=24"]
FAULTS = ("kill", "full disk", "truncation", "bit flip", "missing file", "nan gradient", "spike", "corrupt video", "manifest row")


def forked(argv: list[str], prepare=None, after_s: float | None = None) -> tuple[int, int, str]:
    """The training program in a process of its own: exit code, updates that it came to, what it printed. prepare() runs there
    first; after_s kills it from outside after so many seconds."""
    reached = FORK.Value(ctypes.c_int, 0)
    with tempfile.NamedTemporaryFile("w+") as out:
        def child():
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            torch.set_num_threads(1)
            step = train.RunLog.step

            def count(self, stage):
                step(self, stage)
                reached.value = self.bar.n

            train.RunLog.step = count
            if prepare:
                prepare()
            code = train.main(argv)
            sys.stdout.flush()
            os._exit(code)

        process = FORK.Process(target=child)
        process.start()
        if after_s is not None:
            process.join(after_s)
            process.kill()
        process.join()
        return process.exitcode, reached.value, Path(out.name).read_text(errors="replace")


def counted(what: str, rows):
    """The rows, and a line for every tenth. A progress bar's lock might be held while another thread forks."""
    for number, row in enumerate(rows, 1):
        if number % 10 == 0:
            os.write(2, f"{number} {what}\n".encode())
        yield row


def began_at(said: str) -> int:
    return int(said.partition("from update ")[2].split()[0])


def digest(run: Path) -> str:
    return (run / "parameters.sha256").read_text()


def arm_stage(number: int) -> None:
    """SIGKILL after the first update of stage `number`."""
    step = train.RunLog.step

    def hit(self, stage):
        step(self, stage)
        if stage == number:
            os.kill(os.getpid(), signal.SIGKILL)

    train.RunLog.step = hit


def killed_run(index: int, seed: int, wanted: str) -> dict:
    """One run, killed up to three times, then left to end."""
    draw, kills, lost, writing = keyed.rng(seed, "kills", index), [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        done, dead = 0, False
        for _ in range(int(draw.integers(1, 4))):
            workers = int(draw.integers(0, 4))
            argv = [*KILLS, f"run={run}", f"data.workers={workers}", f"data.prefetch={draw.integers(1, 4)}",
                    f"data.recycle_batches={draw.choice([0, 2, 5])}"]
            where = str(draw.choice(["loader", "step", "write", "hash", "rename", "prune", "stage", "any moment"]))
            most = {"loader": 30, "step": 12, "write": 12, "hash": 12, "rename": 4, "prune": 4, "stage": 3}.get(where, 1)
            number = int(draw.integers(1, most + 1))
            prepare = {"any moment": None, "stage": partial(arm_stage, number - 1)}.get(
                where, partial(stopping.arm, where, number, "SIGKILL"))
            code, reached, said = forked(argv, prepare, draw.uniform(0.1, 4) if where == "any moment" else None)
            if dead and "from update" in said:
                lost.append(done - began_at(said))
            dead, done = code == -signal.SIGKILL, max(reached, began_at(said) if "from update" in said else done)
            writing += dead and any(run.glob("*.writing"))
            kills.append({"where": where, "number": number, "workers": workers, "killed": dead, "reached": reached})
        code, _, said = forked([*KILLS, f"run={run}"])
        if dead:
            lost.append(done - began_at(said))
        return {"index": index, "kills": kills, "equal": code == 0 and digest(run) == wanted, "lost": lost,
                "kills_while_writing": writing, **({} if code == 0 else {"said": said[-500:]})}


@cache
def videos() -> Path:
    """Six small videos and their manifest, made once."""
    folder = Path(tempfile.mkdtemp())
    from data_tools import manifest

    for i in range(6):
        frames = np.full((24, 16, 16, 3), 40 * i, np.uint8)
        frames[:, :, : 2 + 2 * i] = 255 - 30 * i
        video.write(folder / f"{i}.mp4", frames, 8)
        (folder / f"{i}.txt").write_text(f"bar {i}")
    with contextlib.redirect_stdout(None):
        manifest.main([str(folder), str(folder / "manifest.parquet")])
    return folder


def poison(step: int, factor: float) -> None:
    """Multiplies the loss of an update, and with it its gradients."""
    real = train._Run._losses

    def losses(self, part):
        values, times = real(self, part)
        return values * (factor if part.step == step else 1.0), times

    train._Run._losses = losses


def leave_out(step: int) -> None:
    real = train.Guard
    train.Guard = lambda cfg, state=None: real(cfg, {**(state or {}), "left_out": [step]})


def fill_disk(number: int) -> None:
    """The `number`-th file of a checkpoint meets a full disk, half-way."""
    real, count = checkpoint.save_file, [0]

    def full(values, path):
        count[0] += 1
        if count[0] == number:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(values, path)

    checkpoint.save_file = full


@cache
def reference(step: int | None = None) -> str:
    """Parameters of the small run that nothing happens to, or that leaves out an update."""
    with tempfile.TemporaryDirectory() as folder:
        code, _, said = forked([*SMALL, f"run={folder}/run"], partial(leave_out, step) if step is not None else None)
        assert code == 0, said
        return digest(Path(folder) / "run")


def faulty_run(kind: str, index: int, seed: int) -> dict:
    """One fault: what happened, whether it was said, whether the end is right, and how many updates were done twice."""
    draw = keyed.rng(seed, kind, index)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        argv = [*SMALL, f"run={run}"]
        return {"kind": kind, "index": index} | {
            "kill": _kill, "full disk": _full, "truncation": _damage, "bit flip": _damage, "missing file": _damage,
            "nan gradient": _gradient, "spike": _gradient, "corrupt video": _video, "manifest row": _row,
        }[kind](kind, draw, run, argv)


def _log(run: Path, said: str) -> str:
    events = run / "events.jsonl"
    return said + (events.read_text() if events.is_file() else "")


def _kill(kind, draw, run, argv):
    where = str(draw.choice(["loader", "step", "write", "hash", "rename", "prune"]))
    most = {"loader": 24, "step": 12, "rename": 4, "prune": 4}.get(where, 12)
    code, reached, _ = forked(argv, partial(stopping.arm, where, int(draw.integers(1, most + 1)), "SIGKILL"))
    writing = any(run.glob("*.writing"))
    again, _, said = forked(argv)
    return {"right": again == 0 and digest(run) == reference(), "said": code != -signal.SIGKILL or "from update" in said,
            "lost": reached - began_at(said) if code else 0, "while_writing": writing}


def _full(kind, draw, run, argv):
    code, reached, said = forked(argv, partial(fill_disk, int(draw.integers(1, 13))))
    again, _, later = forked(argv)
    return {"right": code == 1 and again == 0 and digest(run) == reference(), "said": "No space left" in said,
            "lost": reached - began_at(later), "while_writing": True}


def _damage(kind, draw, run, argv):
    stop = int(draw.integers(INTERVAL, 12))
    code, reached, _ = forked(argv, partial(stopping.arm, "step", stop, "SIGTERM"))
    files = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]
    path = checkpoint.latest(run) / str(draw.choice(files))
    content = bytearray(path.read_bytes())
    if kind == "missing file":
        path.unlink()
    elif kind == "truncation":
        path.write_bytes(content[:int(draw.integers(len(content)))])
    else:
        content[int(draw.integers(len(content)))] ^= 1 << int(draw.integers(8))
        path.write_bytes(content)
    again, _, said = forked(argv)
    lost = reached - began_at(said) if "from update" in said else 0
    told = "damaged checkpoint" in said or "none of its" in said
    stopped = "none of its" in said and again == 1  # there was only this one: the run refuses to start anew
    return {"right": code == SAVED and (stopped or (again == 0 and digest(run) == reference())), "said": told, "lost": lost,
            "while_writing": False}


def _gradient(kind, draw, run, argv):
    step = int(draw.integers(5 if kind == "spike" else 0, 11))
    factor = 1e9 if kind == "spike" else float(draw.choice([np.nan, np.inf, -np.inf]))
    code, _, said = forked([*argv, f"guard.spike={draw.choice(['skip', 'rollback'])}"], partial(poison, step, factor))
    log = _log(run, said)
    return {"right": code == 0 and digest(run) == reference(step),
            "said": f"update {step + 1} skipped" in log and "samples " in log, "lost": INTERVAL if "back to update" in log else 0,
            "while_writing": False}


def _video(kind, draw, run, argv):
    folder = run.parent / "videos"
    shutil.copytree(videos(), folder)
    victim = folder / f"{draw.integers(6)}.mp4"
    content = victim.read_bytes()
    kept = int(draw.integers(len(content) - 1))
    before = bool(draw.integers(2))  # damaged before the run opens its folder, or after it

    def damage():
        victim.write_bytes(content[:kept])

    def later():
        opened = train.open_clips

        def open_then_damage(*args):
            clips = opened(*args)
            damage()
            return clips

        train.open_clips = open_then_damage

    if before:
        damage()
    code, _, said = forked([*argv, "data.source=folder", f"data.path={folder}", "data.clips=0",
                            "stages=[{steps: 12, frames: 24, height: 16, width: 16, batch_size: 2}]"], None if before else later)
    return {"right": code == 0, "said": victim.name in _log(run, said) or unharmed(victim), "lost": 0, "while_writing": False}


def unharmed(path: Path) -> bool:
    """Whether all pixels of a cut file are in the part that is left."""
    try:
        return np.array_equal(video.read(path, 0.0, 24, 8.0), video.read(videos() / path.name, 0.0, 24, 8.0))
    except ValueError:
        return False


def _row(kind, draw, run, argv):
    import pyarrow
    import pyarrow.parquet as parquet

    folder = run.parent / "videos"
    shutil.copytree(videos(), folder)
    table = parquet.read_table(folder / "manifest.parquet")
    rows, victim = table.to_pylist(), int(draw.integers(6))
    column = str(draw.choice(["path", "fps", "start_s", "end_s", "id"]))
    rows[victim][column] = None if draw.integers(2) or column in ("path", "id") else float(draw.choice([np.nan, -1.0, np.inf]))
    loose = pyarrow.schema([field.with_nullable(True) for field in table.schema])  # as other tools write them
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=loose), folder / "manifest.parquet")
    code, _, said = forked([*argv, "data.source=manifest", f"data.path={folder / 'manifest.parquet'}", "data.clips=0"])
    return {"right": code == 0, "said": "unreadable manifest row" in said, "lost": 0, "while_writing": False}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "robustness.json"))
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    started = time.perf_counter()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {"command": " ".join(["python", "benchmarks/robustness.py", *(argv if argv is not None else sys.argv[1:])]),
              "commit": commit, "versions": checkpoint.versions(), "interval": INTERVAL}
    bad = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.processes) as pool:
        if args.kills:
            code, _, said = forked([*KILLS, f"run={folder}/run"])
            assert code == 0, said
            wanted = digest(Path(folder) / "run")
            done = pool.map(lambda index: killed_run(index, args.seed, wanted), range(args.kills))
            rows = list(counted("killed runs", done))
            bad += [row for row in rows if not row["equal"]]
            kills = [kill for row in rows for kill in row["kills"] if kill["killed"]]
            lost = [value for row in rows for value in row["lost"]]
            result["kills"] = {"runs": len(rows), "runs_with_equal_parameters": sum(row["equal"] for row in rows),
                               "kills": len(kills), "by_place": dict(Counter(kill["where"] for kill in kills)),
                               "kills_while_writing": sum(row["kills_while_writing"] for row in rows),
                               "lost_updates": dict(sorted(Counter(lost).items())), "rows": rows}
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
        if args.faults:
            videos(), reference()
            jobs = [(FAULTS[i % len(FAULTS)], i // len(FAULTS)) for i in range(args.faults)]
            done = pool.map(lambda job: faulty_run(*job, args.seed), jobs)
            rows = list(counted("faults", done))
            bad += [row for row in rows if not (row["right"] and row["said"])]
            table = {}
            for kind in FAULTS:
                mine = [row for row in rows if row["kind"] == kind]
                if mine:
                    table[kind] = {"faults": len(mine), "right_end": sum(row["right"] for row in mine),
                                   "said": sum(row["said"] for row in mine), "most_lost": max(row["lost"] for row in mine),
                                   "most_lost_outside_writing": max((r["lost"] for r in mine if not r["while_writing"]), default=0)}
            result["faults"] = {"injected": len(rows), "wrong_ends": sum(not row["right"] for row in rows),
                                "silent": sum(not row["said"] for row in rows), "by_kind": table}
    result["seconds"] = round(time.perf_counter() - started)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    if args.kills:
        print(json.dumps({key: value for key, value in result["kills"].items() if key != "rows"}))
    if args.faults:
        print("| fault | injected | right end | said | most updates done twice | outside a checkpoint's writing |")
        print("|---|---|---|---|---|---|")
        for kind, row in table.items():
            print("| " + " | ".join(map(str, [kind, *row.values()])) + " |")
    for row in bad[:10]:
        print(f"NOT AS PROMISED: {row}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
