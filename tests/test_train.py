"""The training program: resume, accumulation, processes, workers, interruption, trackers and errors, on the tiny run."""

import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import train
from data_tools import cache
from latte import checkpoint, config, parallel, pipeline, plan, video
from latte.command import SAVED

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
SHORT = ["stages.0.steps=3", "stages.1.steps=3", "train.save_every_steps=3", "train.log_every_steps=1", "preview.count=0"]


@pytest.fixture(autouse=True)
def fresh_state():
    """Every run of the program starts with no accelerator and with the default signal handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(folder: Path, *overrides: str) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train.train(config.load(TINY, [*SHORT, f"run={folder}", *overrides]))


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(checkpoint.latest(folder) / f"{name}.safetensors")


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The uninterrupted run on one process, all of a batch at once."""
    folder = tmp_path_factory.mktemp("plain")
    assert run(folder) == 0
    return folder


def test_training_moves_the_weights_and_records_itself(plain):
    start = {n: p.detach() for n, p in _fresh_model().named_parameters()}
    assert distance(start, weights(plain)) > 1e-4
    assert [step for step, _ in losses(plain)] == [1, 2, 3, 4, 5, 6]
    assert config.load(plain / "config.yaml").run == str(plain)
    digest = (plain / "parameters.sha256").read_text().strip()
    assert digest == checkpoint.weights_sha256(weights(plain))


def _fresh_model():
    torch.manual_seed(0)
    return train.Latte(config.load(TINY).model)


@pytest.mark.parametrize("die_after", [1, 3, 4, 5])
def test_resume_is_bit_equal_after_dying_anywhere(plain, tmp_path, monkeypatch, die_after):
    steps = []

    def die(self, stage):
        steps.append(stage)
        if len(steps) == die_after + 1:
            raise RuntimeError("the machine went away")

    with monkeypatch.context() as patched:
        patched.setattr(train.RunLog, "step", die)
        with pytest.raises(RuntimeError):
            run(tmp_path)
    assert run(tmp_path) == 0
    for name in ("model", "ema", "optimizer"):
        assert distance(weights(plain, name), weights(tmp_path, name)) == 0, name
    assert losses(plain) == losses(tmp_path)
    assert run(tmp_path) == 0  # a finished run has nothing to do
    assert distance(weights(plain), weights(tmp_path)) == 0


def test_an_error_leaves_the_checkpoint_under_way_whole(tmp_path, monkeypatch):
    steps, write = [], checkpoint.write

    def slow(*args):
        time.sleep(3)
        return write(*args)

    def die(self, stage):
        steps.append(stage)
        if len(steps) == 5:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(train.RunLog, "step", die)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path)
    assert checkpoint.read(tmp_path).step == 3


AT_ONCE = ["memory.optimizer_in_backward=true", "optim.grad_clip=0"]
LEAN = ["memory.weights=bf16", "train.mixed_precision=bf16", "memory.optimizer_states=int8", "memory.ema=host"]


@pytest.mark.parametrize("levers", [["memory.optimizer_states=bf16"], ["memory.optimizer_states=int8"], LEAN[:2],
                                    ["memory.ema=host"], AT_ONCE, [*LEAN, *AT_ONCE], [*LEAN, "train.micro_batches=2"]],
                         ids=["bf16-states", "int8-states", "bf16-weights", "host", "at-once", "all", "all-but-at-once"])
def test_resume_is_bit_equal_with_what_saves_memory_in_the_optimizer(plain, tmp_path, monkeypatch, levers):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, *levers) == 0
    steps = []

    def die(self, stage):
        steps.append(stage)
        if len(steps) == 5:
            raise RuntimeError("the machine went away")

    with monkeypatch.context() as patched:
        patched.setattr(train.RunLog, "step", die)
        with pytest.raises(RuntimeError):
            run(broken, *levers)
    torch.manual_seed(123)
    assert checkpoint.read(broken).step == 3 and run(broken, *levers) == 0
    for name in ("model", "ema", "optimizer"):
        a, b = weights(whole, name), weights(broken, name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    assert losses(whole) == losses(broken)
    assert [l for _, l in losses(whole)] == pytest.approx([l for _, l in losses(plain)], rel=0.1)  # clipped or not
    assert {value.dtype for value in weights(whole, "ema").values()} == {torch.float32}
    assert {value.dtype for value in weights(whole).values()} == {torch.bfloat16 if "memory.weights=bf16" in levers else (
        torch.float32)}


def test_an_average_on_the_host_and_updates_in_the_backward_pass_change_no_bit(plain, tmp_path):
    assert run(tmp_path / "host", "memory.ema=host") == 0
    for name in ("model", "ema", "optimizer"):
        assert distance(weights(plain, name), weights(tmp_path / "host", name)) == 0, name
    assert run(tmp_path / "late", "optim.grad_clip=0") == run(tmp_path / "early", *AT_ONCE) == 0
    for name in ("model", "ema", "optimizer"):
        assert distance(weights(tmp_path / "late", name), weights(tmp_path / "early", name)) == 0, name
    late, early = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                   for name in ("late", "early"))
    for a, b in zip(late, early, strict=True):
        told = [key for key in a if key.startswith(("grad_norm", "update_ratio", "loss"))]
        assert len(told) > 15 and [b[key] for key in told] == pytest.approx([a[key] for key in told], rel=1e-5)


def test_a_run_goes_on_with_other_moments_and_weights_and_says_so(plain, tmp_path, capsys):
    shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(checkpoint.latest(tmp_path / "run"))
    assert run(tmp_path / "run", *LEAN) == 0
    said = capsys.readouterr().out
    assert "memory.optimizer_states: the checkpoint's fp32 were converted to int8" in said
    assert "memory.weights: the checkpoint's fp32 were converted to bf16" in said
    assert losses(tmp_path / "run")[:3] == losses(plain)[:3]
    assert [l for _, l in losses(tmp_path / "run")] == pytest.approx([l for _, l in losses(plain)], rel=0.02)
    shutil.rmtree(checkpoint.latest(tmp_path / "run"))
    assert run(tmp_path / "run") == 0


def test_adapters_train_with_what_saves_memory_in_the_optimizer(plain, tmp_path):
    adapters = [f"init.weights={plain}", "init.lora_rank=64", "preview.count=1", "preview.frames=4"]
    for name, levers in (("plain", []), ("lean", [*LEAN, *AT_ONCE])):
        assert run(tmp_path / name, *adapters, *levers) == 0
    assert torch.uint8 in {value.dtype for value in weights(tmp_path / "lean", "optimizer").values()}
    assert [l for _, l in losses(tmp_path / "lean")] == pytest.approx([l for _, l in losses(tmp_path / "plain")], rel=0.1)


def test_updates_in_the_backward_pass_need_one_process(tmp_path):
    cfg = config.load(TINY, AT_ONCE)
    shapes, states = SimpleNamespace(channels=3, time_factor=1), SimpleNamespace(width=384)
    train._check_fit(cfg, None, states, shapes, 1)
    with pytest.raises(ValueError, match=r"memory\.optimizer_in_backward: needs one process, .* got 2"):
        train._check_fit(cfg, None, states, shapes, 2)


def test_loader_workers_change_nothing(plain, tmp_path):
    assert run(tmp_path, "data.workers=2") == 0
    assert distance(weights(plain), weights(tmp_path)) == 0


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_are_one_big_batch(tmp_path, parts):
    # Adam divides by the gradient's size: with its usual eps a weight whose gradient is all rounding error moves by up to 2e-6
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert run(whole, "optim.eps=1e-6") == 0
    assert run(split, "optim.eps=1e-6", f"train.micro_batches={parts}") == 0
    assert checkpoint.read(split).step == 6
    assert distance(weights(whole), weights(split)) < 1e-6
    assert [l for _, l in losses(split)] == pytest.approx([l for _, l in losses(whole)], abs=1e-6)


def launch(folder: Path, processes: int, *overrides: str, stop: tuple[str, int, str] | None = None) -> subprocess.CompletedProcess:
    """Trains on several processes, in each of which a signal comes at a place (see stopping.py) or none."""
    # accelerate starts several processes of one machine through its multi-GPU launcher; the variable keeps them on CPU
    several = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *(several if processes > 1 else []),
               *(["tests/stopping.py", *map(str, stop)] if stop else ["train.py"]), str(TINY), *SHORT, f"run={folder}", *overrides]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert stop or done.returncode == 0, done.stderr[-2000:]
    assert f"on {processes} process(es)" in done.stdout + done.stderr
    return done


def test_two_processes_are_one(plain, tmp_path):
    done = launch(tmp_path, 2)
    assert distance(weights(plain), weights(tmp_path)) < 1e-6
    assert [l for _, l in losses(tmp_path)] == pytest.approx([l for _, l in losses(plain)], abs=1e-6)
    assert done.stdout.count("parameters sha256: ") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(plain, tmp_path, monkeypatch, number, code):
    with monkeypatch.context() as patched:
        patched.setattr(train.RunLog, "step", lambda self, stage: os.kill(os.getpid(), number))
        assert run(tmp_path) == code
    assert checkpoint.read(tmp_path).step == 1
    assert run(tmp_path) == 0
    assert distance(weights(plain), weights(tmp_path)) == 0


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, capsys):
    saved = []

    def full(values, path):
        saved.append(path)
        if len(saved) > 3:
            raise OSError(28, "No space left on device")
        real(values, path)

    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    assert train.main([str(TINY), *SHORT, f"run={tmp_path}"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left" in error and "step-00000006" in error
    assert checkpoint.read(tmp_path).step == 3
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003"]


def test_trackers_write_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(tmp_path, "train.trackers=[wandb,tensorboard]", "stages.0.steps=1", "stages.1.steps=1") == 0
    assert list(tmp_path.rglob("*.wandb")) and list(tmp_path.rglob("events.out.tfevents.*"))


def test_previews_are_written_and_judged(tmp_path):
    assert run(tmp_path, "preview.count=1", "preview.frames=8", "stages.0.steps=1", "stages.1.steps=1") == 0
    assert len(list((tmp_path / "previews").glob("*.mp4"))) == 1
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["judge/joint"] <= 1 and 0 <= last["judge/colour"] <= 1


def test_real_clips_train_and_come_back_through_their_captions(tmp_path):
    """The benchmark that learns four real clips by heart, at a tiny size and for a few updates: every part of it runs."""
    spec = importlib.util.spec_from_file_location("overfit_clips", ROOT / "benchmarks" / "overfit_clips.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    small = ["stages.0.steps=3", "stages.0.frames=8", "stages.0.height=32", "stages.0.width=32"]
    small += ["model.layers=1", "sampler.steps=3"]
    assert benchmark.main(["--out", str(tmp_path / "result.json"), *small]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["clips"]) == 4
    assert all(5 < row["psnr_db"] < 22 for row in result["clips"])  # hardly trained, but pictures


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert train.main([str(TINY), f"run={tmp_path / 'none'}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "parameters: " in out and "GFLOP/update" in out and "learning_rate: 0.001" in out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("overrides", "named"), [
    (["model.layer=2"], "model.layer: unknown key"),
    (["model.layers=two"], "model.layers"),
    (["data.source=folder", "data.path={empty}"], "data.path"),
    (["data.source=folder", "data.path={empty}/none"], "data.path"),
    (["text.encoder={empty}"], "text.encoder"),
    (["run={file}/run"], "file"),
    (["data.world.motions=[fly]"], "data.world.motions"),
    (["model.text_channels=100"], "model.text_channels"),
])
def test_mistakes_give_one_clear_error(tmp_path, capsys, overrides, named):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    filled = [o.format(empty=tmp_path / "empty", file=tmp_path / "file") for o in overrides]
    assert train.main([str(TINY), *SHORT, f"run={tmp_path / 'run'}", *filled]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and named in errors[0]


def test_the_class_family_trains_on_class_folders_with_images_and_samples_by_name(tmp_path):
    """A stand-in of UCF101: two classes, joint images, a learned variance, sampled by 250-step DDPM's sampler."""
    for level, name in ((40, "Archery"), (200, "Biking")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            video.write(tmp_path / "data" / name / f"v_{i}.mp4", np.full((24, 16, 16, 3), level, np.uint8), 24)
    path = tmp_path / "ucf.yaml"
    path.write_text(f"""
run: {tmp_path / "run"}
model: {{in_channels: 3, out_channels: 6, patch_size: 8, layers: 1, heads: 2, head_dim: 8, conditioning: class, classes: 2,
        modulation: block, sample_size: 16, temporal_spacing: frame}}
diffusion: {{kind: ddpm, prediction: eps, loss: eps}}
sampler: {{name: ddpm, steps: 4, guidance: 7}}
data: {{source: folder, path: {tmp_path / "data"}, layout: classes, clip_rule: linspace, flip: true}}
stages:
  - {{steps: 3, frames: 4, height: 16, width: 16, batch_size: 4, image_frames: 2}}
optim: {{learning_rate: 1.0e-3, warmup_steps: 0, grad_clip: 0.1, clip_from_step: 2}}
train: {{log_every_steps: 1, micro_batches: 2}}
preview: {{count: 1}}
""")
    assert train.main([str(path)]) == 0
    found = checkpoint.read(tmp_path / "run")
    assert found.config.data.class_names == ["Archery", "Biking"]
    pipe = pipeline.load(str(tmp_path / "run"))
    named, numbered = pipe(["Biking"], [1], 4, 16, 16), pipe(["1"], [1], 4, 16, 16)
    assert np.array_equal(named, numbered)
    with pytest.raises(ValueError, match="'Swimming' is no class of this model.*0 to 1.*Archery"):
        pipe(["Swimming"], [1], 4, 16, 16)
    assert train.main([str(path), "model.classes=3", f"run={tmp_path / 'other'}"]) == 1


def test_unconditional_video_trains_without_captions(tmp_path):
    (tmp_path / "data").mkdir()
    video.write(tmp_path / "data" / "face.mp4", np.full((60, 16, 16, 3), 90, np.uint8), 24)
    changes = ["data.source=folder", f"data.path={tmp_path / 'data'}", "data.layout=videos", "data.clip_rule=linspace"]
    cfg = config.load(TINY, [*changes, f"run={tmp_path / 'run'}", "model.conditioning=none", "model.modulation=block"])
    assert train.train(cfg) == 0
    assert pipeline.load(str(tmp_path / "run"))([""], [0], 4, 32, 32).shape == (1, 4, 32, 32, 3)


def single_threaded():
    """make_deterministic changes the whole process; this puts it back."""
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


def test_deterministic_mode_has_the_same_bits_however_a_batch_is_split_and_a_run_is_stopped(tmp_path):
    """1, then 2, then 4, then 1 process, with loader workers, against one process that is never stopped."""
    alone, mixed = tmp_path / "alone", tmp_path / "mixed"
    try:
        assert run(alone, "train.deterministic=true") == 0
        assert run(tmp_path / "parts", "train.deterministic=true", "train.micro_batches=2") == 0
    finally:
        single_threaded()
    assert distance(weights(alone), weights(tmp_path / "parts")) == 0
    for processes, updates in ((1, 1), (2, 2), (4, 1), (1, 2)):
        launch(mixed, processes, "train.deterministic=true", f"data.workers={processes % 2}", stop=("step", updates, "SIGTERM"))
    for name in ("model", "ema", "optimizer"):
        assert distance(weights(alone, name), weights(mixed, name)) == 0, name
    assert (alone / "parameters.sha256").read_text() == (mixed / "parameters.sha256").read_text()


def test_deterministic_mode_is_the_plain_run_up_to_rounding(plain, tmp_path):
    try:
        assert run(tmp_path, "train.deterministic=true", "train.unit_clips=2") == 0
    finally:
        single_threaded()
    assert distance(weights(plain), weights(tmp_path)) < 3e-6
    with pytest.raises(ValueError, match="needs 1, 2, 4, 8"):
        parallel.FixedOrder([], 0, 3)


@pytest.mark.parametrize(("where", "number"), [("loader", 20), ("step", 4), ("write", 2), ("hash", 5), ("rename", 2), ("prune", 3)])
def test_a_killed_run_goes_on_to_the_same_weights(plain, tmp_path, where, number):
    """SIGKILL in a loader process, after an update, and at every point of a checkpoint's writing."""
    settings = [str(TINY), *SHORT, f"run={tmp_path}", "train.save_every_steps=1", f"data.workers={int(where == 'loader')}"]
    command = [sys.executable, "tests/stopping.py", where, str(number), "SIGKILL", *settings]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert run(tmp_path, "train.save_every_steps=1") == 0
    for name in ("model", "ema", "optimizer"):
        assert distance(weights(plain, name), weights(tmp_path, name)) == 0, name
    assert not list(tmp_path.glob("*.writing"))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.unlink() if how == "missing" else path.write_bytes(content[:len(content) // 2] if how == "cut" else content)


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(plain, tmp_path, capsys, how, name):
    shutil.copytree(plain, tmp_path / "run")
    damage(checkpoint.latest(tmp_path / "run") / name, how)
    assert run(tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "from update 3 to 6" in said
    assert "passed over a damaged checkpoint" in said
    assert distance(weights(plain), weights(tmp_path / "run")) == 0
    for path in checkpoint._all(tmp_path / "run"):
        damage(path / "model.safetensors", "cut")
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole; move them away to start anew"):
        run(tmp_path / "run")


def test_two_programs_do_not_share_a_run_and_a_lock_left_behind_stops_nobody(tmp_path):
    (tmp_path / "lock").write_text("of a process that died")
    held = subprocess.Popen([sys.executable, "-c", f"from latte import checkpoint; f = checkpoint.lock({str(tmp_path)!r}); "
                             "print('held', flush=True); input()"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert held.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process trains here"):
            run(tmp_path)
    finally:
        held.kill()
        held.wait()
    assert run(tmp_path, "stages.0.steps=1", "stages.1.steps=1") == 0


def test_a_folder_that_cannot_be_written_is_one_error_before_any_work(tmp_path, monkeypatch, capsys):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "open", refuse, raising=False)
    assert train.main([str(TINY), f"run={tmp_path / 'run'}"]) == 1
    assert "Permission denied" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_newest_checkpoints_and_every_nth_are_kept(tmp_path):
    assert run(tmp_path, "train.save_every_steps=1", "train.keep_checkpoints=2", "train.keep_every_steps=2") == 0
    assert [path.name for path in checkpoint._all(tmp_path)] == [f"step-{n:08d}" for n in (2, 4, 5, 6)]


def test_the_clock_saves_too(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint.Writer, "save", lambda self, step, *args: saved.append(step))
    assert run(tmp_path, "train.save_every_steps=100", "train.save_every_minutes=0.00001") == 0
    assert saved == [1, 2, 3, 4, 5, 6]


def events(folder: Path, kind: str) -> list[dict]:
    path = folder / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if row["event"] == kind]


def poisoned(monkeypatch, steps: dict[int, float]):
    """Multiplies the loss of these updates' first samples, and with it the gradients."""
    real = train._Run._losses

    def losses(self, part):
        values, times = real(self, part)
        return values * torch.tensor([steps.get(part.step, 1.0)] + [1.0] * (len(values) - 1)), times

    monkeypatch.setattr(train._Run, "_losses", losses)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped_and_explained(tmp_path, monkeypatch, factor):
    folder = tmp_path / "run"
    poisoned(monkeypatch, {2: factor})
    before = {}

    def keep(self, stage):
        before[self.bar.n] = {name: p.clone() for name, p in seen[0].weights.items()}
        real(self, stage)

    seen, real, made = [], train.RunLog.step, train.EMA.__init__
    monkeypatch.setattr(train.RunLog, "step", keep)
    monkeypatch.setattr(train.EMA, "__init__", lambda self, *args: seen.append(self) or made(self, *args))
    assert run(folder) == 0
    assert distance(before[1], before[2]) == 0 and distance(before[0], before[1]) > 0  # the average stood still, then went on
    assert all(torch.isfinite(value).all() for value in weights(folder).values())
    assert {v.item() for k, v in weights(folder, "optimizer").items() if k.endswith("/step")} == {5}
    [event] = events(folder, "non-finite")
    assert event["step"] == 3 and sorted(event["positions"]) == list(range(16, 24)) and len(event["times"]) == 8
    report = json.loads((folder / "reports" / "update-00000003.json").read_text())
    assert report["samples"][0]["position"] == 16 and report["samples"][0]["loss"] in ("nan", "inf")
    assert [row["skipped"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())] == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("levers", [[*LEAN, "guard.spike=skip"], [*LEAN, *AT_ONCE]], ids=["late", "at-once"])
def test_an_update_that_is_not_finite_is_skipped_with_all_that_saves_memory(tmp_path, monkeypatch, levers):
    poisoned(monkeypatch, {2: float("nan")})
    assert run(tmp_path, *levers) == 0
    assert all(torch.isfinite(value.float()).all() for value in weights(tmp_path).values())
    assert {v.item() for k, v in weights(tmp_path, "optimizer").items() if k.endswith("/step")} == {5}
    [event] = events(tmp_path, "non-finite")
    assert event["step"] == 3
    assert [row["skipped"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [0, 0, 1, 0, 0, 0]


def test_in_the_backward_pass_one_gradient_that_is_not_finite_is_reported(tmp_path, monkeypatch):
    real, counted = train.InBackward, itertools.count()

    def poisoned(model, optimizer):
        model.out.weight.register_hook(lambda grad: grad * (torch.nan if next(counted) == 2 else 1))
        return real(model, optimizer)

    monkeypatch.setattr(train, "InBackward", poisoned)
    assert run(tmp_path, *AT_ONCE) == 0
    [event] = events(tmp_path, "non-finite")
    assert event["step"] == 3 and "skipped for weights whose gradient is not finite" in event["text"]
    steps = {key: value.item() for key, value in weights(tmp_path, "optimizer").items() if key.endswith("/step")}
    assert {key for key, value in steps.items() if value == 5} == {"out.weight/step"} and set(steps.values()) == {5, 6}


def test_too_many_skipped_updates_in_a_row_stop_the_run_and_keep_the_checkpoint(tmp_path, monkeypatch):
    poisoned(monkeypatch, {3: float("nan"), 4: float("nan"), 5: float("nan")})
    with pytest.raises(ValueError, match="guard.max_skipped: 2 updates in a row were skipped"):
        run(tmp_path, "guard.max_skipped=2")
    assert checkpoint.read(tmp_path).step == 3 and len(events(tmp_path, "non-finite")) == 1


LONG = ["stages.0.steps=20", "stages.1.steps=1", "guard.window=8", "train.save_every_steps=4", "train.log_every_steps=100"]


def test_a_spike_is_skipped(tmp_path, monkeypatch):
    poisoned(monkeypatch, {13: 1e4})
    assert run(tmp_path / "ignored", *LONG) == 0
    assert run(tmp_path / "skipped", *LONG, "guard.spike=skip") == 0
    assert not events(tmp_path / "ignored", "spike")
    [event] = events(tmp_path / "skipped", "spike")
    assert event["step"] == 14 and "samples 104" in event["text"]
    report = json.loads((tmp_path / "skipped" / "reports" / "update-00000014.json").read_text())
    assert report["loss"] > report["loss_limit"] or report["grad_norm"] > report["grad_norm_limit"]
    assert set(report["grad_norm_of"]) >= {"spatial.attn", "temporal.mlp", "out"}


def test_a_spike_takes_the_run_back_and_its_batch_is_left_out(tmp_path, monkeypatch):
    """The same weights as a run whose data never had that batch; also when it is killed after going back."""
    poisoned(monkeypatch, {13: 1e4})
    spiked, without = tmp_path / "spiked", tmp_path / "without"
    assert run(spiked, *LONG, "guard.spike=rollback") == 0
    assert [event["step"] for event in events(spiked, "rollback")] == [14] and events(spiked, "left out")
    steps = [row["step"] for row in map(json.loads, (spiked / "metrics.jsonl").read_text().splitlines())]
    assert steps == sorted(set(steps))
    with monkeypatch.context() as patched:
        patched.setattr(train, "Guard", lambda cfg, state=None: train_guard(cfg, {**(state or {}), "left_out": [13]}))
        assert run(without, *LONG) == 0
    assert distance(weights(spiked), weights(without)) == 0
    with monkeypatch.context() as patched:
        patched.setattr(train.RunLog, "rewind", lambda self, step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "killed", *LONG, "guard.spike=rollback")
    assert run(tmp_path / "killed", *LONG, "guard.spike=rollback") == 0
    assert distance(weights(spiked), weights(tmp_path / "killed")) == 0


train_guard = train.Guard


def test_a_rollback_with_all_that_saves_memory_is_a_run_without_the_batch(tmp_path, monkeypatch):
    poisoned(monkeypatch, {13: 1e4})
    spiked, without = tmp_path / "spiked", tmp_path / "without"
    assert run(spiked, *LONG, *LEAN, "guard.spike=rollback") == 0
    assert [event["step"] for event in events(spiked, "rollback")] == [14]
    with monkeypatch.context() as patched:
        patched.setattr(train, "Guard", lambda cfg, state=None: train_guard(cfg, {**(state or {}), "left_out": [13]}))
        assert run(without, *LONG, *LEAN) == 0
    for name in ("model", "ema", "optimizer"):
        assert distance(weights(spiked, name), weights(without, name)) == 0, name


def test_a_run_that_spikes_again_and_again_stops_with_its_reports(tmp_path, monkeypatch):
    poisoned(monkeypatch, {9: 1e4, 13: 1e4, 15: 1e4})
    with pytest.raises(ValueError, match=r"guard\.rollbacks: update 16 is a spike after 2 rollbacks"):
        run(tmp_path, *LONG, "guard.spike=rollback", "guard.rollbacks=2")
    assert len(events(tmp_path, "rollback")) == 2 and len(list((tmp_path / "reports").glob("*.json"))) == 3


def test_health_is_in_the_metrics(plain):
    row = json.loads((plain / "metrics.jsonl").read_text().splitlines()[-1])
    for key in ("grad_norm", "grad_norm/spatial.cross", "update_ratio/temporal.attn", "loss_of_frames/8", "tokens_per_s", "mfu",
                "memory_gib", "loader_wait", "checkpoint_wait", "lr"):
        assert row[key] >= 0, key
    by_time = [value for key, value in row.items() if key.startswith("loss_at_time/")]
    assert 1 <= len(by_time) <= 4 and 0 < row["mfu"] < 1
    groups = [value for key, value in row.items() if key.startswith("grad_norm/")]
    assert sum(value**2 for value in groups) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-5)
    assert all(1e-5 < value < 0.2 for key, value in row.items() if key.startswith("update_ratio/patch"))


def test_buckets_train_with_a_learning_rate_of_their_stage(tmp_path):
    mixed = "stages=[{steps: 6, learning_rate: 0.01, buckets: [{frames: 1, height: 32, width: 32, batch_size: 4}," \
            "{frames: 4, height: 16, width: 32, batch_size: 2}]}]"
    assert train.train(config.load(TINY, [*SHORT[2:], f"run={tmp_path}", "optim.schedule=constant", mixed])) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {key for row in rows for key in row if key.startswith("loss_of_frames")} == {"loss_of_frames/1", "loss_of_frames/4"}
    assert [row["lr"] for row in rows] == [0.005, *[0.01] * 5]


def test_what_cannot_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.hardware, "available", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"stages\.1: the run needs at most .* GiB of memory .*train\.refuse_misfit=false"):
        run(tmp_path / "a")
    assert run(tmp_path / "b", "train.refuse_misfit=false", "stages.0.steps=1", "stages.1.steps=1") == 0
    monkeypatch.undo()
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ValueError, match=r"train\.keep_checkpoints: the run needs .*of disk"):
        run(tmp_path / "c")


def test_training_on_a_cache_is_training_on_its_source(plain, tmp_path, monkeypatch):
    """Bit for bit, with neither the text encoder nor a VAE in memory."""
    settings = [*SHORT, "data.variants=2", f"run={tmp_path / 'source'}"]
    assert train.train(config.load(TINY, settings)) == 0
    cache.build(config.load(TINY, settings), tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(train, "TextEncoder", None)
        where = ["data.variants=2", "data.source=cache", f"data.path={tmp_path / 'cache'}"]
        assert run(tmp_path / "cached", *where, "data.workers=1") == 0
    assert distance(weights(tmp_path / "source"), weights(tmp_path / "cached")) == 0
    with pytest.raises(ValueError, match="seed: is 1 here, but the cache .* was made with 0"):
        run(tmp_path / "other", *where, "seed=1")


def test_a_signal_to_the_whole_process_group_saves_too(plain, tmp_path):
    """As Slurm and terminals send it: loader processes must not die of it before the update has ended."""
    command = [sys.executable, "train.py", str(TINY), *SHORT, f"run={tmp_path}", "data.workers=2", "stages.1.steps=3000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    for _ in range(600):
        if checkpoint.latest(tmp_path):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == SAVED, said[-2000:]
    assert "saved, the same command goes on" in said


def test_a_run_whose_checkpoints_lost_their_state_does_not_start_anew(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    for path in checkpoint._all(tmp_path / "run"):
        (path / "state.json").unlink()
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole"):
        run(tmp_path / "run")


def test_a_resume_needs_no_room_for_what_is_there_already(plain, tmp_path, monkeypatch):
    shutil.copytree(plain, tmp_path / "run")
    own = sum(file.stat().st_size for file in (tmp_path / "run").glob("step-*/*"))
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(own * 2, own, own))
    assert run(tmp_path / "run") == 0


def test_a_rollback_says_which_checkpoint_was_damaged(tmp_path, monkeypatch):
    poisoned(monkeypatch, {13: 1e4})
    real = checkpoint.newest_good

    def damaged(folder, up_to=None):
        if up_to is not None:
            damage(tmp_path / "step-00000012" / "ema.safetensors", "flipped")
        return real(folder, up_to)

    monkeypatch.setattr(checkpoint, "newest_good", damaged)
    assert run(tmp_path, *LONG, "guard.spike=rollback", "train.keep_checkpoints=3") == 0
    assert "back to update 8" in events(tmp_path, "rollback")[0]["text"]
    assert "step-00000012" in events(tmp_path, "checkpoint")[0]["text"]


def test_a_cache_trains_where_its_vae_is_not(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
                  block_out_channels=[8, 8], norm_num_groups=8, layers_per_block=1).save_pretrained(tmp_path / "vae")
    latents = ["model.in_channels=4", "model.out_channels=4", "codec.kind=autoencoder", f"codec.path={tmp_path / 'vae'}",
               "codec.posterior=sample"]
    cache.build(config.load(TINY, [*SHORT, *latents, "data.variants=1"]), tmp_path / "cache")
    shutil.rmtree(tmp_path / "vae")
    assert run(tmp_path / "run", *latents, "data.variants=1", "data.source=cache", f"data.path={tmp_path / 'cache'}") == 0
    assert not events(tmp_path / "run", "preview")
