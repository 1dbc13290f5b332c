"""Caches of latents and text states: training on one sees, bit for bit, what it would see without, or is refused."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from data_tools import cache
from latte import cached, config, keyed, video
from latte.cached import CachedClips, check
from latte.clips import WorldClips
from latte.codec import VideoCodec
from latte.data import make_loader, open_clips
from latte.text import TextEncoder

ROOT = Path(__file__).parent.parent
WORLD = {"clips": 5, "variants": 2, "caption_dropout": 0.3,
         "world": {"min_objects": 1, "max_objects": 1, "motions": ["linear"], "cameras": ["static"]}}
STAGES = [{"steps": 3, "frames": 1, "height": 16, "width": 16, "batch_size": 4},
          {"steps": 4, "frames": 4, "height": 16, "width": 24, "batch_size": 2, "image_frames": 2, "fps": [2.0, 8.0]}]
CLASSES = {"conditioning": "class", "classes": 2}


def settings(data=WORLD, stages=STAGES, **sections):
    model = {"in_channels": 3, "out_channels": 3, **sections.pop("model", {})}
    return config.from_dict({"data": data, "stages": stages, "model": model, **sections})


@pytest.fixture(scope="module", autouse=True)
def text():
    """An encoder to compare with; all writers in this process share another, to load it once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.Maker, "text", TextEncoder(config.TextConfig()))
        yield TextEncoder(config.TextConfig())


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    save_vae(folder, seed=0)
    return folder


def save_vae(folder, seed):
    torch.manual_seed(seed)
    AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                  scaling_factor=0.5, shift_factor=0.1).save_pretrained(folder)


def autoencoder(folder, **changes):
    return {"kind": "autoencoder", "path": str(folder), **changes}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three clips of 1.5 s at 8 fps with captions, and one without."""
    folder = tmp_path_factory.mktemp("videos")
    for i, (height, width) in enumerate(((32, 48), (48, 32), (32, 32))):
        picture = np.random.default_rng(i).integers(0, 256, (4, 6, 3)).repeat(height // 4, 0).repeat(-(-width // 6), 1)[:, :width]
        moved = [np.roll(picture, 2 * j, axis=1) for j in range(12)]
        video.write(folder / f"{i}.mp4", np.stack(moved).astype(np.uint8), 8)
        (folder / f"{i}.txt").write_text(f"pattern {i}")
    shutil.copy(folder / "0.mp4", folder / "mute.mp4")
    return folder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A cache of the world's pixels, in shards of about two entries, and its config. Tests that change it take a copy."""
    cfg = settings(stages=[{"steps": 4, "frames": 8, "height": 64, "width": 64, "batch_size": 2}])
    out = tmp_path_factory.mktemp("pixels") / "cache"
    cache.build(cfg, out, shard_mib=1)
    return cfg, out


def on(out, cfg, **changes):
    return replace(cfg.data, source="cache", path=str(out), **changes)


def reader(out, cfg, **changes):
    return CachedClips(on(out, cfg, **changes), cfg.seed, [shape for _, shape in cfg.shapes()])


def batches(data, cfg, **where):
    return list(make_loader(open_clips(data, cfg.seed, cfg.stages), data, cfg.stages, cfg.seed, **where))


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "sources.jsonl"}


def assert_same_training(cfg, out, text):
    """Batches from the cache are the source's, each clip encoded alone. An image is a frame of a clip that was encoded whole; a VAE
    rounds differently for another number of frames."""
    codec = VideoCodec(cfg.codec)
    sampled = cfg.codec.kind == "autoencoder" and cfg.codec.posterior == "sample"
    for plain, stored in zip(batches(cfg.data, cfg), batches(on(out, cfg), cfg), strict=True):
        assert (plain.positions, plain.captions, plain.notes) == (stored.positions, stored.captions, stored.notes)
        assert torch.equal(plain.fps, stored.fps) and sampled == (stored.std is not None)
        for i, x in enumerate(plain.x):
            frames = len(x) - cfg.stages[plain.stage].shapes[plain.bucket].image_frames
            z = codec.encode(x[None])[0]
            torch.testing.assert_close(stored.x[i], z, atol=0 if codec.vae is None else 1e-6, rtol=0)
            assert torch.equal(codec.encode(x[None, :frames])[0], stored.x[i, :frames])
            if sampled:
                spread = codec.vae.encode(x[:frames]).latent_dist.std * codec.scale
                assert torch.equal(spread, stored.std[i, :frames]) and stored.std[i].shape == z.shape
                noise = torch.from_numpy(keyed.normal(tuple(z.shape), 0, "noise"))
                drawn = codec.encode(x[None], noise[None])[0]
                torch.testing.assert_close(stored.x[i] + stored.std[i] * noise, drawn, atol=1e-6, rtol=1e-5)
            for caption, states in zip(plain.captions[i], stored.states[i], strict=True):
                assert torch.equal(text.encode([caption])[0][0], states)


@pytest.mark.parametrize("codec", ["pixels", "mean", "sample"])
def test_training_on_a_cache_of_the_world_sees_what_it_would_see_without(tmp_path, vae, text, codec):
    cfg = settings(codec={} if codec == "pixels" else autoencoder(vae, posterior=codec))
    cache.build(cfg, tmp_path)
    assert_same_training(cfg, tmp_path, text)
    clips = reader(tmp_path, cfg)
    assert (clips.variants, clips.classes, clips.text_width, clips.pool(cfg.stages[1]).size) == (2, [], 384, 5)
    assert (clips.channels, clips.factor, clips.time_factor) == ((3, 1, 1) if codec == "pixels" else (4, 2, 1))


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_training_on_a_cache_of_videos_sees_what_it_would_see_without(tmp_path, vae, videos, text, posterior):
    data = {"source": "folder", "path": str(videos), "variants": 3, "flip": True, "crop": "random", "caption_dropout": 0.3}
    stages = [{"steps": 4, "batch_size": 2, "buckets": [
        {"frames": 4, "height": 16, "width": 24, "batch_size": 2, "fps": [4.0, 8.0], "image_frames": 1},
        {"frames": 4, "height": 24, "width": 16, "batch_size": 2}]}]
    cfg = settings(data, stages, codec=autoencoder(vae, posterior=posterior))
    cache.build(cfg, tmp_path)
    clips, source = reader(tmp_path, cfg), open_clips(cfg.data, cfg.seed, cfg.stages)
    assert clips.dropped == source.dropped == {"mute.mp4": "no caption"}
    for shape in cfg.stages[0].buckets:
        assert clips.pool(shape) == source.pool(shape) and clips.pool(shape).dropped
    assert_same_training(cfg, tmp_path, text)


def test_classes_are_in_the_cache_and_need_no_text(tmp_path, videos):
    for name in ("Archery", "Biking"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(videos / "0.mp4", tmp_path / "data" / name)
    data = {"source": "folder", "path": str(tmp_path / "data"), "layout": "classes", "variants": 1}
    cfg = settings(data, [{"steps": 1, "frames": 4, "height": 16, "width": 16, "batch_size": 2}], model=CLASSES)
    cache.build(cfg, tmp_path / "cache")
    clips = reader(tmp_path / "cache", cfg)
    assert clips.classes == ["Archery", "Biking"] and clips.null is None and clips.text_width == 0
    plain, stored = batches(cfg.data, cfg)[0], batches(on(tmp_path / "cache", cfg), cfg)[0]
    assert torch.equal(plain.x, stored.x) and plain.captions == stored.captions and stored.states is None
    check(tmp_path / "cache", cfg.codec, None)
    with pytest.raises(ValueError, match=r"^model\.conditioning: .* no text states"):
        check(tmp_path / "cache", cfg.codec, cfg.text)


def test_only_what_changed_is_made_again(tmp_path, videos, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(videos, data)
    cfg = settings({"source": "folder", "path": str(data), "variants": 2},
                   [{"steps": 1, "frames": 4, "height": 16, "width": 16, "batch_size": 3}])
    made = []

    def counted(what):
        honest = getattr(cache.Maker, what)
        monkeypatch.setattr(cache.Maker, what, lambda self, job: made.append((what, job)) or honest(self, job))

    counted("clip")
    counted("states")
    monkeypatch.setattr(cache, "_say", lambda *args: None)  # and with it the probes

    def rebuilt():
        made.clear()
        cache.build(cfg, tmp_path / "cache")
        before = files(tmp_path / "cache")
        found = list(made)
        cache.build(cfg, tmp_path / "fresh")
        assert before == files(tmp_path / "fresh")
        shutil.rmtree(tmp_path / "fresh")
        return found

    assert len([job for what, job in rebuilt() if what == "clip"]) == 6
    assert rebuilt() == []
    (data / "0.txt").write_text("another caption")
    assert rebuilt() == [("states", "another caption")]
    shutil.copy(data / "2.mp4", data / "0.mp4")
    assert [job for _, job in rebuilt()] == [(0, 0, 0), (0, 0, 1)]
    shutil.copy(data / "1.mp4", data / "00.mp4")  # moves the numbers of those after it
    (data / "00.txt").write_text("one more")
    assert [job for _, job in rebuilt()] == [(0, 1, 0), (0, 1, 1), "one more"]


def test_workers_and_copies_of_the_reader_read_the_same(pixels):
    cfg, out = pixels
    alone = batches(on(out, cfg), cfg)
    for a, b in zip(alone, batches(on(out, cfg, workers=2, recycle_batches=3), cfg), strict=True):
        assert torch.equal(a.x, b.x) and a.captions == b.captions
        assert all(torch.equal(p, q) for [p], [q] in zip(a.states, b.states, strict=True))
    clips = reader(out, cfg)
    first = clips.clip(cfg.stages[0], 4, 1)
    copied = pickle.loads(pickle.dumps(clips))
    assert torch.equal(copied.clip(cfg.stages[0], 4, 1).x, first.x)
    first.x.zero_()  # is the reader's own no longer
    assert torch.equal(copied.clip(cfg.stages[0], 4, 1).x, clips.clip(cfg.stages[0], 4, 1).x)


def test_few_shards_are_open_at_once(pixels, monkeypatch):
    monkeypatch.setattr(cached, "OPEN_SHARDS", 2)
    cfg, out = pixels
    clips, source = reader(out, cfg), WorldClips(cfg.data, cfg.seed)
    for index in (*range(5), *range(5)):
        assert torch.equal(clips.clip(cfg.stages[0], index, 0).x, source.clip(cfg.stages[0], index, 0).x)
        assert len(clips._handles) <= 2


def test_many_processes_write_what_one_writes(pixels, tmp_path):
    cfg, out = pixels
    cache.build(cfg, tmp_path, shard_mib=1, processes=2)
    assert files(tmp_path) == files(out)


def test_a_killed_writer_goes_on_and_ends_in_the_same_bytes(tmp_path):
    stages = [{"steps": 1, "frames": 8, "height": 64, "width": 64, "batch_size": 2}]
    cfg = settings({**WORLD, "clips": 30}, stages, model={"conditioning": "none"})
    (tmp_path / "run.yaml").write_text(config.to_yaml(cfg))
    out = tmp_path / "cache"
    writer = subprocess.Popen([sys.executable, "-m", "data_tools.cache", str(tmp_path / "run.yaml"), str(out), "--shard-mib", "1"],
                              cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("8x64x64-*.json"))) < 3 and writer.poll() is None:
        time.sleep(0.002)
    writer.kill()
    assert writer.wait() == -signal.SIGKILL and not (out / "index.json").exists()
    with pytest.raises(ValueError, match=r"^data\.path: .* is no finished cache"):
        reader(out, cfg)
    (out / "8x64x64-00000-0123456789abcdef.safetensors.writing").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("8x64x64-*.json")}
    cache.build(cfg, out, shard_mib=1)
    assert 3 <= len(kept) < 30 and all(path.stat().st_mtime_ns == at for path, at in kept.items())
    cache.build(cfg, tmp_path / "unbroken", shard_mib=1)
    assert files(out) == files(tmp_path / "unbroken")


def test_two_writers_do_not_share_a_folder(pixels):
    cfg, out = pixels
    handle = cache._lock(out)
    with pytest.raises(ValueError, match="another data_tools.cache is at work"):
        cache.build(cfg, out, shard_mib=1)
    os.close(handle)


@pytest.mark.parametrize(("change", "key"), [
    ({"seed": 1}, "seed"),
    ({"data": {**WORLD, "wordings": 2}}, "data.wordings"),
    ({"data": {**WORLD, "clips": 6}}, "data.clips"),
    ({"data": {**WORLD, "variants": 3}}, "data.variants"),
    ({"data": {**WORLD, "world": {**WORLD["world"], "max_objects": 2}}}, "data.world.max_objects"),
    ({"data": {**WORLD, "world": {**WORLD["world"], "motions": ["still"]}}}, "data.world.motions"),
    ({"stages": [{"frames": 8, "height": 64, "width": 32}]}, "stages.width"),
    ({"stages": [{"frames": 8, "height": 64, "width": 64, "fps": [4.0]}]}, "stages.fps"),
])
def test_a_cache_of_other_clips_is_refused(pixels, change, key):
    _, out = pixels
    cfg = settings(**{"data": WORLD, "stages": [{"frames": 8, "height": 64, "width": 64}], **change})
    with pytest.raises(ValueError, match=rf"^{key}: .* run data_tools\.cache again"):
        reader(out, cfg)


def test_what_a_cache_does_not_depend_on_is_not_compared(pixels):
    _, out = pixels
    cfg = settings({**WORLD, "clips": 0, "variants": 0, "caption_dropout": 0.0, "base_fps": 4.0},
                   [{"frames": 8, "height": 64, "width": 64, "batch_size": 4}], codec={"chunk_frames": 2})
    clips = reader(out, cfg)
    check(out, cfg.codec, replace(cfg.text, cache_mib=1))
    assert clips.variants == 2 and reader(out, cfg, variants=1).variants == 1


@pytest.mark.parametrize(("change", "key"), [
    ({"layout": "videos"}, "data.layout"), ({"clip_rule": "linspace"}, "data.clip_rule"), ({"flip": True}, "data.flip"),
    ({"crop": "random"}, "data.crop"), ({"max_crop": 0.5}, "data.max_crop"), ({"decoder": "decord"}, "data.decoder"),
])
def test_a_cache_of_videos_made_otherwise_is_refused(change, key):
    data = {"source": "folder", "path": "videos"}
    was = cached.settings(settings(data).data, 0, "folder")
    with pytest.raises(ValueError, match=rf"^{key}: "):
        cached._compare("cache", was, cached.settings(settings({**data, **change}).data, 0, "folder"))
    strides = [cached.settings(settings({**data, "clip_rule": "stride", "frame_interval": k}).data, 0, "folder") for k in (2, 3)]
    with pytest.raises(ValueError, match=r"^data\.frame_interval: is 3 here, but the cache cache was made with 2"):
        cached._compare("cache", *strides)
    with pytest.raises(ValueError, match=r"^stages: .* other aspects"):
        held = [(8, 64, 64, (8.0,)), (8, 64, 96, (8.0,))]
        cached._check_shapes("cache", held, [config.ShapeConfig(frames=8, height=64, width=64)], "folder", 1)


def test_another_codec_or_text_encoder_is_refused(tmp_path, vae, text):
    folder, out = tmp_path / "vae", tmp_path / "cache"
    shutil.copytree(vae, folder)
    cfg = settings(stages=STAGES[:1], codec=autoencoder(folder))
    cache.build(cfg, out)
    check(out, cfg.codec, cfg.text)
    for change in ({"posterior": "sample"}, {"dtype": "bfloat16"}, {"tile_size": 64}):
        with pytest.raises(ValueError, match=rf"^codec\.{next(iter(change))}: .* run data_tools\.cache again"):
            check(out, replace(cfg.codec, **change), cfg.text)
    with pytest.raises(ValueError, match=r"^codec\.kind: is pixels here, but the cache .* autoencoder"):
        check(out, config.CodecConfig(), cfg.text)
    for change in ({"max_tokens": 20}, {"dtype": "bfloat16"}, {"quantize": "8bit"}):
        with pytest.raises(ValueError, match=rf"^text\.{next(iter(change))}: "):
            check(out, cfg.codec, replace(cfg.text, **change))
    minilm = cached._unchanged  # another text encoder: the same settings, other files
    cached._unchanged = lambda path, *rest: "0" * 64 if path.name == "model.safetensors" else minilm(path, *rest)
    try:
        with pytest.raises(ValueError, match=r"^text\.encoder: the files of minilm are not those"):
            check(out, cfg.codec, cfg.text)
    finally:
        cached._unchanged = minilm

    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    check(out, replace(cfg.codec, path=str(moved)), cfg.text)  # the same files at another place
    check(out, cfg.codec, cfg.text)  # not at hand: its settings are the same
    with pytest.raises(ValueError, match=r"^codec\.path: is somebody/vae here"):
        check(out, replace(cfg.codec, path="somebody/vae"), cfg.text)
    assert len(batches(on(out, cfg), cfg)) == 3  # training needs no VAE
    save_vae(folder, seed=1)
    with pytest.raises(ValueError, match=r"^codec\.path: the files of .* are not those"):
        check(out, cfg.codec, cfg.text)
    cache.build(cfg, out)
    check(out, cfg.codec, cfg.text)
    assert_same_training(cfg, out, text)


def test_damaged_files_are_named(pixels, tmp_path):
    cfg, out = pixels
    for number, part in enumerate(("8x64x64-00001", "captions-00000", "entries")):
        copied = tmp_path / str(number)
        shutil.copytree(out, copied)
        damaged = next(copied.glob(f"{part}-*.safetensors"))
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(ValueError, match=rf"{damaged.name}: damaged, its SHA-256"):
            reader(copied, cfg).clip(cfg.stages[0], 1, 1)
        damaged.write_bytes(whole[:-9])
        with pytest.raises(ValueError, match=rf"{damaged.name}: damaged, it has"):
            reader(copied, cfg)
        damaged.unlink()
        with pytest.raises(ValueError, match=rf"{damaged.name}: missing"):
            reader(copied, cfg)
        cache.build(cfg, copied, shard_mib=1)
        assert files(copied) == files(out)
    for wrong, message in (("{", "is damaged"), ('{"format": 0}', "of format 0"), ("[]", "is damaged")):
        (copied / "index.json").write_text(wrong)
        with pytest.raises(ValueError, match=rf"^data\.path: .*{message}"):
            reader(copied, cfg)


def test_damaged_shards_are_not_taken_over(pixels, tmp_path):
    cfg, out = pixels
    copied = tmp_path / "cache"
    shutil.copytree(out, copied)
    damaged = next(copied.glob("8x64x64-00001-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=rf"{damaged.name}: damaged"):
        cache.build(cfg, copied, shard_mib=2)  # other shards of the same entries
    damaged.unlink()
    cache.build(cfg, copied, shard_mib=2)
    cache.build(cfg, tmp_path / "fresh", shard_mib=2)
    assert files(copied) == files(tmp_path / "fresh")


def test_a_disk_too_small_is_refused_and_a_full_one_is_one_error(pixels, tmp_path, monkeypatch, capsys):
    cfg, whole = pixels
    (tmp_path / "run.yaml").write_text(config.to_yaml(cfg))
    command = [str(tmp_path / "run.yaml"), str(tmp_path / "cache"), "--shard-mib", "1"]
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
        for more in ([], ["--dry-run"]):
            assert cache.main(command + more) == 1
            assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'cache'}: the cache needs ")
    honest, count = cache.save_file, []

    def full(tensors, path):
        count.append(path)
        if len(count) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(tensors, path)

    monkeypatch.setattr(cache, "save_file", full)
    assert cache.main(command) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "8x64x64-00002" in lines[0] and "No space left" in lines[0]
    assert not list((tmp_path / "cache").glob("*.writing")) and not (tmp_path / "cache" / "index.json").exists()
    assert cache.main(command) == 0 and len(list((tmp_path / "cache").glob("8x64x64-*.json"))) == 5
    assert files(tmp_path / "cache") == files(whole)


def test_bfloat16_stores_half_and_rounds(pixels, tmp_path):
    cfg, out = pixels
    cache.build(cfg, tmp_path, dtype="bfloat16")
    exact, rounded = (reader(place, cfg).clip(cfg.stages[0], 3, 1) for place in (out, tmp_path))
    assert rounded.x.dtype == rounded.states.dtype == torch.float32 and rounded.caption == exact.caption
    for name in ("x", "states"):
        whole, short = getattr(exact, name), getattr(rounded, name)
        assert torch.equal(whole.bfloat16().float(), short) and not torch.equal(whole, short)
    sizes = [sum(path.stat().st_size for path in place.glob("8x64x64-*.safetensors")) for place in (out, tmp_path)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.01)


def test_unreadable_clips_are_left_out_named_and_tried_again(pixels, tmp_path, monkeypatch, capsys):
    cfg, out = pixels
    honest = WorldClips.clip

    def broken(self, shape, index, variant):
        if index == 2:
            raise ValueError("scene-2.mp4: damaged after 0.5 s")
        return honest(self, shape, index, variant)

    with monkeypatch.context() as damaged:
        damaged.setattr(WorldClips, "clip", broken)
        cache.build(cfg, tmp_path, shard_mib=1)
        assert "8 entries of 5 clips" in (said := capsys.readouterr().out) and "2 entries left out" in said
        assert "left out scene 2, variant 1, of 8 x 64 x 64 at 8 fps: scene-2.mp4: damaged after 0.5 s" in said
        first = files(tmp_path)
        cache.build(cfg, tmp_path, shard_mib=1)
        assert files(tmp_path) == first
        plain = batches(cfg.data, cfg)
    clips = reader(tmp_path, cfg)
    assert clips.pool(cfg.stages[0]).size == 5
    with pytest.raises(ValueError, match="scene 2: scene-2.mp4: damaged after 0.5 s"):
        clips.clip(cfg.stages[0], 2, 1)
    stored = batches(on(tmp_path, cfg), cfg)
    assert sum(len(batch.notes) for batch in stored) == sum(len(batch.notes) for batch in plain) > 0
    assert all(torch.equal(a.x, b.x) and a.captions == b.captions for a, b in zip(plain, stored, strict=True))
    cache.build(cfg, tmp_path, shard_mib=1)
    assert files(tmp_path) == files(out)


def test_the_command_says_what_it_will_do_and_what_is_wrong(tmp_path, capsys):
    cfg = settings(stages=STAGES[:1])
    (tmp_path / "run.yaml").write_text(config.to_yaml(cfg))
    command = [str(tmp_path / "run.yaml"), str(tmp_path / "cache")]
    assert cache.main([*command, "data.clips=3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 clips, 2 of each; 6 entries to make" in said and f"latents: {6 * 3 * 16 * 16 * 4} bytes" in said
    assert "free disk: " in said and "expected time: " in said and not (tmp_path / "cache").exists()
    for wrong, message in (("data.variants=0", "data.variants: "), ("data.clips=0", "data.clips: "), ("data.clip=1", "data.clip"),
                           ("data.source=cache data.path=x", "data.source: "), ("--processes 0", "--processes"),
                           ("data.source=folder data.path=nowhere", "data.path: ")):
        assert cache.main([*command, *wrong.split()]) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_the_index_names_every_file_that_is_read(pixels):
    _, out = pixels
    index = json.loads((out / "index.json").read_text())
    assert {path.name for path in out.glob("*.safetensors")} == set(index["files"])
    for name, facts in index["files"].items():
        assert facts == {"bytes": (out / name).stat().st_size, "sha256": cached.sha256(out / name)}
