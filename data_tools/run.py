"""Prepares a data set: the stages of a corpus's YAML in their order, on this machine, on Ray or as a Slurm array.

    python -m data_tools.run configs/data/NAME.yaml [key=value ...] [--dry-run] [--again STAGE]

    out: out/data/NAME
    stages:                        # NAME or NAME-WORDS, so that a stage may come twice
      ingest: {lists: [{kind: internvid, list: flt.jsonl, files: videos}]}
      filter-list: {keep: {length_s: [2, null]}}
      clean: {grade: fast}

A stage reads the manifest of the one before it and writes OUT/stages/NN-NAME.parquet; the last one is OUT/manifest.parquet too.
Paths in all of them start at OUT. Rows come in batches, and each batch leaves a part that is not made again: the same command goes
on after any end, kill -9 too, with the same bytes. Batches do not depend on the executor or on the number of workers. Rows
travel to the workers, never frames. A clip that ends its process, hangs or fails costs itself alone. A stage with the same
settings, version and input is not run again: to change a threshold computes no score.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from data_tools import manifest, survival
from data_tools.manifest import Job, Row
from data_tools.stage import write_json
from data_tools.workers import Call, Stage, on_processes, on_ray
from latte import config
from latte.command import command
from latte.video import renamed_when_whole

BATCHES = 64  # that a stage has at least, rows allowing, so that workers end together
POLL_S = 1.0
PACKAGES = ("av", "numpy", "opencv-python-headless", "torch", "scipy", "onnxruntime", "pyarrow")  # which pixels and files depend on


@dataclass(kw_only=True)
class Run:
    """A corpus's YAML."""

    out: str  # the folder of all that is made; on a cluster, one that every machine sees
    stages: dict[str, Any]  # name -> settings, in order; the first is ingest
    executor: Literal["processes", "ray", "slurm"] = "processes"
    workers: int = 0  # processes on a machine; 0: one a core
    timeout_s: float = 3600.0  # for one clip in one stage; it is dropped after that
    ray_address: str = ""  # of a running cluster; "": one on this machine
    slurm_tasks: int = 8  # of the array, each with `workers` processes
    slurm_options: list[str] = field(default_factory=list)  # for sbatch, such as --time=12:00:00
    patience_s: float = 1800.0  # after which a task of the array does what another one has left undone

    def __post_init__(self):
        for key in ("workers", "timeout_s", "patience_s"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: must not be negative, got {getattr(self, key)}")
        if self.slurm_tasks < 1:
            raise ValueError(f"slurm_tasks: must be 1 or more, got {self.slurm_tasks}")
        if not self.out or not self.stages:
            raise ValueError(f"{'stages' if self.out else 'out'}: must be given")


INGEST = Stage("data_tools.ingest")
STAGES = {
    "gather": Stage("data_tools.stitch", manifest.ROWS, "gather", "GatherSettings"), "clean": Stage("data_tools.clean", 4),
    "shots": Stage("data_tools.shots"), "stitch": Stage("data_tools.stitch"), "score": Stage("data_tools.score"),
    "filter": Stage("data_tools.filter", manifest.ROWS), "dedupe": Stage("data_tools.dedupe", whole=True),
    "cut": Stage("data_tools.cut"), "shard": Stage("data_tools.shard", whole=True)}


class Step(NamedTuple):
    """A stage of a run."""

    number: int
    name: str
    stage: Stage
    settings: Any
    about: list[list]  # [name, settings, version] of this step and all before it

    @property
    def title(self) -> str:
        return f"{self.number:02d}-{self.name}"


def load(path: str | Path, overrides: list[str] = ()) -> tuple[Run, list[Step]]:
    """A corpus's YAML, with `key=value` overrides. Raises ValueError naming the file or the key, and what would be right."""
    cfg = config.section(Run, config.load_tree(path, overrides), "")
    steps, about = [], []
    for number, (name, values) in enumerate(cfg.stages.items()):
        kind = name.partition("-")[0]
        if (kind == "ingest") != (number == 0):
            raise ValueError(f"stages.{name}: ingest comes first, and only there")
        stage = INGEST if number == 0 else STAGES.get(kind)
        if stage is None:
            raise ValueError(f"stages.{name}: no such stage; there are ingest, {', '.join(STAGES)}, also as NAME-WORDS")
        settings = config.section(stage.part(stage.settings), values or {}, f"stages.{name}")
        about = [*about, [name, dataclasses.asdict(settings), str(stage.part("VERSION"))]]
        steps.append(Step(number, name, stage, settings, about))
    return cfg, steps


def _record(target: Path) -> dict[str, Any]:
    """What is known of a stage's manifest; {} where it was not ended."""
    path = target.with_suffix(".json")
    return json.loads(path.read_text()) if path.is_file() and target.is_file() else {}


def _key(step: Step, before: Path | None) -> str:
    """What a stage's manifest depends on: code, settings, and the rows that it is made of."""
    known = step.stage.part("inputs")(step.settings) if before is None else _record(before)["sha256"]
    return hashlib.sha256(json.dumps([step.about[-1], known], sort_keys=True, default=str).encode()).hexdigest()


def _rows(table: pa.Table) -> Iterator[Row]:
    for part in table.to_batches(manifest.ROWS):
        yield from part.to_pylist(maps_as_pydicts="strict")


def _dropped(path: Path) -> Iterator[Row]:
    return (row for rows in manifest.batches(path) for row in rows if row["dropped"])


def _batches(step: Step, table: pa.Table) -> Iterator[list[Row]]:
    """The live rows in batches, those of a group together; a function of rows and stage alone."""
    group, size = step.stage.part("group"), manifest.ROWS
    if not step.stage.here(step.settings):
        size = max(1, min(step.stage.rows, len(table) // BATCHES))
    if group is None:
        rows = _rows(table)
        while batch := list(itertools.islice(rows, size)):
            yield batch
        return
    together: dict[str, list[int]] = {}
    for place, row in enumerate(_rows(table)):
        together.setdefault(group(row), []).append(place)
    places: list[int] = []
    for members in together.values():
        places += members
        if len(places) >= size:
            yield list(_rows(table.take(places)))
            places = []
    if places:
        yield list(_rows(table.take(places)))


def run(cfg: Run, steps: list[Step], task: tuple[int, int] = (0, 1), again: tuple[str, ...] = ()) -> Path:
    """Runs what is not done yet; gives the last manifest.

    task: which of how many programs this is that share the work through the folder. again: stages that are run anew.
    Raises ValueError naming what is wrong with a list or setting, OSError when files cannot be written.
    """
    out = Path(cfg.out)
    (out / "stages").mkdir(parents=True, exist_ok=True)
    with _alone(out) if task[1] == 1 else contextlib.nullcontext():
        if task[1] == 1:
            for left in out.rglob(".*.part"):
                left.unlink(missing_ok=True)
        before = None
        for step in steps:
            before = _step(cfg, step, before, out, task, step.name in again)
            for later in steps if step.number == 0 else ():
                ask = later.stage.part("ask")  # what would end the run at last had better end it now
                if ask:
                    ask(before, later.settings)
        if task[0] == 0:
            _publish(out, before, steps)
    return before


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    with open(out / "run.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out}: another run works in this folder; wait for it, or give another `out`") from None
        yield


def _step(cfg: Run, step: Step, before: Path | None, out: Path, task: tuple[int, int], anew: bool) -> Path:
    target = out / "stages" / f"{step.title}.parquet"
    key = _key(step, before)
    if anew and task[0] == 0:
        target.with_suffix(".json").unlink(missing_ok=True)
        _forget(target)
    parts = target.with_name(f"{step.title}.{key[:12]}")

    def ended() -> bool:
        return _record(target).get("key") == key

    if ended():
        return target
    if before is None or step.stage.here(step.settings):
        if task[0] and _waited(ended, cfg.patience_s):
            return target
        rows = step.stage.part("listed")(step.settings, out) if before is None else _done_here(step, before, out)
    else:
        _work(cfg, step, before, out, parts, task, ended)
        if task[0] and _waited(ended, cfg.patience_s):
            return target
        rows = (row for part in sorted(parts.glob("part-*.parquet")) for row in manifest.read(part))
    made = manifest.write(target, itertools.chain(rows, _dropped(before) if before else ()), _about(step))
    write_json(target.with_suffix(".json"), {"key": key, "rows": made, "sha256": manifest.sha256_of(target)})
    _forget(target)
    return target


def _forget(target: Path) -> None:
    """Removes the parts of a stage that is done or to be done anew."""
    for left in target.parent.glob(f"{target.stem}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


def _about(step: Step) -> dict[str, Any]:
    return {"stages": step.about, "versions": {name: version(name) for name in PACKAGES}}


def _done_here(step: Step, before: Path, out: Path) -> Iterator[Row]:
    work, table = step.stage.part(step.stage.work), manifest.live(before)
    batches = [list(_rows(table))] if step.stage.whole else _batches(step, table)
    for number, rows in enumerate(tqdm(batches, desc=step.name, unit=" batches", disable=None)):
        yield from work(rows, Job(out, step.settings, number))


def _work(cfg: Run, step: Step, before: Path, out: Path, parts: Path, task: tuple[int, int], ended: Callable[[], bool]) -> None:
    """Does all batches that have no part yet: in a task, its own, and then those that others leave undone, until all are there."""
    parts.mkdir(exist_ok=True)
    table = manifest.live(before)

    def todo(mine: bool) -> Iterator[Call]:
        for number, rows in enumerate(_batches(step, table)):
            part = parts / f"part-{number:06d}.parquet"
            if not part.is_file() and (not mine or number % task[1] == task[0]):
                yield Call(step.stage, Job(out, step.settings, number), rows, part)

    _carry_out(cfg, step, todo(True), len(table))
    if task[1] > 1:
        wanted = sum(1 for _ in _batches(step, table))
        while not _waited(lambda: ended() or len(list(parts.glob("part-*.parquet"))) == wanted, cfg.patience_s):
            _carry_out(cfg, step, todo(False), 0)


def _waited(ready: Callable[[], bool], patience_s: float) -> bool:
    """Whether it came to be in this time."""
    until = time.monotonic() + patience_s
    while not ready():
        if time.monotonic() > until:
            return False
        time.sleep(POLL_S)
    return True


def _carry_out(cfg: Run, step: Step, calls: Iterable[Call], total: int) -> None:
    first = next(iter(calls := iter(calls)), None)
    if first is None:
        return
    workers = cfg.workers or os.cpu_count() or 1
    spread = functools.partial(on_ray, workers=workers, timeout_s=cfg.timeout_s, address=cfg.ray_address) if (
        cfg.executor == "ray") else functools.partial(on_processes, workers=workers, timeout_s=cfg.timeout_s)
    failed = []
    with tqdm(total=total or None, desc=step.name, unit=" clips", disable=None) as bar:
        for call, wrong in spread(itertools.chain([first], calls)):
            if wrong is not None:
                failed.append(call)
            bar.update(len(call.rows))
    for call in failed:
        _one_by_one(step, call, spread)


def _one_by_one(step: Step, call: Call, spread: Callable) -> None:
    """A batch that failed: each group of its rows again, alone, so that only those that fail again are dropped."""
    group = step.stage.part("group")
    together: dict[Any, list[Row]] = {}
    for number, row in enumerate(call.rows):
        together.setdefault(group(row) if group else number, []).append(row)
    done = []
    for number, rows in enumerate(together.values()):
        alone = call._replace(rows=rows, part=call.part.with_name(f"alone-{call.job.number}-{number}.parquet"))
        (_, wrong), = spread([alone])
        if wrong is None:
            done += manifest.read(alone.part)
            alone.part.unlink()
        else:
            print(f"{step.name}: {rows[0]['id'][:16]} ({rows[0]['path']}): {wrong}", file=sys.stderr)
            why = f"{step.name} {wrong.splitlines()[-1]}"
            done += [row | {"dropped": why} for row in rows]
            write_json(call.job.out / "failures" / f"{step.title}-{rows[0]['id'][:16]}.json", wrong.splitlines())
    manifest.write(call.part, done)


def _publish(out: Path, last: Path, steps: list[Step]) -> None:
    """The last manifest again as OUT/manifest.parquet, and what tells of the run."""
    with renamed_when_whole(out / "manifest.parquet") as part:
        shutil.copyfile(last, part)
    write_json(out / "run.json", _about(steps[-1]))
    publish = steps[-1].stage.part("publish")
    if publish:
        publish(out)
    stages = [(step.name, step.about[-1][1], out / "stages" / f"{step.title}.parquet") for step in steps]
    print(survival.page(stages, out / "survival.html", out))


def _submit(cfg: Run, argv: list[str]) -> None:
    """Writes OUT/slurm.sh, an array of tasks that share the work through the folder, and hands it in where there is sbatch."""
    script = Path(cfg.out) / "slurm.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    options = [f"--array=0-{cfg.slurm_tasks - 1}", f"--cpus-per-task={cfg.workers or 1}", f"--output={cfg.out}/slurm-%a.log",
               *cfg.slurm_options]
    command = shlex.join([sys.executable, "-m", "data_tools.run", *argv])
    script.write_text("#!/bin/bash\n" + "".join(f"#SBATCH {option}\n" for option in options) + f"{command}\n")
    if shutil.which("sbatch") is None:
        print(f"{script}: written; there is no sbatch here, so hand it in where there is")
    else:
        subprocess.run(["sbatch", str(script)], check=True)


def _task() -> tuple[int, int] | None:
    """Which task of a Slurm array this program is, of how many."""
    number = os.environ.get("SLURM_ARRAY_TASK_ID")
    if number is None:
        return None
    return int(number) - int(os.environ["SLURM_ARRAY_TASK_MIN"]), int(os.environ["SLURM_ARRAY_TASK_COUNT"])


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.run", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="the corpus's YAML")
    parser.add_argument("overrides", nargs="*", help="key=value, such as workers=8 or stages.clean.grade=fine")
    parser.add_argument("--again", action="append", default=[], metavar="STAGE", help="run this stage anew, and what depends on it")
    parser.add_argument("--dry-run", action="store_true", help="print settings and what is to be done, and do nothing")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    cfg, steps = load(args.config, args.overrides)
    unknown = sorted(set(args.again) - {step.name for step in steps})
    if unknown:
        raise ValueError(f"--again: no stage {', '.join(unknown)}; there are {', '.join(step.name for step in steps)}")
    if args.dry_run:
        _show(cfg, steps)
        return 0
    task = _task() if cfg.executor == "slurm" else (0, 1)
    if task is None:
        _submit(cfg, argv)
        return 0
    run(cfg, steps, task, tuple(args.again))
    return 0


def _show(cfg: Run, steps: list[Step]) -> None:
    resolved = dataclasses.asdict(cfg) | {"stages": {step.name: step.about[-1][1] for step in steps}}
    print(json.dumps(resolved, indent=1, default=str))
    for step in steps:
        done = _record(Path(cfg.out) / "stages" / f"{step.title}.parquet")
        print(f"{step.title:24s} " + (f"ran before, {done['rows']} rows" if done else "to do"))


if __name__ == "__main__":
    sys.exit(main())
