"""The trainer of codecs: it resumes bit for bit, what it leaves is a codec, and a shared checkpoint carries it."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import train
from data_tools import cache
from latte import checkpoint, config, pipeline, plan, train_codec
from latte.codec import VideoCodec
from latte.config import CodecConfig, Config
from latte.data import open_clips
from latte.model import Latte

YAML = """run: {run}
model: {{in_channels: 4, out_channels: 4, patch_size: 1, layers: 1, heads: 2, head_dim: 8, text_channels: 384}}
autoencoder: {{latent_channels: 4, widths: [8, 16, 16]}}
data: {{world: {{max_objects: 1}}}}
stages: [{{steps: {steps}, frames: 1, height: 16, width: 32, batch_size: 4}}]
optim: {{learning_rate: 1.0e-3, warmup_steps: 0}}
train: {{save_every_steps: 3, log_every_steps: 2}}
"""


def config_of(tmp_path, run, steps, *overrides) -> Config:
    path = tmp_path / f"{run}.yaml"
    path.write_text(YAML.format(run=tmp_path / run, steps=steps))
    return config.load(path, overrides)


def test_a_resumed_codec_is_that_of_an_uninterrupted_training_and_a_codec(tmp_path):
    whole = train_codec.train(config_of(tmp_path, "whole", 6))
    train_codec.train(config_of(tmp_path, "halves", 3))
    halves = train_codec.train(config_of(tmp_path, "halves", 6))
    weights = load_file(whole / "diffusion_pytorch_model.safetensors")
    again = load_file(halves / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)

    codec = VideoCodec(CodecConfig(kind="autoencoder", path=str(whole)))
    assert (codec.channels, codec.factor, codec.time_factor) == (4, 4, 1)
    frames = torch.rand(2, 3, 3, 16, 32) * 2 - 1
    latents = codec.encode(frames)
    assert latents.shape == (2, 3, 4, 4, 8) and codec.decode(latents).shape == frames.shape

    cfg = config_of(tmp_path, "model", 1, "codec.kind=autoencoder", f"codec.path={whole}")
    checkpoint.write(tmp_path / "model", 1, cfg, {"ema.safetensors": Latte(cfg.model).state_dict()})
    shared = checkpoint.publish(tmp_path / "model", tmp_path / "shared")
    moved = shared.rename(tmp_path / "moved")
    found = checkpoint.read(moved)
    assert found.config.codec.path == str(moved / "vae") and "vae/config.json" in found.files
    torch.testing.assert_close(VideoCodec(found.config.codec).encode(frames), latents, rtol=0, atol=0)


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    config_of(tmp_path, "run", 4)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(train_codec.RunLog, "step", lambda self, stage: os.kill(os.getpid(), signal.SIGTERM))
            assert train_codec.main([str(tmp_path / "run.yaml")]) == 75
        assert checkpoint.read(tmp_path / "run").step == 1
        assert train_codec.main([str(tmp_path / "run.yaml")]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    whole = train_codec.train(config_of(tmp_path, "whole", 4)) / "diffusion_pytorch_model.safetensors"
    assert whole.read_bytes() == (tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_folding_codec_through_cache_training_and_sampling(tmp_path):
    folder = train_codec.train(config_of(tmp_path, "codec", 1))
    overrides = ["codec.kind=autoencoder", f"codec.path={folder}", "codec.fold=4", "codec.waves=2", "codec.gains=[1,4]",
                 "model.in_channels=8", "model.out_channels=8", "stages.0.frames=10",
                 "data.clips=4", "data.variants=1", "preview.count=0"]
    cfg = config_of(tmp_path, "run", 2, *overrides)
    assert "3x8x4x8" in plan.describe(cfg)
    cache.build(cfg, tmp_path / "cache")
    overrides += ["data.source=cache", f"data.path={tmp_path / 'cache'}"]
    cached = config_of(tmp_path, "run", 2, *overrides)
    clips = open_clips(cached.data, cached.seed, cached.stages)
    assert clips.clip(cached.stages[0], 0, 0).x.shape == (3, 8, 4, 8)
    assert VideoCodec.told(cached.codec, clips).latent_shape(10, 16, 32) == (3, 8, 4, 8)
    train.train(cached)
    pipe = pipeline.load(str(checkpoint.newest_good(cached.run)[0].path))
    assert pipe(["a red ring"], [0], 10, 16, 32).shape == (1, 10, 16, 32, 3)
    fewer = ["model.in_channels=4", "model.out_channels=4", "codec.gains=[]", "codec.waves=1"]
    for key, changes in (("codec.waves", fewer), ("codec.fold", [*fewer, "codec.fold=1"]), ("codec.gains", ["codec.gains=[1,2]"])):
        with pytest.raises(ValueError, match=key):
            train.train(config_of(tmp_path, "other", 2, *overrides, *changes))


def test_the_foreground_weighs_more(tmp_path):
    cfg = config_of(tmp_path, "run", 1).autoencoder
    vae = train_codec.build(cfg)
    x = torch.zeros(4, 1, 3, 16, 16)
    x[0, 0, :, :4, :4] = 1.0
    noise = torch.zeros(4, 1, 4, 4, 4)
    with torch.no_grad():
        loss, error = train_codec.losses(vae, x, noise, cfg)
        cfg.foreground = 0.0
        plain, same = train_codec.losses(vae, x, noise, cfg)
    assert loss > plain and error == same


def test_frames_between_are_decoded_from_the_mean_of_their_neighbours_latents(tmp_path):
    cfg = config_of(tmp_path, "run", 1).autoencoder
    vae = train_codec.build(cfg)
    x = torch.rand(2, 4, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, 8, 4, 4, 4)
    with torch.no_grad():
        plain, error = train_codec.losses(vae, x, noise[:, :4], cfg)
        cfg.straight = 0.5
        loss, same = train_codec.losses(vae, x, noise, cfg)
        z = vae.encode(x.flatten(0, 1)).latent.unflatten(0, (2, 4))
        between = torch.stack([(z[:, 0] + z[:, 2]) / 2, (z[:, 1] + z[:, 3]) / 2], 1) + cfg.noise * noise[:, 4:6]
        off = vae.decode(between.flatten(0, 1)).sample - x[:, 1:3].flatten(0, 1)
        weight = 1 + cfg.foreground * (x[:, 1:3].flatten(0, 1) - x.flatten(0, 1).mean(0)).abs().amax(1, keepdim=True)
    torch.testing.assert_close(loss, plain + 0.5 * (weight * (off.abs() + off.square())).mean())
    assert same == error


def test_a_straight_codec_with_a_lighter_encoder_trains(tmp_path):
    cfg = config_of(tmp_path, "run", 1, "stages.0.frames=3", "autoencoder.straight=0.5", "autoencoder.encoder_widths=[8, 8, 8]")
    vae = VideoCodec(CodecConfig(kind="autoencoder", path=str(train_codec.train(cfg)))).vae
    parts = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert parts[0] < parts[1] / 2


def test_a_decoder_that_learns_on_leaves_the_latents_alone(tmp_path):
    folder = train_codec.train(config_of(tmp_path, "first", 1))
    more = train_codec.train(config_of(tmp_path, "second", 2, f"autoencoder.decoder_of={folder}"))
    old, new = (VideoCodec(CodecConfig(kind="autoencoder", path=str(path))) for path in (folder, more))
    x = torch.rand(1, 1, 3, 16, 32) * 2 - 1
    z = old.encode(x)
    assert torch.equal(new.encode(x), z) and not torch.equal(new.decode(z), old.decode(z))


def test_bad_settings_are_named(tmp_path, capsys):
    for change, told in (("autoencoder.widths=[8, 12]", "autoencoder.widths"), ("stages.0.height=18", "stages.0.height"),
                         ("autoencoder.latent_channels=3", "autoencoder.latent_channels"), ("data.source=cache", "data.source"),
                         ("autoencoder.noise=-1", "autoencoder.noise"), ("autoencoder.straight=1", "stages.0.frames"),
                         ("autoencoder.decoder_of=nowhere", "autoencoder.decoder_of"),
                         ("autoencoder.encoder_widths=[8, 16]", "autoencoder.encoder_widths")):
        config_of(tmp_path, "run", 1)
        more = ["data.path=x"] if "cache" in change else []
        assert train_codec.main([str(tmp_path / "run.yaml"), change, *more]) == 1
        assert told in capsys.readouterr().err
