"""Runs of stages: the same bytes from every executor and after every end, and what a bad clip costs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import manifest, run, workers

ROOT = Path(__file__).parent.parent
TOY = workers.Stage("toy_stage", 3)
THIN = workers.Stage("toy_stage", manifest.ROWS, "thin")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(run, "INGEST", TOY)
    monkeypatch.setattr(run, "STAGES", {"toy": TOY, "thin": THIN})


def corpus(folder, **settings):
    """A corpus's YAML; its clips are fine unless `clips` says that there are more than 5."""
    stages = settings.pop("stages", "{ingest: {clips: 5}, thin-first: {least: 1}, toy: {}, thin: {least: 2}}")
    lines = {"out": folder / "out", "workers": 2, "stages": stages} | settings
    (folder / "corpus.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return folder / "corpus.yaml"


def told(path):
    return {row["id"][:2]: row["dropped"] for row in manifest.read(path)}


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name not in ("done.txt", "run.lock")}


def test_stages_follow_each_other_and_nothing_vanishes(tmp_path, capsys):
    assert run.main([str(corpus(tmp_path))]) == 0
    out = tmp_path / "out"
    assert told(out / "manifest.parquet") == {"00": "too small", "01": "too small", "02": None, "03": None, "04": None}
    assert sorted(path.name for path in (out / "stages").iterdir()) == [
        f"{name}.{end}" for name in ("00-ingest", "01-thin-first", "02-toy", "03-thin") for end in ("json", "parquet")]
    assert [name for name, *_ in manifest.about(out / "manifest.parquet")["stages"]] == ["ingest", "thin-first", "toy", "thin"]
    assert sorted((out / "done.txt").read_text().split()) == [f"{n:02d}" * 16 for n in (1, 2, 3, 4)]


def test_only_what_has_changed_is_run_again(tmp_path):
    path, out = corpus(tmp_path), tmp_path / "out"

    def worked(*arguments):
        before = len((out / "done.txt").read_text().split()) if out.exists() else 0
        assert run.main([str(path), *arguments]) == 0
        return len((out / "done.txt").read_text().split()) - before

    assert worked() == 4
    first = files(out)
    assert worked() == 0 and files(out) == first
    assert worked("stages.thin.least=4") == 0  # another threshold after the work
    assert told(out / "manifest.parquet")["03"] == "too small"
    assert worked("stages.thin-first.least=3") == 2
    assert worked("stages.thin-first.least=3", "--again", "toy") == 2
    assert worked() == 4 and files(out) == first


def test_a_bad_clip_costs_itself_alone(tmp_path, capsys):
    path = corpus(tmp_path, stages="{ingest: {clips: 24}, toy: {}}", timeout_s=2)
    assert run.main([str(path)]) == 0
    dropped = {key: why for key, why in told(tmp_path / "out" / "manifest.parquet").items() if why}
    group = {n: f"{n:02d}" for n in range(24)}
    assert dropped.keys() == {group[n] for n in range(24) if n % 7 in (5, 4, 3)}  # their groups: 5, 11 and 17 are of v5, v4, v3
    assert {dropped["05"], dropped["11"], dropped["17"]} == {
        "toy ended its process (code 3)", "toy took longer than 2 s", "toy failed (KeyError: 'no such thing')"}
    assert len(list((tmp_path / "out" / "failures").iterdir())) == 3


def test_ray_gives_the_same_bytes_and_a_bad_clip_costs_itself_alone_there_too(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # its workers are to find the toys
    try:  # where ports or shared memory are not to be had, it fails or waits for ever
        subprocess.run([sys.executable, "-c", "import ray; ray.init(num_cpus=1, include_dashboard=False)"], check=True, timeout=120,
                       capture_output=True)
    except subprocess.SubprocessError as error:
        pytest.skip(f"Ray cannot start here: {error}")
    path = corpus(tmp_path, stages="{ingest: {clips: 5}, toy: {}}")
    assert run.main([str(path), f"out={tmp_path / 'processes'}"]) == 0
    assert run.main([str(path), f"out={tmp_path / 'ray'}", "executor=ray"]) == 0
    assert files(tmp_path / "processes") == files(tmp_path / "ray")
    assert run.main([str(path), f"out={tmp_path / 'ray'}", "executor=ray", "stages.ingest.clips=8"]) == 0
    dropped = {key: why for key, why in told(tmp_path / "ray" / "manifest.parquet").items() if why}
    assert dropped == {"05": "toy ended its process, or took longer than 3600 s"}


def program(path, *arguments, **environment):
    """The program in a process of its own, with the toy stages."""
    code = ("import sys; sys.path.insert(0, 'tests'); import test_run; from data_tools import run; run.INGEST = test_run.TOY; "
            "run.STAGES = {'toy': test_run.TOY, 'thin': test_run.THIN}; sys.exit(run.main(sys.argv[1:]))")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen([sys.executable, "-c", code, str(path), *arguments], cwd=ROOT, stderr=subprocess.DEVNULL,
                            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment})


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(tmp_path):
    path = corpus(tmp_path, stages="{ingest: {clips: 5}, toy: {wait_s: 0.3}, toy-again: {wait_s: 0.3}, thin: {least: 1}}")
    assert run.main([str(path), f"out={tmp_path / 'whole'}"]) == 0
    done = tmp_path / "out" / "done.txt"
    for clips in (2, 7):  # killed when so many are done
        running = program(path)
        while running.poll() is None and not (done.exists() and len(done.read_text().split()) >= clips):
            time.sleep(0.05)
        running.kill()
        assert running.wait() == -signal.SIGKILL
    assert program(path).wait() == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert len(done.read_text().split()) <= 10 + 2 * 2  # but for the clips that were at work


def test_tasks_of_an_array_share_the_work_also_of_one_that_died(tmp_path):
    path = corpus(tmp_path, stages="{ingest: {clips: 5}, toy: {wait_s: 0.2}, thin: {least: 1}}", executor="slurm", patience_s=20)
    assert run.main([str(path), "executor=processes", f"out={tmp_path / 'whole'}"]) == 0
    tasks = [program(path, SLURM_ARRAY_TASK_ID=str(n), SLURM_ARRAY_TASK_MIN="0", SLURM_ARRAY_TASK_COUNT="2") for n in range(2)]
    assert [task.wait(120) for task in tasks] == [0, 0]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    shutil.rmtree(tmp_path / "out")
    alone = program(path, "patience_s=1", SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_MIN="0", SLURM_ARRAY_TASK_COUNT="2")
    assert alone.wait(120) == 0
    assert told(tmp_path / "out" / "stages" / "02-thin.parquet") == told(tmp_path / "whole" / "manifest.parquet")


def test_an_array_is_written_for_slurm(tmp_path, capsys):
    path = corpus(tmp_path, executor="slurm", slurm_options="[--time=12:00:00]")
    assert run.main([str(path), "slurm_tasks=3"]) == 0
    script = (tmp_path / "out" / "slurm.sh").read_text()
    assert "#SBATCH --array=0-2\n" in script and "#SBATCH --time=12:00:00\n" in script
    assert script.endswith(f"-m data_tools.run {path} slurm_tasks=3\n")
    assert "slurm.sh: written" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    ("stages.ingest.clips=-1", "stages.ingest.clips: must not be negative, got -1"),
    ("stages.toy.waits=1", "stages.toy.waits: unknown key; did you mean stages.toy.wait_s?"),
    ("stages.shots={}", "stages.shots: no such stage; there are ingest, toy, thin"),
    ("stages.ingest-two={}", "stages.ingest-two: ingest comes first, and only there"),
    ("executor=spark", "executor"), ("timeout_s=-1", "timeout_s: must not be negative"), ("workers=many", "workers"),
])
def test_a_wrong_setting_is_one_error(tmp_path, capsys, change, message):
    assert run.main([str(corpus(tmp_path)), change]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_dry_run_does_nothing(tmp_path, capsys):
    assert run.main([str(corpus(tmp_path)), "--dry-run"]) == 0
    assert "02-toy" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    path = corpus(tmp_path)
    (tmp_path / "out").mkdir()
    with run._alone(tmp_path / "out"):
        assert run.main([str(path)]) == 1
    assert "another run works in this folder" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_corpus_can_be_read(path, monkeypatch):
    monkeypatch.undo()  # the real stages
    cfg, steps = run.load(path)
    assert steps[0].name == "ingest" and steps[-1].name == "shard" and cfg.out == f"out/data/{path.stem}"
    assert all(callable(step.stage.part(step.stage.work)) for step in steps[1:])
