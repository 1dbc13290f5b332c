"""The trainer of codecs: it resumes bit for bit, what it leaves is a codec, and a shared checkpoint carries it."""

import torch
from safetensors.torch import load_file

from latte import checkpoint, config, train_codec
from latte.codec import VideoCodec
from latte.config import CodecConfig, Config
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


def test_the_foreground_weighs_more(tmp_path):
    cfg = config_of(tmp_path, "run", 1).autoencoder
    vae = train_codec.build(cfg)
    x = torch.zeros(4, 3, 16, 16)
    x[0, :, :4, :4] = 1.0
    noise = torch.zeros(4, 4, 4, 4)
    with torch.no_grad():
        loss, error = train_codec.losses(vae, x, noise, cfg)
        cfg.foreground = 0.0
        plain, same = train_codec.losses(vae, x, noise, cfg)
    assert loss > plain and error == same


def test_bad_settings_are_named(tmp_path, capsys):
    for change, told in (("autoencoder.widths=[8, 12]", "autoencoder.widths"), ("stages.0.height=18", "stages.0.height"),
                         ("autoencoder.latent_channels=3", "autoencoder.latent_channels"), ("data.source=cache", "data.source"),
                         ("autoencoder.noise=-1", "autoencoder.noise")):
        config_of(tmp_path, "run", 1)
        more = ["data.path=x"] if "cache" in change else []
        assert train_codec.main([str(tmp_path / "run.yaml"), change, *more]) == 1
        assert told in capsys.readouterr().err
