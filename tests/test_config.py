"""Configs load in one hop, every YAML of the repository is valid, and bad input is refused with the key's name."""

from pathlib import Path

import pytest

from latte import config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
TINY = Path(__file__).parent.parent / "configs" / "tiny.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_survives_a_round_trip(path, tmp_path):
    cfg = config.load(path)
    assert config.from_dict(config.to_dict(cfg)) == cfg
    (tmp_path / "again.yaml").write_text(config.to_yaml(cfg))
    assert config.load(tmp_path / "again.yaml") == cfg


def test_overrides_reach_nested_keys_lists_and_numbers():
    cfg = config.load(TINY, ["model.layers=3", "stages.1.steps=7", "stages.0.fps=[1,2]", "optim.learning_rate=3e-4"])
    assert (cfg.model.layers, cfg.stages[1].steps, cfg.stages[0].fps, cfg.optim.learning_rate) == (3, 7, [1.0, 2.0], 3e-4)


@pytest.mark.parametrize(("override", "named"), [
    ("model.layer=3", "model.layer: unknown key; did you mean model.layers?"),
    ("data.world.camera=[]", "data.world.camera: unknown key; did you mean data.world.cameras?"),
    ("stages.0.step=1", "stages.0.step: unknown key; did you mean stages.0.steps?"),
    ("modle.layers=3", "modle: unknown key; did you mean model?"),
    ("model.layers=abc", "model.layers"),
    ("model.layers=2.5", "model.layers"),
    ("model.layers=", "model.layers"),
    ("diffusion.kind=foo", "diffusion.kind"),
    ("sampler.steps=0", "sampler.steps"),
    ("optim.betas=[0.9]", "optim.betas"),
    ("stages=3", "stages"),
    ("stages=[]", "stages"),
    ("stages.9.steps=1", "stages.9.steps"),
    ("model=4", "model"),
    ("model.layers={", "model.layers"),
    ("justaword", "justaword"),
    ("data.source=folder", "data.path"),
    ("codec.kind=autoencoder", "codec.path"),
    ("diffusion.kind=ddpm diffusion.prediction=velocity", "diffusion.prediction"),
    ("model.out_channels=5", "model.out_channels"),
    ("model.out_channels=6", "model.out_channels"),
    ("train.micro_batches=3", "stages.0.batch_size"),
    ("train.trackers=[comet]", "train.trackers"),
    ("model.patch_size=5", "stages.0.height"),
    ('stages.0.buckets=[{"frame":1}]', "stages.0.buckets.0.frame: unknown key; did you mean stages.0.buckets.0.frames?"),
    ('stages.0.buckets=[{"share":0}]', "stages.buckets.share"),
    ('stages.0.buckets=[{"batch_size":3}] train.micro_batches=2', "stages.0.buckets.0.batch_size"),
    ("train.deterministic=true train.unit_clips=3", "stages.0.batch_size: must divide by train.unit_clips"),
    ("guard.spike=explode", "guard.spike"),
    ("guard.window=3", "guard.window"),
    ("guard.spike=skip train.mixed_precision=fp16", "guard.spike"),
    ("data.max_crop=1.5", "data.max_crop"),
    ("train.save_every_minutes=-1", "train.save_every_minutes"),
])
def test_bad_input_is_refused_with_the_key(override, named):
    with pytest.raises(ValueError) as caught:
        config.load(TINY, override.split(" ") if "source" not in override else [override])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: [1\n", "model: {layers: 2}\n  x: 3\n"])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        config.load(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml"):
        config.load(tmp_path / "none.yaml")


def test_stage_of_a_step():
    cfg = config.load(TINY)
    assert [cfg.stage_at(s) for s in (0, 5, 6, 11, 12)] == [0, 0, 1, 1, 1]
    assert cfg.total_steps == 12
