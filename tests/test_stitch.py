"""Spans and files of one video go together again where they are one film, and clips of even, true frames are picked."""

import json
from itertools import pairwise

import cv2
import numpy as np
import pytest

from data_tools import degrade, film, join, manifest, measure, stitch
from data_tools.film import Clip
from data_tools.manifest import Job

WHOLE = stitch.GatherSettings()


def row(key: str, path: str, from_s: float, to_s: float, start_s: float = 0.0, **more) -> manifest.Row:
    return dict.fromkeys(manifest.SCHEMA.names) | {
        "id": key, "source": "set", "video": "v", "path": path, "from_s": from_s, "to_s": to_s, "start_s": start_s,
        "end_s": start_s + to_s - from_s, "caption": f"A scene {key}.", "edits": [], "scores": {}, "tags": {}, "transitions": [],
        "fps": 25.0} | more


def live(rows: list[manifest.Row]) -> list[manifest.Row]:
    return sorted((made for made in rows if not made["dropped"]), key=lambda made: made["from_s"])


@pytest.fixture(scope="module")
def scene() -> Clip:
    cv2.setNumThreads(1)
    return degrade.synth(41, 220, 96, 160, rate=25)


@pytest.fixture(scope="module")
def other() -> Clip:
    return degrade.synth(42, 60, 96, 160, rate=25)


def piece(folder, name: str, clip: Clip, crf: int = 20) -> str:
    degrade.encode(clip.timed(25), str(folder / name), crf, form="mp4")
    return name


# Gathering

def listed(spans: list[tuple[float, float]], path: str = "v.mp4") -> list[manifest.Row]:
    return [row(f"{path}{i}", path, a, b, start_s=a) for i, (a, b) in enumerate(spans)]


def test_spans_that_touch_become_one_row(tmp_path):
    rows = listed([(0, 4), (4.02, 8), (7, 12), (12.4, 15)]) + listed([(4, 9)], "other.mp4")
    rows[1] |= {"scores": {"a": 2.0, "b": 1.0}, "tags": {"language": "en", "start": "0:04"}}
    rows[0] |= {"scores": {"a": 1.0}, "tags": {"language": "en", "start": "0:00"}}
    rows[2] |= {"scores": {"a": 3.0}, "tags": {"language": "en", "start": "0:07"}}
    out = stitch.gather(rows, Job(tmp_path, WHOLE))
    assert len(out) == len(rows) + 1
    stretch = next(made for made in out if made["parts"])
    assert (stretch["start_s"], stretch["end_s"], stretch["from_s"], stretch["to_s"]) == (0, 12, 0, 12)
    assert [part["id"] for part in stretch["parts"]] == ["v.mp40", "v.mp41", "v.mp42"]
    assert stretch["caption"] == "A scene v.mp40. Then a scene v.mp41. Then a scene v.mp42."
    assert stretch["captions"]["events"] == "0.0-4.0 s: A scene v.mp40; 4.0-8.0 s: A scene v.mp41; 7.0-12.0 s: A scene v.mp42"
    assert (stretch["scores"], stretch["tags"]) == ({"a": 1.0}, {"language": "en"})
    joined = {made["id"]: made["dropped"] for made in out if made["dropped"]}
    assert set(joined) == {"v.mp40", "v.mp41", "v.mp42"}
    assert set(joined.values()) == {f"joined: in a longer clip ({stretch['id'][:16]})"}
    assert out == stitch.gather(rows[::-1], Job(tmp_path, WHOLE))  # whatever their order
    assert len(live(stitch.gather(rows, Job(tmp_path, stitch.GatherSettings(gap_s=0.5))))) == 2
    manifest.write(tmp_path / "m.parquet", out)


def test_a_stretch_has_an_end_and_rows_without_times_stay(tmp_path):
    rows = listed([(i, i + 1) for i in range(10)])
    assert len(live(stitch.gather(rows, Job(tmp_path, stitch.GatherSettings(longest_s=4))))) == 3
    for changed in ({"from_s": None}, {"start_s": None}, {"edits": [{"step": "deinterlace"}]}, {"licence": "mine"}):
        kept = stitch.gather([rows[0] | changed, rows[1]], Job(tmp_path, WHOLE))
        assert len(kept) == 2 and not any(made["dropped"] for made in kept)
    assert stitch.group(rows[0]) == stitch.group(rows[1]) != stitch.group(rows[0] | {"video": None})


def test_captions_are_merged_in_order_without_repeats():
    parts = [{"id": str(i), "from_s": a, "to_s": b, "caption": words} for i, (a, b, words) in enumerate(
        [(0, 4, "A dog runs."), (4, 8, "a dog runs"), (8, 9, "The cat, of no use"), (9, 14, "Is it a bird?"), (13.9, 20, "No.")])]
    told = stitch._told(parts, 2.0, 14.5)
    assert told["caption"] == "A dog runs. Then the cat, of no use. Then Is it a bird?"
    assert told["captions"]["events"] == "0.0-6.0 s: A dog runs; 6.0-7.0 s: The cat, of no use; 7.0-12.0 s: Is it a bird?"
    assert stitch._told(parts[:1], 0.0, 2.0)["caption"] == "A dog runs."
    assert stitch._told([parts[0] | {"caption": None}], 0.0, 2.0) == {"caption": None, "captions": {"events": None}}


# Frames

@pytest.mark.parametrize("rate", [23.976, 24, 25, 29.97, 30, 50, 60])
def test_frames_are_the_nearest_true_ones(rate):
    at = 3.0 + np.round(np.arange(int(rate * 22)) / rate * 1000) / 1000
    found = stitch.picks(at, (128, 64, 32, 16), 8.0, 0.5 / rate + stitch.EVEN_S)
    assert [len(picked) for picked, _ in found] == [128, 32, 16]
    for picked, off in found:
        wanted = picked[0] + np.arange(len(picked)) / 8
        assert np.isin(picked, at).all() and (np.diff(picked) > 0).all()
        assert off == np.abs(picked - wanted).max() == max(np.abs(at - time).min() for time in wanted) <= 0.5 / rate + 0.001
    for (before, _), (after, _) in pairwise(found):
        assert after[0] >= before[0] + len(before) / 8 - 0.5 / rate - 0.002


def test_no_clip_spans_a_hole():
    at = np.delete(np.arange(500) / 24, np.arange(200, 204))
    found = stitch.picks(at, (64, 16), 8.0, 0.5 / 24 + 0.001)
    assert [len(picked) for picked, _ in found] == [64, 64, 16, 16]
    assert not any(picked[0] < 199.5 / 24 < picked[-1] for picked, _ in found)
    assert stitch.picks(at[::6], (16,), 8.0, 0.5 / 24) == []  # four pictures a second give no eight


def test_shots_end_at_transitions_and_jumps():
    at = np.arange(100) / 25
    changes = [{"from_s": at[29], "to_s": at[30]}, {"from_s": at[49], "to_s": at[60]}]
    assert [(shot[0], shot[-1]) for shot in stitch._shots(changes, at, [80])] == [(0, 29), (30, 49), (60, 79), (80, 99)]
    point = [{"from_s": at[30], "to_s": at[30]}]
    assert [(shot[0], shot[-1]) for shot in stitch._shots(point, at, [])] == [(0, 29), (30, 99)]


# Files

def test_files_that_touch_or_overlap_are_one_film(tmp_path, scene):
    cuts = [(0, 80), (80, 150), (130, 220)]
    rows = [row(str(i), piece(tmp_path, f"{i}.mp4", scene.take(slice(a, b)), 18 + 4 * i), a / 25, b / 25)
            for i, (a, b) in enumerate(cuts)]
    rows[1]["transitions"] = [{"kind": "cut", "from_s": 1.2, "to_s": 1.24, "confidence": 1.0}]  # 110 | 111 of the scene
    job = Job(tmp_path, stitch.Settings(detector="rules"))
    out = stitch.work(rows, job)
    whole = next(made for made in out if (made["dropped"] or "").startswith("cut: into"))
    assert {made["id"]: made["dropped"] for made in out if made["dropped"]} == {
        **{str(i): f"joined: in a longer clip ({whole['id'][:16]})" for i in range(3)}, whole["id"]: "cut: into 2 clips"}
    back = film.to_clip(film.read(tmp_path / whole["path"]))
    assert len(back.y) == 220 and np.abs(back.at_s - scene.at_s).max() < 1e-4
    assert measure.psnr(back.y, scene.y) > 34
    clips = live(out)
    assert [len(made["picked"]) for made in clips] == [32, 32]
    assert clips[0]["to_s"] <= 4.42 and clips[1]["from_s"] >= 4.43  # on both sides of the cut
    assert all(0 < made["scores"]["jitter_s"] <= 0.0211 for made in clips)
    assert clips[0]["caption"] == "A scene 0." and [part["id"] for part in clips[1]["parts"]] == ["1", "2"]
    assert clips[0]["sha256"] == manifest.sha256_of(tmp_path / clips[0]["path"])
    pieces = json.loads(clips[0]["edits"][0]["settings"])["pieces"]
    assert [made["id"] for made in pieces] == ["0", "1", "2"] and pieces[2]["shift_s"] == pytest.approx(130 / 25)
    bytes_before = (tmp_path / whole["path"]).read_bytes()
    (tmp_path / whole["path"]).unlink()
    assert stitch.work(rows[::-1], job) == out and (tmp_path / whole["path"]).read_bytes() == bytes_before
    manifest.write(tmp_path / "m.parquet", out)


@pytest.mark.parametrize("wrong", ["cut", "jump", "exposure", "held", "listed apart", "turned off"])
def test_what_is_not_one_film_is_not_joined(tmp_path, scene, other, wrong):
    second = scene.take(slice(50, 110))
    times = (2.0, 4.4)
    if wrong == "cut":
        second = other
    elif wrong == "jump":
        second = scene.take(slice(52, 112))
    elif wrong == "exposure":
        second = second._replace(y=np.rint(16 + (second.y - 16.0) * 0.93).astype(np.uint8))
    elif wrong == "held":
        second = second.take([0, 0, 0, *range(58)])
    elif wrong == "listed apart":
        times = (3.0, 5.4)
    rows = [row("0", piece(tmp_path, "0.mp4", scene.take(slice(0, 50))), 0.0, 2.0),
            row("1", piece(tmp_path, "1.mp4", second), *times)]
    out = stitch.work(rows, Job(tmp_path, stitch.Settings(join=wrong != "turned off", detector="rules")))
    assert len(out) == 4 and not (tmp_path / "clips").exists()
    assert {made["path"] for made in live(out)} == {"0.mp4", "1.mp4"}
    assert [part["id"] for made in live(out) for part in made["parts"]] == ["0", "1"]


def test_overlapping_pictures_are_found_at_other_times_than_listed(scene):
    before, after = (join.edge(film.from_clip(degrade.coded(part, crf))) for part, crf in (
        (scene.take(slice(0, 60)), 20), (scene.take(slice(45, 100)).timed(25), 26)))
    for late in (-0.2, 0.0, 0.2):
        found = join.judge(before, after, 0.6 + late)
        assert not found.reason and found.shift_s == pytest.approx(45 / 25) and 0.5 < found.confidence <= 1
        assert found.end_s < found.start_s + found.shift_s < found.end_s + 0.04
    assert join.judge(before, after, 2.0).reason == "no picture is in both"
    assert join.judge(before, after._replace(y=after.y[:, ::2]), 0.6).reason == "pictures of another size"
    assert join.judge(before, join.Edge(*(part[:2] for part in after)), 0.6).reason == "too few pictures"


def test_reasons_are_true(tmp_path, scene):
    (tmp_path / "text.mp4").write_text("no video")
    rows = [row("short", piece(tmp_path, "short.mp4", scene.take(slice(0, 30))), 0.0, 1.2, video="a"),
            row("text", "text.mp4", 0.0, 5.0, video="b"), row("gone", "gone.mp4", 5.0, 9.0, video="b"),
            row("unseen", "short.mp4", 0.0, 1.2, video="c", transitions=None),
            row("whole", piece(tmp_path, "whole.mp4", scene.take(slice(0, 60))), 0.0, 2.4)
            | {"video": None, "from_s": None, "to_s": None}]
    out = {made["id"]: made for made in stitch.work(rows, Job(tmp_path, stitch.Settings(detector="rules")))}
    assert out["short"]["dropped"] == "too short (1.2 s)"
    assert out["text"]["dropped"].startswith("cannot be read (cannot be opened as a video")
    assert out["gone"]["dropped"] == "cannot be read (no such video file)"
    assert out["unseen"]["dropped"] == "transitions were not looked for"
    made = live(out.values())[0]
    assert (made["from_s"], made["to_s"], len(made["picked"])) == (0.0, 2.0, 16)
    assert len(out) == 6


def test_bad_settings_name_their_key():
    for settings, key in (({"fps": 0}, "fps"), ({"frames": (16, 32)}, "frames"), ({"jitter": 0}, "jitter"), ({"crf": 90}, "crf")):
        with pytest.raises(ValueError, match=f"^{key}: "):
            stitch.Settings(**settings)
    for settings, key in (({"gap_s": -1}, "gap_s"), ({"longest_s": 0}, "longest_s")):
        with pytest.raises(ValueError, match=f"^{key}: "):
            stitch.GatherSettings(**settings)


def test_the_commands(tmp_path, scene, capsys):
    piece(tmp_path, "v.mp4", scene.take(slice(0, 120)))
    manifest.write(tmp_path / "in.parquet", listed([(0, 2.4), (2.4, 4.8)]), {"stages": []})
    assert stitch.main([str(tmp_path / "in.parquet"), str(tmp_path / "g.parquet"), "--gather"]) == 0
    rows = [made | {"transitions": []} for made in manifest.read(tmp_path / "g.parquet")]
    manifest.write(tmp_path / "g.parquet", rows)
    assert stitch.main([str(tmp_path / "g.parquet"), str(tmp_path / "out.parquet"), "--frames", "32"]) == 0
    rows = manifest.read(tmp_path / "out.parquet")
    assert [len(made["picked"]) for made in live(rows)] == [32] and len(rows) == 4
    assert "1 clips in, 1 out" in capsys.readouterr().out
    assert stitch.main([str(tmp_path / "in.parquet"), str(tmp_path / "x" / "out.parquet")]) == 1
    assert "error: --out: name a manifest in" in capsys.readouterr().err


def test_a_dissolve_that_two_files_share_is_in_no_clip(tmp_path, scene, other):
    both, (mixed,) = degrade.edited([scene.take(slice(0, 70)), other], ["dissolve"], 3)
    middle = (mixed.first + mixed.last) // 2
    rows = [row("0", piece(tmp_path, "0.mp4", both.take(slice(0, middle))), 0.0, middle / 25),
            row("1", piece(tmp_path, "1.mp4", both.take(slice(middle, None))), middle / 25, len(both.y) / 25)]
    clips = live(stitch.work(rows, Job(tmp_path, stitch.Settings(frames=(16, 8, 4)))))
    assert clips and not any(made["from_s"] < (mixed.last - 1) / 25 and made["to_s"] > (mixed.first + 2) / 25 for made in clips)
