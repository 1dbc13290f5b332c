"""The sampling program: files that play, samples that depend on their seed alone, and one clear error for each mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from latte import checkpoint, config, pipeline, video
from latte.model import Latte

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint to share (EMA weights alone) with random weights that draw something."""
    cfg = config.load(TINY)
    torch.manual_seed(0)
    model = Latte(cfg.model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    weights = {name: p.detach().half() for name, p in model.named_parameters()}
    return checkpoint.write(path, 7, cfg, {"ema.safetensors": weights})


def test_a_16_second_clip_with_all_that_reproduces_it(tiny, tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    prompt = "a small red circle moves to the left"
    assert sample.main([str(tiny), "--prompt", prompt, "--out", str(out), "--scale", "2", "--seed", "3"]) == 0
    info = video.probe(out, count=True)
    assert (info.frames, info.fps, info.duration_s, info.width, info.height, info.codec) == (128, 8.0, 16.0, 64, 64, "h264")
    assert out.with_suffix(".png").stat().st_size > 1000
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["prompt"], record["seed"], record["checkpoint_step"]) == (prompt, 3, 7)
    assert record["ema_sha256"] == checkpoint.read(tiny).files["ema.safetensors"]
    assert "joint" in record["judge"]
    printed = capsys.readouterr().out
    assert prompt in printed and str(out) in printed and ("PASS" in printed or "FAIL" in printed)


def test_a_sample_is_the_same_alone_and_in_a_batch(tiny):
    pipe = pipeline.load(tiny)
    prompts = ["a small red circle moves to the left", "a large blue star moves up, with many more words than the other one has"]
    both = pipe(prompts, [5, 6], 4, 32, 32)
    alone = [pipe([prompt], [seed], 4, 32, 32)[0] for prompt, seed in zip(prompts, (5, 6), strict=True)]
    assert both.std() > 5
    assert np.abs(both.astype(int) - np.stack(alone)).max() <= 1
    assert np.abs(pipe([prompts[0]], [6], 4, 32, 32)[0].astype(int) - alone[0]).max() > 10  # another seed, another clip


def test_a_file_of_prompts_gives_a_clip_for_each_line(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a small red circle moves to the left\n\nsomething the judge cannot read\n")
    assert sample.main([str(tiny), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "x.mp4"), "--frames", "3",
                        "--steps", "2", "--guidance", "1", "--sampler", "heun"]) == 0
    records = [json.loads((tmp_path / f"x-000{i}.json").read_text()) for i in range(2)]
    assert [r["seed"] for r in records] == [0, 1]
    assert records[0]["sampler"] == {"name": "heun", "steps": 2, "guidance": 1.0}
    assert "not judged" in records[1]["judge"]


def damaged(tiny: Path, folder: Path, how: str) -> Path:
    """A copy of the checkpoint with one thing wrong."""
    path = shutil.copytree(tiny, folder / "checkpoint")
    weights, state = path / "ema.safetensors", path / "state.json"
    if how == "flipped bit":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "no json":
        state.write_text("{not json")
    elif how == "other model":
        text = json.loads(state.read_text())
        text["config"]["model"]["layers"] = 2
        state.write_text(json.dumps(text))
    return path


@pytest.mark.parametrize("how", ["flipped bit", "cut off", "no weights", "no json", "other model"])
def test_a_corrupt_checkpoint_is_named(tiny, tmp_path, capsys, how):
    path = damaged(tiny, tmp_path, how)
    assert sample.main([str(path), "--prompt", "a red circle", "--out", str(tmp_path / "x.mp4")]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and str(path) in error[0]
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(("arguments", "named"), [
    (["--prompt", " "], "the prompt is empty"),
    (["--prompts", "nowhere.txt"], "nowhere.txt"),
    (["--prompt", "a", "--frames", "0"], "--frames"),
    (["--prompt", "a", "--fps", "0"], "--fps"),
    (["--prompt", "a", "--steps", "0"], "sampler.steps"),
    (["--prompt", "a", "--height", "30"], "model.patch_size"),
    (["--prompt", "a", "--device", "nonsense"], "--device"),
])
def test_mistakes_give_one_clear_error(tiny, tmp_path, capsys, arguments, named):
    assert sample.main([str(tiny), *arguments, "--out", str(tmp_path / "x.mp4")]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and named in error[0]
    assert not list(tmp_path.glob("x*"))


def test_an_unknown_path_ends_the_program_with_1(tmp_path):
    command = [sys.executable, "sample.py", str(tmp_path / "none"), "--prompt", "a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'none'}: no such file or folder")


def test_the_shared_checkpoint_draws_and_is_judged(tmp_path, capsys):
    shared = ROOT / "runs" / "shapes-cpu" / "checkpoint"
    assert sample.main([str(shared), "--prompt", "a large red circle moves to the left", "--out", str(tmp_path / "clip.mp4"),
                        "--frames", "8", "--steps", "2"]) == 0
    assert "judge:" in capsys.readouterr().out
