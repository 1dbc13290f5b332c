"""Published weights in and out: every format read, the reference's numbers, and nothing that can run code."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel, PixArtTransformer2DModel
from safetensors.torch import save_file
from transformers import T5Config

import sample
import train
from latte import checkpoint, config, diffusion, lora, memory, pipeline, published, sampler, trace
from latte.config import DiffusionConfig, InitConfig, MemoryConfig, ModelConfig, SamplerConfig
from latte.model import Latte, frame_times
from latte.text import TextEncoder

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def fresh_state():
    """Every run of the training program in this process starts without an accelerator."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(theirs, x, t, text):
    return theirs(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)


def assert_same(mine, theirs, tol=1e-5):
    assert (mine - theirs).abs().max() <= tol * theirs.abs().max()


@pytest.fixture(scope="module")
def latte_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "latte-small"
    hub.folder(path)
    return path


# ---- reading ----


def test_every_text_format_gives_the_numbers_of_diffusers(latte_folder, tmp_path):
    theirs = LatteTransformer3DModel.from_pretrained(latte_folder, subfolder="transformer")
    x, t, text = random(2, 5, 4, 8, 8), torch.tensor([999, 3]), random(2, 7, 32, seed=1)
    with torch.no_grad():
        expected = call(theirs, x, t, text)
    state = theirs.state_dict()
    save_file(state, tmp_path / "bare.safetensors")
    original = {**state, "caption_projection.y_embedding": torch.zeros(120, 32)}
    torch.save({"ema": original, "model": {k: v + 1 for k, v in original.items()}}, tmp_path / "t2v.pt")
    torch.save({"model": original}, tmp_path / "model.pt")
    torch.save(original, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in (latte_folder, latte_folder / "transformer"):
        with torch.no_grad():
            assert_same(published.load(path)(x, t, text), expected)
    for name in ("bare.safetensors", "t2v.pt", "model.pt", "old.pt"):
        with torch.no_grad():
            assert_same(published.load(tmp_path / name, heads=3, sample_size=8)(x, t, text), expected)
        with pytest.raises(ValueError, match=r"nothing tells its number of heads; give heads="):
            published.load(tmp_path / name)


def test_every_key_of_the_full_size_is_mapped_both_ways():
    facts = dict(sample_size=64, num_layers=28, num_attention_heads=16, attention_head_dim=72, caption_channels=4096,
                 cross_attention_dim=1152, video_length=16)
    with torch.device("meta"):
        theirs = LatteTransformer3DModel(**{**hub.SHAPE, **facts}).state_dict()
        mine = Latte(ModelConfig())
    assert len(theirs) == 967 and sum(v.numel() for v in theirs.values()) == 1_057_246_880
    found = published.Found("meta", "latte", theirs, {})
    assert published.model_config(found) == ModelConfig(temporal_spacing="frame")
    table = published.names("latte", mine.cfg)
    assert sorted(table) == sorted(dict(mine.named_parameters()))
    assert sorted(key for keys in table.values() for key in keys) == sorted(theirs)
    back = published.published_state(mine, "latte")
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name, size, width, heads, layers", [("S", 32_480_672, 384, 6, 6), ("B", 129_547_040, 768, 12, 6),
                                                              ("L", 456_815_648, 1024, 16, 12), ("XL", 673_681_568, 1152, 16, 14)])
def test_the_class_family_has_the_published_sizes(name, size, width, heads, layers):
    assert published.HEADS[width] == heads
    with torch.device("meta"):
        model = Latte(ModelConfig(conditioning="none", modulation="block", heads=heads, head_dim=width // heads, layers=layers))
    assert sum(p.numel() for p in model.parameters()) == size


@pytest.mark.parametrize("name", ["latte_class_conditional", "latte_unconditional"])
def test_the_class_family_gives_the_golden_numbers(name, tmp_path):
    data = {key: np.load(GOLDEN / f"{name}.npz")[key] for key in np.load(GOLDEN / f"{name}.npz").files}
    weights = {key.removeprefix("weights/"): torch.from_numpy(value) for key, value in data.items() if key.startswith("weights/")}
    torch.save({"model": weights, "ema": weights}, tmp_path / "0000010.pt")
    model = published.load(tmp_path / "0000010.pt", heads=json.loads(str(data["config"]))["num_heads"])
    x, t, noise = (torch.from_numpy(data[key]) for key in ("x", "t", "noise"))
    cond = {"labels": torch.from_numpy(data["y"])} if "y" in data else {}
    cfg = DiffusionConfig(kind="ddpm", prediction="eps", loss="eps")
    with torch.no_grad():
        assert_same(model(x, t, **cond), torch.from_numpy(data["out"]))
        loss = diffusion.training_loss(lambda x, t, c: model(x, t, **c), x, cond, noise, t, cfg)
        for key in ("loss", "mse", "vb"):
            assert_same(getattr(loss, key), torch.from_numpy(data[key]))
        if cond:
            # The golden call took its first sample at t = 5, with and without a class.
            null = {"labels": torch.tensor([model.cfg.classes])}
            guided = sampler.guidance(lambda x, t, c: model(x, t, **c), null, 7.0)
            assert_same(guided(x[:1], torch.tensor([5]), {"labels": cond["labels"][:1]}), torch.from_numpy(data["cfg_out"][:1]))
            assert_same(model(x, t), model(x, t, labels=torch.full((2,), model.cfg.classes)))  # no labels, no class
    grid = sampler.time_grid(cfg, SamplerConfig(name="ddpm", steps=250), 1)
    assert sorted(grid.times.tolist()) == data["timestep_map_250"].tolist()
    again = published.export(model, tmp_path / "back.pt", frames=x.shape[1])
    stored = torch.load(again, weights_only=True)["ema"]
    assert set(stored) == set(weights)
    for key, value in weights.items():
        torch.testing.assert_close(stored[key], value, rtol=0, atol=1e-6)


def test_pixart_starts_a_latte_whose_single_frames_are_its_images(tmp_path):
    shape = {key: hub.SHAPE[key] for key in hub.SHAPE if key != "video_length"}
    theirs = hub.randomise(PixArtTransformer2DModel(**shape))
    state = theirs.state_dict()
    save_file(state, tmp_path / "pixart.safetensors")
    with pytest.warns(UserWarning, match=r"fresh, adding nothing at first: 18 tensors.*temporal\.0"):
        model = published.load(tmp_path / "pixart.safetensors", heads=3, sample_size=8)
    x, text = random(1, 3, 4, 8, 8), random(1, 7, 32, seed=1)
    with torch.no_grad():
        images = [theirs(x[:, i], text, torch.tensor([500]), return_dict=False)[0] for i in range(3)]
        for i in range(3):
            assert_same(model(x[:, i:i + 1], torch.tensor([500]), text)[:, 0], images[i])
    # the authors' names for the same weights
    rename = {"pos_embed.proj": "x_embedder.proj", "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
              "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "adaln_single.linear": "t_block.1",
              "caption_projection.linear_1": "y_embedder.y_proj.fc1", "caption_projection.linear_2": "y_embedder.y_proj.fc2",
              "proj_out": "final_layer.linear"}
    original = {f"{new}.{part}": state[f"{old}.{part}"] for old, new in rename.items() for part in ("weight", "bias")}
    original["final_layer.scale_shift_table"] = state["scale_shift_table"]
    for i in range(2):
        old, new = f"transformer_blocks.{i}", f"blocks.{i}"
        original[f"{new}.scale_shift_table"] = state[f"{old}.scale_shift_table"]
        for part in ("weight", "bias"):
            joined = {"attn.qkv": [f"attn1.to_{x}" for x in "qkv"], "attn.proj": ["attn1.to_out.0"],
                      "cross_attn.q_linear": ["attn2.to_q"], "cross_attn.kv_linear": ["attn2.to_k", "attn2.to_v"],
                      "cross_attn.proj": ["attn2.to_out.0"], "mlp.fc1": ["ff.net.0.proj"], "mlp.fc2": ["ff.net.2"]}
            original |= {f"{new}.{a}.{part}": torch.cat([state[f"{old}.{x}.{part}"] for x in b]) for a, b in joined.items()}
    torch.save({"state_dict": original}, tmp_path / "pixart.pth")
    with pytest.warns(UserWarning, match="fresh"):
        twin = published.load(tmp_path / "pixart.pth", heads=3, sample_size=8)
    assert all(torch.equal(p, q) for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True)
               if n.startswith("spatial"))


def test_dit_starts_a_latte_and_drops_other_classes(tmp_path):
    data = np.load(GOLDEN / "latte_class_conditional.npz")
    weights = {key.removeprefix("weights/"): torch.from_numpy(data[key]) for key in data.files if key.startswith("weights/")}
    weights.pop("temp_embed")
    torch.save(weights, tmp_path / "DiT.pt")
    found = published.read(tmp_path / "DiT.pt")
    assert found.kind == "dit" and published.model_config(found, heads=3).classes == 7
    model = Latte(published.model_config(found, heads=3, classes=4))
    notes = published.fill(model, found)
    assert any("left out" in note for note in notes) and any("label.weight" in note for note in notes)
    assert torch.equal(model.spatial[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    assert torch.equal(model.temporal[0].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])


# ---- what users get wrong ----


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path):
    torch.save({"ema": {"x": torch.zeros(1), "y": Evil(tmp_path / "ran")}}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(ValueError, match=rf"{name}: not opened, because it holds more than tensors and could run code"):
            published.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_strange_files_are_named(latte_folder, tmp_path):
    state = hub.transformer().state_dict()
    torch.save(state, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"optimizer": 3}, tmp_path / "number.pt")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pt")
    torch.save({k: v for k, v in state.items() if "transformer_blocks.1.attn1.to_k.bias" not in k}, tmp_path / "missing.pt")
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "more.pt")
    torch.save({**state, "proj_out.bias": torch.zeros(31)}, tmp_path / "shape.pt")
    (tmp_path / "bare").mkdir()
    expected = {
        "cut.pt": "damaged", "cut.safetensors": "damaged", "empty.pt": "damaged", "text.pt": "not opened|damaged",
        "number.pt": "holds no dictionary of tensors", "resnet.pt": "not a Latte, PixArt-alpha or DiT.*conv1.weight",
        "missing.pt": r"missing: .*transformer_blocks\.1\.attn1\.to_k\.bias", "more.pt": r"left over: extra\.weight",
        "shape.pt": r"proj_out\.bias make \[31\]", "bare": "no weights here", "nowhere.pt": "no such file"}
    for name, message in expected.items():
        with pytest.raises(ValueError, match=rf"{name}.*({message})"):
            published.load(tmp_path / name, heads=3, sample_size=8)
    facts = json.loads((latte_folder / "transformer" / "config.json").read_text())
    (tmp_path / "other").mkdir()
    save_file(state, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text(json.dumps({**facts, "attention_bias": False}))
    with pytest.raises(ValueError, match=r"attention_bias.*False"):
        published.load(tmp_path / "other")


# ---- sampling as diffusers does ----


@pytest.mark.parametrize("exported", [False, True], ids=["published", "exported"])
def test_50_ddim_steps_with_guidance_end_in_the_latents_of_the_pipeline(latte_folder, tmp_path, exported):
    mine = published.load(latte_folder)
    if exported:
        mine = hub.randomise(mine, seed=9)
        latte_folder = published.export(mine, tmp_path / "mine", frames=5, base=str(latte_folder))
    pipe = LattePipeline.from_pretrained(latte_folder)
    pipe.set_progress_bar_config(disable=True)
    text, null = random(2, 9, 32, seed=1), random(2, 9, 32, seed=2)
    noise = random(2, 4, 5, 8, 8, seed=3)
    theirs = pipe(prompt=None, negative_prompt=None, prompt_embeds=text, negative_prompt_embeds=null, mask_feature=False,
                  num_inference_steps=50, guidance_scale=7.5, video_length=5, height=64, width=64, latents=noise,
                  output_type="latent").frames.transpose(1, 2)
    model_fn = sampler.guidance(lambda x, t, cond: mine(x, t, cond["text"]), {"text": null}, 7.5)
    cfg = DiffusionConfig(kind="ddpm", prediction="eps", loss="eps")
    ours = sampler.sample(model_fn, noise.transpose(1, 2), {"text": text}, cfg, SamplerConfig(name="ddim", steps=50), 80)
    assert_same(ours, theirs, 1e-4)


@pytest.mark.parametrize("prompts", [["a small red circle moves left"], ["a dog runs on grass", "the large blue star"]])
def test_prompt_rules_of_the_original_give_its_frames(latte_folder, prompts, monkeypatch):
    """The whole way, from words to pixels, one prompt (trimmed) and two (zeroed padding)."""
    theirs = LattePipeline.from_pretrained(latte_folder)
    theirs.set_progress_bar_config(disable=True)
    noise = random(len(prompts), 5, 4, 8, 8, seed=5)
    frames = theirs(prompts, num_inference_steps=4, video_length=5, height=64, width=64, latents=noise.transpose(1, 2),
                    output_type="pt", clean_caption=True, decode_chunk_size=5).frames
    ours = pipeline.load(str(latte_folder), overrides=["text.rules=latte", "sampler.steps=4"])
    monkeypatch.setattr("latte.keyed.normal", lambda shape, seed, *key: noise[seed].numpy())
    clips = ours(prompts, list(range(len(prompts))), 5, 64, 64)
    expected = (torch.as_tensor(frames).transpose(1, 2) if frames.shape[1] == 3 else torch.as_tensor(frames)) * 255
    difference = np.abs(clips.astype(float) - expected.permute(0, 1, 3, 4, 2).numpy())
    assert difference.max() <= 1.01, difference.max()


def test_a_pipeline_folder_is_sampled_by_the_program(latte_folder, tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    command = [str(latte_folder), "--prompt", "a dog runs", "--out", str(out), "--steps", "2"]
    assert sample.main(command) == 0, capsys.readouterr().err
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["frames"], record["height"], record["sampler"]["name"]) == (5, 64, "ddim")
    assert sample.main([*command, "--frames", "16", "--dtype", "bfloat16", "--set", "model.temporal_spacing=stretch"]) == 0


# ---- handing back ----


def test_an_exported_folder_is_a_pipeline_of_diffusers(latte_folder, tmp_path):
    model = published.load(latte_folder)
    hub.randomise(model, seed=7)
    folder = published.export(model, tmp_path / "mine", frames=16, base=str(latte_folder), record="17 updates on shapes")
    pipe = LattePipeline.from_pretrained(folder)
    x, t, text = random(2, 16, 4, 8, 8), torch.tensor([999, 3]), random(2, 7, 32, seed=1)
    with torch.no_grad():
        assert_same(model(x, t, text), call(pipe.transformer, x, t, text))
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.vae is not None and pipe.text_encoder is not None
    assert "17 updates on shapes" in (folder / "README.md").read_text()
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe("a dog", num_inference_steps=2, video_length=16, height=64, width=64).frames[0]) == 16
    again = published.load(folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    alone = published.export(model, tmp_path / "alone", frames=16)
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
    assert LattePipeline.from_pretrained(alone, **parts).transformer.config.video_length == 16


@pytest.mark.parametrize("changes, diffusion_cfg, message", [
    (dict(temporal_positions="rope"), None, "rotary"), (dict(qk_norm=True), None, "normalises queries"),
    (dict(temporal_spacing="stretch"), None, "stretched"), (dict(modulation="block"), None, "modulation is block"),
    ({}, DiffusionConfig(kind="flow"), "trained by flow to predict velocity"),
])
def test_what_the_format_cannot_hold_is_said(tmp_path, changes, diffusion_cfg, message):
    small = dict(layers=1, heads=2, head_dim=8, text_channels=8)
    with pytest.raises(ValueError, match=rf"cannot hold the model.*{message}"):
        published.export(Latte(ModelConfig(**small, **changes)), tmp_path / "out", frames=128, diffusion=diffusion_cfg)
    assert not list(tmp_path.iterdir())


def test_uploading_happens_when_asked_for(recipe, latte_folder, tmp_path, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, repo, exist_ok):
            calls.append(("create", repo, exist_ok))

        def upload_folder(self, folder_path, repo_id):
            calls.append(("upload", folder_path.name, repo_id))
            return f"hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    cfg = config.load(recipe)
    weights = dict(published.load(latte_folder).named_parameters())
    checkpoint.write(tmp_path / "mine", 1, cfg, {"ema.safetensors": weights})
    assert published.main(["export", str(tmp_path / "mine"), str(tmp_path / "out")]) == 0 and not calls
    assert published.main(["export", str(tmp_path / "mine"), str(tmp_path / "out"), "--push", "me/mine"]) == 0
    assert calls == [("create", "me/mine", True), ("upload", "out", "me/mine")] and "hub/me/mine" in capsys.readouterr().out


# ---- longer clips ----


def test_positions_of_longer_clips():
    def places(spacing, frames, step=1.0):
        return frame_times(ModelConfig(temporal_spacing=spacing), frames, step).tolist()

    for spacing in ("time", "frame", "stretch"):
        assert places(spacing, 16) == list(range(16))  # the promise: clips of the known length at the base rate stay as they are
    assert places("frame", 128) == places("frame", 128, 2.0) == list(range(128))
    assert places("stretch", 128)[-1] == 127 / 8 and places("stretch", 8) == list(range(8))
    assert places("time", 4, 2.0) == [0, 2, 4, 6]
    both = frame_times(ModelConfig(), 4, torch.tensor([1.0, 2.0]))
    assert both.tolist() == [[0, 1, 2, 3], [0, 2, 4, 6]]


@pytest.mark.parametrize("spacing", ["time", "frame", "stretch"])
def test_a_16_frame_clip_is_unchanged_by_the_extension(spacing):
    theirs = hub.transformer(video_length=16)
    found = published.Found("here", "latte", theirs.state_dict(), hub.SHAPE)
    model = Latte(published.model_config(found, temporal_spacing=spacing))
    published.fill(model, found)
    x, t, text = random(1, 16, 4, 8, 8), torch.tensor([500]), random(1, 7, 32, seed=1)
    with torch.no_grad():
        assert_same(model(x, t, text, frame_times=frame_times(model.cfg, 16, 1.0)), call(theirs, x, t, text))
        assert model(random(1, 128, 4, 8, 8), t, text, frame_times=frame_times(model.cfg, 128, 1.0)).isfinite().all()


def test_rotary_positions_start_anew_from_published_weights(latte_folder):
    model = published.load(latte_folder, temporal_positions="rope")
    x, t, text = random(1, 9, 4, 8, 8), torch.tensor([5]), random(1, 7, 32)
    with torch.no_grad():
        moved = model(x, t, text, frame_times=torch.arange(9) + 100)
        torch.testing.assert_close(model(x, t, text), moved, rtol=0, atol=1e-4)  # only differences of time count
        assert_same(model(x[:, :1], t, text), published.load(latte_folder)(x[:, :1], t, text))  # an image stays what it was


# ---- fine-tuning ----

YAML = """
run: {run}
model: {{layers: 2, heads: 3, head_dim: 8, text_channels: 32, sample_size: 8, temporal_spacing: frame}}
text: {{encoder: {folder}, max_tokens: 120}}
codec: {{kind: autoencoder, path: {folder}, subfolder: vae}}
diffusion: {{kind: ddpm, prediction: eps, loss: eps}}
sampler: {{name: ddim, steps: 2, guidance: 7.5}}
init: {{weights: {folder}}}
data: {{world: {{min_objects: 1, max_objects: 1}}, clips: 4}}
stages:
  - {{steps: 2, frames: 16, batch_size: 2, image_frames: 2}}
  - {{steps: 1, frames: 32, batch_size: 2}}
  - {{steps: 1, frames: 64, batch_size: 2}}
  - {{steps: 1, frames: 128, batch_size: 2}}
optim: {{learning_rate: 1.0e-3, warmup_steps: 1}}
train: {{log_every_steps: 1}}
memory: {{activations: 0}}
preview: {{count: 0}}
"""


@pytest.fixture(scope="module")
def recipe(latte_folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "latte.yaml"
    path.write_text(YAML.format(run=path.parent / "run", folder=latte_folder))
    return path


def test_fine_tuning_from_16_to_128_frames_and_back_to_diffusers(recipe, tmp_path, latte_folder):
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "train.py", str(recipe)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run = recipe.parent / "run"
    found = checkpoint.read(run)
    assert found.step == 5 and found.config.stages[-1].frames == 128
    start = published.load(latte_folder)
    tuned = Latte(found.config.model)
    checkpoint.load_weights(tuned, found, "model.safetensors")
    moved = [(p - q).abs().max().item() for p, q in zip(tuned.parameters(), start.parameters(), strict=True)]
    assert min(moved) > 0 and max(moved) < 0.02  # it went on from the published weights
    assert published.main(["export", str(run), str(tmp_path / "back"), "--base", str(latte_folder)]) == 0
    assert LattePipeline.from_pretrained(tmp_path / "back").transformer.config.video_length == 128


def test_adapters_train_resume_and_go_to_peft(recipe, latte_folder, tmp_path, capsys):
    from peft import PeftModel

    def run(name, *overrides):
        changes = ["init.lora_rank=2", "stages=[{steps: 4, frames: 4, batch_size: 2}]", "train.save_every_steps=2",
                   "memory.activations=1", "optim.learning_rate=0.05", *overrides]
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train.train(config.load(recipe, [f"run={tmp_path / name}", *changes])) == 0
        return tmp_path / name

    whole = run("whole")
    found = checkpoint.read(whole)
    stored = checkpoint._tensors(found, "ema.safetensors")
    assert all("lora_" in name for name in stored) and len(stored) == 2 * (2 * 7 + 2 * 4)
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "step-00000004")
    run("half")
    assert (whole / "parameters.sha256").read_text() == (half / "parameters.sha256").read_text()

    x, t, text = random(1, 5, 4, 8, 8), torch.tensor([500]), random(1, 7, 32, seed=1)
    base = LatteTransformer3DModel.from_pretrained(latte_folder, subfolder="transformer")
    with torch.no_grad():
        before = call(base, x, t, text)
        expected = pipeline.load(str(whole)).model(x, t, text)
        assert (expected - before).abs().max() > 1e-3  # the adapters do something
        assert_same(call(PeftModel.from_pretrained(base, str(whole / "adapters")), x, t, text), expected)
        merged = pipeline.load(str(latte_folder), adapters=str(whole / "adapters")).model
        assert_same(merged(x, t, text), expected)
        weaker = published.load(latte_folder)
        lora.merge(weaker, whole / "adapters", scale=0.0)
        assert_same(weaker(x, t, text), before)
    with pytest.raises(ValueError, match="no usable adapters"):
        lora.merge(weaker, tmp_path)


def test_a_fresh_adapter_changes_nothing(latte_folder):
    model, x, t, text = published.load(latte_folder), random(1, 3, 4, 8, 8), torch.tensor([5]), random(1, 7, 32, seed=1)
    with torch.no_grad():
        before = model(x, t, text)
        lora.add(model, InitConfig(weights="x", lora_rank=4))
        assert torch.equal(model(x, t, text), before)
    assert {name.split(".")[-2] for name in checkpoint.trained(model)} == {"default"}


def test_weights_that_do_not_fit_the_config_are_named(recipe, tmp_path):
    cfg = config.load(recipe, [f"run={tmp_path / 'run'}", "model.layers=3"])
    with pytest.raises(ValueError, match=r"init\.weights: .*missing: .*transformer_blocks\.2"):
        train.train(cfg)


# ---- memory ----


def test_the_sampling_plan_of_latte_1_fits_12_gb(tmp_path):
    """From full-size configs alone: T5-XXL in 8 bit, Latte-1 and the VAE in bfloat16, 16 frames of 512x512 with guidance."""
    (tmp_path / "text_encoder").mkdir()
    T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128,
             architectures=["T5EncoderModel"]).save_pretrained(tmp_path / "text_encoder")
    vae = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
           "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 32}
    (tmp_path / "config.json").write_text(json.dumps(vae))
    cfg = config.from_dict({"text": {"encoder": str(tmp_path), "max_tokens": 120, "quantize": "8bit"},
                            "codec": {"kind": "autoencoder", "path": str(tmp_path), "chunk_frames": 4},
                            "diffusion": {"kind": "ddpm", "prediction": "eps", "loss": "eps"}})
    peaks = pipeline.plan(cfg, 16, 512, 512, 7.5, torch.bfloat16)
    assert set(peaks) == {"text", "denoising", "decoding"}
    assert 4.7e9 < peaks["text"] < 5.5e9  # 4.76 G parameters of one byte, and the VAE
    assert 2.1e9 < peaks["denoising"] < 5e9 and 2.3e9 < peaks["decoding"] < 12e9
    assert max(peaks.values()) < 11.5e9


@pytest.mark.parametrize("tile", [0, 1024])
def test_the_plan_counts_what_a_real_pass_holds(latte_folder, capsys, tile):
    """The fake pass against torch's own count of what a real one allocates, on a model that is mostly activations."""
    cfg = ModelConfig(layers=1, heads=4, head_dim=16, text_channels=8)
    x, t, text = torch.randn(2, 8, 4, 32, 32), torch.zeros(2), torch.randn(2, 5, 8)

    def make():
        model = Latte(cfg)
        memory.apply(model, MemoryConfig(tile_tokens=tile))
        fake = [torch.zeros(value.shape) for value in (x, t, text)]
        return lambda: model(*fake), (model, *fake)

    real = Latte(cfg)
    memory.apply(real, MemoryConfig(tile_tokens=tile))
    held = sum(p.nbytes for p in real.parameters()) + sum(value.nbytes for value in (x, t, text))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile, torch.no_grad():
        real(x, t, text)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = max(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]))
    assert trace.peak(make, torch.float32) == pytest.approx(held + most, rel=0.05)
    assert sample.main([str(latte_folder), "--prompt", "a dog", "--dry-run"]) == 0
    assert "denoising" in capsys.readouterr().out


def test_the_text_encoder_goes_before_the_frames_come(latte_folder):
    pipe = pipeline.load(str(latte_folder), overrides=["sampler.steps=1"])
    pipe.condition(["a dog"])
    pipe.text.release()
    assert pipe(["a dog"], [0], 5, 64, 64).shape == (1, 5, 64, 64, 3)
    with pytest.raises(ValueError, match="released before 'a star' was encoded"):
        pipe(["a star"], [0], 5, 64, 64)


@pytest.mark.parametrize("kind, wanted", [("8bit", {"load_in_8bit": True}),
                                          ("4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})])
def test_quantized_encoders_are_asked_of_bitsandbytes(latte_folder, monkeypatch, kind, wanted):
    cfg = config.TextConfig(encoder=str(latte_folder), quantize=kind)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ValueError, match=r"text\.quantize: .*bitsandbytes, which is not installed"):
            TextEncoder(cfg)
    asked = {}
    monkeypatch.setattr("latte.text.find_spec", lambda name: True)
    monkeypatch.setattr("latte.text.AutoModelForTextEncoding.from_pretrained", lambda *a, **k: asked.update(k) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TextEncoder(cfg, "cuda:0")
    settings = asked["quantization_config"].to_dict()
    assert {key: settings[key] for key in wanted} == wanted and asked["device_map"] == {"": "cuda:0"}
