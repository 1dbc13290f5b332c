"""Batches are functions of (seed, stages, step): no process count, worker or start changes what an update sees."""

import numpy as np
import pytest
import torch
from PIL import Image

from latte import video
from latte.config import DataConfig, StageConfig, WorldConfig
from latte.data import FolderClips, WorldClips, make_loader, open_clips

STAGES = [StageConfig(steps=3, frames=1, height=16, width=16, batch_size=4),
          StageConfig(steps=2, frames=4, height=16, width=24, batch_size=2, fps=[2.0, 8.0])]
WORLD = DataConfig(clips=5, caption_dropout=0.5, world=WorldConfig(min_objects=1, max_objects=1, motions=["linear"]))


def batches(cfg=WORLD, stages=STAGES, **where):
    return list(make_loader(open_clips(cfg, 0, stages), cfg, stages, 0, **where))


def test_positions_run_on_over_stages_and_shapes_follow_them():
    got = batches()
    assert [b.step for b in got] == [0, 1, 2, 3, 4]
    assert [p for b in got for p in b.positions] == list(range(16))
    assert [tuple(b.frames.shape) for b in got] == [(4, 1, 3, 16, 16)] * 3 + [(2, 4, 3, 16, 24)] * 2
    assert set(torch.cat([b.fps for b in got[3:]]).tolist()) <= {2.0, 8.0}
    assert max(b.frames.abs().max() for b in got) <= 1


def test_starting_later_gives_the_same_batches():
    whole = batches()
    for start in (1, 3, 4):
        for a, b in zip(whole[start:], batches(start_step=start), strict=True):
            assert (a.positions, a.captions) == (b.positions, b.captions)
            assert torch.equal(a.frames, b.frames) and torch.equal(a.fps, b.fps)


def test_ranks_slice_the_same_global_batch():
    whole = batches()
    parts = [batches(rank=rank, ranks=2) for rank in range(2)]
    for i, batch in enumerate(whole):
        assert batch.captions == parts[0][i].captions + parts[1][i].captions
        assert torch.equal(batch.frames, torch.cat([parts[0][i].frames, parts[1][i].frames]))
    with pytest.raises(ValueError, match=r"stages\.0\.batch_size"):
        batches(rank=0, ranks=3)


def test_captions_are_dropped_per_sample_at_the_asked_rate():
    stages = [StageConfig(steps=1, frames=1, height=16, width=16, batch_size=400)]
    for rate in (0.0, 0.1, 0.5, 1.0):
        cfg = DataConfig(clips=5, caption_dropout=rate, world=WORLD.world)
        dropped = [c == "" for [c] in batches(cfg, stages)[0].captions]
        assert np.mean(dropped) == pytest.approx(rate, abs=0.075)  # three standard deviations
    assert batches()[0].captions != batches()[1].captions


def test_every_epoch_goes_through_all_clips_in_a_new_order():
    stages = [StageConfig(steps=8, frames=1, height=16, width=16, batch_size=5)]
    cfg = DataConfig(clips=5, caption_dropout=0.0, world=WORLD.world)
    orders = [tuple(c for [c] in b.captions) for b in batches(cfg, stages)]
    assert all(set(order) == set(orders[0]) for order in orders)
    assert len(set(orders)) > 1


def test_endless_world_clips_never_repeat():
    clips = WorldClips(DataConfig(clips=0, world=WORLD.world), 0)
    frames = [clips.clip(position, STAGES[0], 8.0)[0].tobytes() for position in range(20)]
    assert len(set(frames)) == 20


def moving_bar(path, seconds, fps):
    """A video whose bar is at a column proportional to time."""
    count = round(seconds * fps)
    frames = np.zeros((count, 32, 64, 3), np.uint8)
    for i in range(count):
        column = int(60 * i / count)
        frames[i, :, column:column + 4] = 255
    video.write(path, frames, fps)


def test_a_folder_of_videos_with_captions(tmp_path):
    moving_bar(tmp_path / "good.mp4", 4, 24)
    (tmp_path / "good.txt").write_text("a bar moves right\n")
    moving_bar(tmp_path / "short.mp4", 0.25, 24)
    (tmp_path / "short.txt").write_text("too short")
    moving_bar(tmp_path / "mute.mp4", 4, 24)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "broken.txt").write_text("broken")
    cfg = DataConfig(source="folder", path=str(tmp_path), caption_dropout=0.0)
    stages = [StageConfig(steps=2, frames=8, height=32, width=32, batch_size=2, fps=[4.0])]
    clips = FolderClips(cfg, 0, stages)
    assert [clip.path.name for clip in clips.clips] == ["good.mp4"]
    reasons = {path.name: why for path, why in clips.dropped.items()}
    assert reasons["mute.mp4"] == "no caption" and "0.25 s long" in reasons["short.mp4"] and "broken.mp4" in reasons["broken.mp4"]
    first = batches(cfg, stages)[0]
    assert first.captions == [["a bar moves right"]] * 2 and first.frames.shape == (2, 8, 3, 32, 32)


def test_a_csv_of_captions_and_an_empty_folder(tmp_path):
    stages = [StageConfig(steps=1, frames=4, height=32, width=32, batch_size=1, fps=[4.0])]
    with pytest.raises(ValueError, match=r"data\.path.*no usable video"):
        FolderClips(DataConfig(source="folder", path=str(tmp_path)), 0, stages)
    moving_bar(tmp_path / "a.mp4", 2, 8)
    (tmp_path / "captions.csv").write_text("name,text\na.mp4,x\n")
    with pytest.raises(ValueError, match=r"captions\.csv: needs the columns file and caption"):
        FolderClips(DataConfig(source="folder", path=str(tmp_path)), 0, stages)
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,\"a bar, moving\"\nmissing.mp4,gone\n")
    clips = FolderClips(DataConfig(source="folder", path=str(tmp_path)), 0, stages)
    assert [clip.caption for clip in clips.clips] == ["a bar, moving"]
    assert [path.name for path in clips.dropped] == ["missing.mp4"]


def numbered(folder, count, size=(40, 32), start=0):
    """A folder of images whose brightness tells their number."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((size[1], size[0], 3), start + i, np.uint8)).save(folder / f"frame_{i}.png")


def levels(frames):
    return (frames.mean((1, 2, 3))).round().astype(int).tolist()


def test_frame_folders_and_their_clip_rules(tmp_path):
    numbered(tmp_path / "sky" / "long", 60)
    numbered(tmp_path / "sky" / "short", 11)
    stage = StageConfig(frames=4, height=16, width=16)
    cfg = DataConfig(source="folder", path=str(tmp_path), layout="frames", clip_rule="stride", frame_interval=3)
    clips = FolderClips(cfg, 0, [stage])
    assert [source.path.name for source in clips.clips] == ["long"]
    assert list(clips.dropped.values()) == ["11 frames long, the stages need 12"]
    starts = set()
    for position in range(20):
        frames, text = clips.clip(position, stage, 8.0)
        got = levels(frames)
        assert np.diff(got).tolist() == [3, 3, 3] and text == ""  # frame_10 comes after frame_9
        starts.add(got[0])
    assert len(starts) > 8 and max(starts) <= 47
    cfg = DataConfig(source="folder", path=str(tmp_path), layout="frames", clip_rule="linspace", frame_interval=3)
    for position in range(20):
        got = levels(FolderClips(cfg, 0, [stage]).clip(position, stage, 8.0)[0])
        first = got[0]
        assert got == [first + i for i in (0, 3, 7, 11)] or got == [0, 3, 6, 10]  # of the window's 12, or of all 11


def test_class_folders_give_names_and_images_of_other_clips(tmp_path):
    for name in ("Archery", "Biking"):
        (tmp_path / name).mkdir()
        moving_bar(tmp_path / name / "v_1.avi.mp4", 2, 24)
    moving_bar(tmp_path / "stray.mp4", 2, 24)
    cfg = DataConfig(source="folder", path=str(tmp_path), layout="classes", clip_rule="linspace", caption_dropout=0.0)
    stages = [StageConfig(steps=2, frames=4, height=32, width=32, batch_size=2, image_frames=3)]
    clips = FolderClips(cfg, 0, stages)
    assert clips.classes == ["Archery", "Biking"] and [p.name for p in clips.dropped] == ["stray.mp4"]
    first, second = batches(cfg, stages)
    assert first.frames.shape == (2, 7, 3, 32, 32)
    assert all(len(row) == 4 and set(row) <= {"Archery", "Biking"} for row in first.captions + second.captions)
    assert {row[0] for row in first.captions} == {"Archery", "Biking"}
    again = batches(cfg, stages, start_step=1)[0]
    assert torch.equal(again.frames, second.frames) and again.captions == second.captions


def test_half_of_the_clips_are_mirrored(tmp_path):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :4] = 255
    (tmp_path / "a").mkdir()
    for i in range(4):
        Image.fromarray(image).save(tmp_path / "a" / f"{i}.png")
    stage = StageConfig(frames=2, height=16, width=16)
    for flip, share in ((False, 0.0), (True, 0.5)):
        cfg = DataConfig(source="folder", path=str(tmp_path), layout="frames", clip_rule="linspace", frame_interval=2, flip=flip)
        clips = FolderClips(cfg, 0, [stage])
        right = [clips.clip(position, stage, 8.0)[0][0, 0, -1, 0] == 255 for position in range(100)]
        assert np.mean(right) == pytest.approx(share, abs=0.15)


def test_images_of_the_world_join_its_clips():
    stages = [StageConfig(steps=1, frames=4, height=16, width=16, batch_size=2, image_frames=2)]
    batch = batches(WORLD, stages)[0]
    assert batch.frames.shape == (2, 6, 3, 16, 16) and [len(row) for row in batch.captions] == [3, 3]
    assert not torch.equal(batch.frames[:, 4], batch.frames[:, 5])


def test_wordings_limit_the_captions_but_not_the_positions():
    stages = [StageConfig(steps=40, frames=1, height=16, width=16, batch_size=50)]
    world = WorldConfig(min_objects=1, max_objects=1, motions=["still"], visibility=False, growth=False, cameras=["static"])
    got = batches(DataConfig(wordings=2, caption_dropout=0.0, world=world), stages)
    captions = {caption for batch in got for [caption] in batch.captions}
    assert len(captions) <= 2 * 6 * 8 * 3
    frames = torch.cat([batch.frames for batch in got])
    assert len(torch.unique(frames.flatten(1), dim=0)) > 1900
