"""Batches are functions of (seed, stages, step): no process count, worker or start changes what an update sees."""

import numpy as np
import pytest
import torch

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
