"""The training program: resume, accumulation, processes, workers, interruption, trackers and errors, on the tiny run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train
from latte import checkpoint, config, pipeline, video

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
SHORT = ["stages.0.steps=3", "stages.1.steps=3", "train.save_every_steps=3", "train.log_every_steps=1", "preview.count=0"]


@pytest.fixture(autouse=True)
def fresh_state():
    """Every run of the program starts with no accelerator and with the default signal handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
    return [(row["step"], row["loss"]) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


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


def test_loader_workers_change_nothing(plain, tmp_path):
    assert run(tmp_path, "data.workers=2") == 0
    assert distance(weights(plain), weights(tmp_path)) == 0


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_are_one_big_batch(plain, tmp_path, parts):
    assert run(tmp_path, f"train.micro_batches={parts}") == 0
    assert checkpoint.read(tmp_path).step == 6
    assert distance(weights(plain), weights(tmp_path)) < 1e-6
    assert [l for _, l in losses(tmp_path)] == pytest.approx([l for _, l in losses(plain)], abs=1e-6)


def test_two_processes_are_one(plain, tmp_path):
    # accelerate starts several processes of one machine through its multi-GPU launcher; the variable keeps them on CPU
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "train.py", str(TINY), *SHORT,
               f"run={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on 2 process(es)" in done.stdout + done.stderr
    assert distance(weights(plain), weights(tmp_path)) < 1e-6
    assert [l for _, l in losses(tmp_path)] == pytest.approx([l for _, l in losses(plain)], abs=1e-6)
    assert done.stdout.count("parameters sha256: ") == 1


def test_a_signal_saves_and_the_same_command_goes_on(plain, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(train.RunLog, "step", lambda self, stage: os.kill(os.getpid(), signal.SIGTERM))
        assert run(tmp_path) == train.INTERRUPTED
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
