"""Batches are functions of (seed, stages, step): no process count, worker or start changes what an update sees."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from latte import video
from latte.clips import FileClips, WorldClips, left_out
from latte.config import BucketConfig, DataConfig, StageConfig, WorldConfig
from latte.data import Schedule, make_loader, open_clips, table

STAGES = [StageConfig(steps=3, frames=1, height=16, width=16, batch_size=4),
          StageConfig(steps=2, frames=4, height=16, width=24, batch_size=2, fps=[2.0, 8.0])]
WORLD = DataConfig(clips=5, caption_dropout=0.5, world=WorldConfig(min_objects=1, max_objects=1, motions=["linear"]))


def batches(cfg=WORLD, stages=STAGES, **where):
    return list(make_loader(open_clips(cfg, 0, stages), cfg, stages, 0, **where))


def test_positions_run_on_over_stages_and_shapes_follow_them():
    got = batches()
    assert [b.step for b in got] == [0, 1, 2, 3, 4]
    assert [p for b in got for p in b.positions] == list(range(16))
    assert [tuple(b.x.shape) for b in got] == [(4, 1, 3, 16, 16)] * 3 + [(2, 4, 3, 16, 24)] * 2
    assert set(torch.cat([b.fps for b in got[3:]]).tolist()) <= {2.0, 8.0}
    assert max(b.x.abs().max() for b in got) <= 1


def test_starting_later_gives_the_same_batches():
    whole = batches()
    for start in (1, 3, 4):
        for a, b in zip(whole[start:], batches(start_step=start), strict=True):
            assert (a.positions, a.captions) == (b.positions, b.captions)
            assert torch.equal(a.x, b.x) and torch.equal(a.fps, b.fps)


def test_ranks_slice_the_same_global_batch():
    whole = batches()
    parts = [batches(rank=rank, ranks=2) for rank in range(2)]
    for i, batch in enumerate(whole):
        assert batch.captions == parts[0][i].captions + parts[1][i].captions
        assert torch.equal(batch.x, torch.cat([parts[0][i].x, parts[1][i].x]))
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
    frames = [clips.clip(STAGES[0], index, 0).x.numpy().tobytes() for index in range(20)]
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
    clips = FileClips(cfg, 0, stages)
    assert clips.pool(stages[0]).size == 1 and clips.clip(stages[0], 0, 0).caption == "a bar moves right"
    reasons = clips.dropped
    assert reasons["mute.mp4"] == "no caption" and "broken.mp4" in reasons["broken.mp4"]
    assert reasons["short.mp4"] == "shorter than the 1.75 s it needs"
    first = batches(cfg, stages)[0]
    assert first.captions == [["a bar moves right"]] * 2 and first.x.shape == (2, 8, 3, 32, 32)


def test_a_csv_of_captions_and_an_empty_folder(tmp_path):
    stages = [StageConfig(steps=1, frames=4, height=32, width=32, batch_size=1, fps=[4.0])]
    with pytest.raises(ValueError, match=r"data\.path.*no usable clip"):
        FileClips(DataConfig(source="folder", path=str(tmp_path)), 0, stages)
    moving_bar(tmp_path / "a.mp4", 2, 8)
    (tmp_path / "captions.csv").write_text("name,text\na.mp4,x\n")
    with pytest.raises(ValueError, match=r"captions\.csv: needs the columns file and caption"):
        FileClips(DataConfig(source="folder", path=str(tmp_path)), 0, stages)
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,\"a bar, moving\"\nmissing.mp4,gone\n")
    clips = FileClips(DataConfig(source="folder", path=str(tmp_path)), 0, stages)
    assert clips.pool(stages[0]).size == 1 and clips.clip(stages[0], 0, 0).caption == "a bar, moving"
    assert list(clips.dropped) == ["missing.mp4"]


def numbered(folder, count, size=(40, 32), start=0):
    """A folder of images whose brightness tells their number."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((size[1], size[0], 3), start + i, np.uint8)).save(folder / f"frame_{i}.png")


def levels(clip):
    """Brightness of each frame, 0 to 255."""
    return ((clip.x.mean((1, 2, 3)) + 1) * 127.5).round().int().tolist()


def test_frame_folders_and_their_clip_rules(tmp_path):
    numbered(tmp_path / "sky" / "long", 60)
    numbered(tmp_path / "sky" / "short", 11)
    stage = StageConfig(frames=4, height=16, width=16)
    cfg = DataConfig(source="folder", path=str(tmp_path), layout="frames", clip_rule="stride", frame_interval=3)
    clips = FileClips(cfg, 0, [stage])
    assert clips.pool(stage).size == 1 and clips.dropped == {"sky/short": "fewer than 12 frames"}
    starts = set()
    for variant in range(20):
        clip = clips.clip(stage, 0, variant)
        got = levels(clip)
        assert np.diff(got).tolist() == [3, 3, 3] and clip.caption == ""  # frame_10 comes after frame_9
        starts.add(got[0])
    assert len(starts) > 8 and max(starts) <= 47
    cfg = DataConfig(source="folder", path=str(tmp_path), layout="frames", clip_rule="linspace", frame_interval=3)
    for variant in range(20):
        got = levels(FileClips(cfg, 0, [stage]).clip(stage, variant % 2, variant))
        first = got[0]
        assert got == [first + i for i in (0, 3, 7, 11)] or got == [0, 3, 6, 10]  # of the window's 12, or of all 11


def test_class_folders_give_names_and_images_of_other_clips(tmp_path):
    for name in ("Archery", "Biking"):
        (tmp_path / name).mkdir()
        moving_bar(tmp_path / name / "v_1.avi.mp4", 2, 24)
    moving_bar(tmp_path / "stray.mp4", 2, 24)
    cfg = DataConfig(source="folder", path=str(tmp_path), layout="classes", clip_rule="linspace", caption_dropout=0.0)
    stages = [StageConfig(steps=2, frames=4, height=32, width=32, batch_size=2, image_frames=3)]
    clips = FileClips(cfg, 0, stages)
    assert clips.classes == ["Archery", "Biking"] and list(clips.dropped) == ["stray.mp4"]
    first, second = batches(cfg, stages)
    assert first.x.shape == (2, 7, 3, 32, 32)
    assert all(len(row) == 4 and set(row) <= {"Archery", "Biking"} for row in first.captions + second.captions)
    assert {row[0] for row in first.captions} == {"Archery", "Biking"}
    again = batches(cfg, stages, start_step=1)[0]
    assert torch.equal(again.x, second.x) and again.captions == second.captions


def test_half_of_the_clips_are_mirrored(tmp_path):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :4] = 255
    (tmp_path / "a").mkdir()
    for i in range(4):
        Image.fromarray(image).save(tmp_path / "a" / f"{i}.png")
    stage = StageConfig(frames=2, height=16, width=16)
    for flip, share in ((False, 0.0), (True, 0.5)):
        cfg = DataConfig(source="folder", path=str(tmp_path), layout="frames", clip_rule="linspace", frame_interval=2, flip=flip)
        clips = FileClips(cfg, 0, [stage])
        right = [clips.clip(stage, 0, variant).x[0, 0, 0, -1] == 1 for variant in range(100)]
        assert np.mean(right) == pytest.approx(share, abs=0.15)


def test_images_of_the_world_join_its_clips():
    stages = [StageConfig(steps=1, frames=4, height=16, width=16, batch_size=2, image_frames=2)]
    batch = batches(WORLD, stages)[0]
    assert batch.x.shape == (2, 6, 3, 16, 16) and [len(row) for row in batch.captions] == [3, 3]
    assert not torch.equal(batch.x[:, 4], batch.x[:, 5])


def test_wordings_limit_the_captions_but_not_the_positions():
    stages = [StageConfig(steps=40, frames=1, height=16, width=16, batch_size=50)]
    world = WorldConfig(min_objects=1, max_objects=1, motions=["still"], visibility=False, growth=False, cameras=["static"])
    got = batches(DataConfig(wordings=2, caption_dropout=0.0, world=world), stages)
    captions = {caption for batch in got for [caption] in batch.captions}
    assert len(captions) <= 2 * 6 * 8 * 3
    frames = torch.cat([batch.x for batch in got])
    assert len(torch.unique(frames.flatten(1), dim=0)) > 1900


def test_buckets_have_their_shares_and_the_schedule_counts_every_clip_once():
    buckets = [BucketConfig(frames=1, height=16, width=16, batch_size=6, share=0.5),
               BucketConfig(frames=4, height=16, width=16, batch_size=2, share=0.3),
               BucketConfig(frames=4, height=16, width=24, batch_size=2, share=0.2)]
    stages = [StageConfig(steps=40, frames=4, height=16, width=16, batch_size=2), StageConfig(steps=1000, buckets=buckets)]
    schedule = Schedule(stages, 3)
    turns = [schedule.turn(step) for step in range(len(schedule))]
    for upto in (140, 440, 1040):  # near the asked shares at any time, not only at the end
        got = np.bincount([turn.bucket for turn in turns[40:upto]], minlength=3) / (upto - 40)
        assert got == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    position, draws = 0, {}
    for turn in turns:
        shape = stages[turn.stage].shapes[turn.bucket]
        key = (shape.frames, shape.width)
        assert (turn.position, turn.draw, turn.count) == (position, draws.get(key, 0), shape.batch_size)
        position, draws[key] = position + turn.count, draws.get(key, 0) + turn.count
    assert [Schedule(stages, 4).turn(step).bucket for step in range(40, 90)] != [turn.bucket for turn in turns[40:90]]


def sized(path, seconds, width, height, level):
    video.write(path, np.full((round(seconds * 8), height, width, 3), level, np.uint8), 8)
    path.with_suffix(".txt").write_text(f"level {level}")


def test_clips_go_to_the_bucket_that_crops_them_least_and_an_empty_one_is_an_error(tmp_path):
    sized(tmp_path / "wide.mp4", 4, 64, 32, 50)
    sized(tmp_path / "tall.mp4", 4, 32, 64, 100)
    sized(tmp_path / "brief.mp4", 1, 64, 32, 150)
    sized(tmp_path / "strip.mp4", 4, 256, 16, 200)
    buckets = [BucketConfig(frames=16, height=16, width=32, batch_size=2),
               BucketConfig(frames=16, height=32, width=16, batch_size=2),
               BucketConfig(frames=1, height=16, width=16, batch_size=4)]
    stages = [StageConfig(steps=12, buckets=buckets)]
    cfg = DataConfig(source="folder", path=str(tmp_path), caption_dropout=0.0, max_crop=0.8)
    clips = open_clips(cfg, 0, stages)
    assert [clips.pool(bucket).size for bucket in buckets] == [1, 1, 3]
    assert clips.dropped == {"strip.mp4": "would lose more than 80% of its picture"}
    text = table(clips, stages)
    assert "16 x 16 x 32 at 8 fps" in text and "1 shorter than the 1.875 s it needs" in text
    assert "1 fits another shape better" in text
    for batch in batches(cfg, stages):
        shape = stages[0].shapes[batch.bucket]
        assert batch.x.shape == (shape.batch_size, shape.frames, 3, shape.height, shape.width)
        expected = {0: {"level 50"}, 1: {"level 100"}, 2: {"level 50", "level 100", "level 150"}}[batch.bucket]
        assert {caption for [caption] in batch.captions} <= expected
    long = [StageConfig(steps=1, buckets=[*buckets, BucketConfig(frames=128, height=16, width=16)])]
    with pytest.raises(ValueError, match=r"stages\.0\.buckets\.3: no clip fits.*shorter than the 15\.875 s"):
        table(open_clips(cfg, 0, long), long)


def test_a_clip_has_so_many_variants_and_an_epoch_takes_the_next(tmp_path):
    moving_bar(tmp_path / "a.mp4", 8, 8)
    (tmp_path / "a.txt").write_text("a bar")
    stages = [StageConfig(steps=9, frames=2, height=32, width=64, batch_size=1, fps=[4.0])]
    cfg = DataConfig(source="folder", path=str(tmp_path), caption_dropout=0.0, variants=3, flip=True)
    got = [batch.x for batch in batches(cfg, stages)]
    assert len({x.numpy().tobytes() for x in got}) == 3
    assert all(torch.equal(got[i], got[i + 3]) for i in range(6))
    endless = DataConfig(source="folder", path=str(tmp_path), caption_dropout=0.0, crop="random")
    assert len({batch.x.numpy().tobytes() for batch in batches(endless, stages)}) > 5


def test_a_clip_that_cannot_be_read_gives_way_to_the_next_and_says_so(tmp_path):
    for i in range(4):
        sized(tmp_path / f"{i}.mp4", 2, 32, 32, 40 * i)
    stages = [StageConfig(steps=4, frames=4, height=16, width=16, batch_size=2)]
    cfg = DataConfig(source="folder", path=str(tmp_path), caption_dropout=0.0)
    clips = open_clips(cfg, 0, stages)
    (tmp_path / "2.mp4").write_bytes((tmp_path / "2.mp4").read_bytes()[:600])
    got = list(make_loader(clips, cfg, stages, 0))
    notes = [note for batch in got for note in batch.notes]
    assert len(notes) == 2 and all("2.mp4" in note and "took the clip after it" in note for note in notes)
    assert sum(caption == "level 120" for batch in got for [caption] in batch.captions) == 4
    for i in range(4):
        (tmp_path / f"{i}.mp4").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"data\.path: 4 clips in a row cannot be read"):
        list(make_loader(clips, cfg, stages, 0))


@pytest.mark.parametrize(("workers", "recycle", "prefetch"), [(0, 3, 2), (2, 3, 1), (1, 2, 3), (3, 0, 1)])
def test_workers_recycling_and_prefetching_change_nothing(workers, recycle, prefetch):
    stages = [StageConfig(steps=7, frames=1, height=16, width=16, batch_size=2)]
    whole = batches(WORLD, stages)
    got = batches(dataclasses.replace(WORLD, workers=workers, recycle_batches=recycle, prefetch=prefetch), stages, start_step=1)
    assert [b.positions for b in got] == [b.positions for b in whole[1:]]
    assert all(torch.equal(a.x, b.x) and a.captions == b.captions for a, b in zip(got, whole[1:], strict=True))


def test_many_clips_that_are_left_out_are_counted():
    few = {f"{n}": "no caption" for n in range(20)}
    assert left_out(few)[0] == "left out 0: no caption" and len(left_out(few)) == 20
    many = few | {"a": "joined: in a longer clip (0f)", "b": "motion too low (0.1)", "c": "motion too low (0.2)"}
    assert left_out(many) == ["left out 20: no caption", "left out 2: motion too low", "left out 1: joined"]
