"""Repeats and missing pictures: against known truth."""

import cv2
import numpy as np
import pytest

from data_tools import degrade, film, measure
from data_tools.film import Clip
from data_tools.repair import blend, timing


@pytest.fixture(scope="module")
def scenes() -> list[Clip]:
    return [degrade.synth(seed, 60, 180, 320) for seed in (31, 32)]


def found_in(clip: Clip) -> timing.Found:
    return timing.analyse(film.from_clip(clip))


def panned(seed: int, speeds: np.ndarray) -> Clip:
    """A scene that moves to the left by so many pixels a picture."""
    scene, places = degrade.synth(seed, 1, 180, 400), np.cumsum(speeds)
    planes = [[cv2.warpAffine(plane[0], np.float32([[1, 0, -x / part], [0, 1, 0]]), (160 // part, 120 // part)) for x in places]
              for plane, part in zip(scene[:3], (1, 2, 2), strict=True)]
    return Clip(*map(np.stack, planes), np.arange(len(speeds)) / 25)


@pytest.mark.parametrize("crf", [0, 23, 32])
def test_repeats_are_found(scenes, crf):
    for seed, scene in enumerate(scenes):
        bad, shown = degrade.mistimed(scene, seed, drops=0.0)
        bad = degrade.coded(bad, crf) if crf else bad
        found = found_in(bad)
        true = np.append(False, np.diff(shown) == 0)
        assert true.sum() >= 3 and measure.f1(found.duplicate, true) >= 0.95
        assert len(found.score) == len(found.at_s) == len(bad.y)


def test_repeats_in_runs(scenes):
    bad, shown = degrade.mistimed(scenes[0], 5, drops=0.0, run=3)
    true = np.append(False, np.diff(shown) == 0)
    assert true.sum() >= 3 and measure.f1(found_in(bad).duplicate, true) >= 0.95


@pytest.mark.parametrize("crf", [0, 23])
def test_jumps_are_found(scenes, crf):
    hits = wrong = 0
    for scene in scenes:
        shown = np.delete(np.arange(60), [12, 25, 26, 41])
        bad = scene.take(shown).timed(25)
        bad = degrade.coded(bad, crf) if crf else bad
        true = set(np.flatnonzero(np.diff(shown) > 1) + 1)
        got = {jump.number for jump in found_in(bad).jumps}
        hits, wrong = hits + len(true & got), wrong + len(true ^ got)
    assert 2 * hits / (2 * hits + wrong) >= 0.9


def test_a_slow_pan_is_no_repeat_and_its_repeats_are():
    wide = degrade.synth(33, 1, 200, 340)
    moved = [degrade.rescaled(wide, 1, offset=0.15 * i) for i in range(50)]
    slow = Clip(*(np.concatenate([clip[k] for clip in moved]) for k in range(3)), np.arange(50) / 25)
    shown = np.sort(np.append(np.arange(50), [11, 24, 40]))
    found = found_in(slow.take(shown).timed(25))
    assert measure.f1(found.duplicate, np.append(False, np.diff(shown) == 0)) == 1
    assert not found.jumps


def test_repeats_that_a_codec_made_small_steps():
    """In a steady pan; the step to the next picture is less by as much."""
    speeds, small = np.full(60, 2.0), [14, 27, 41, 50]
    speeds[small], speeds[np.add(small, 1)] = 0.6, 1.4
    found = found_in(panned(35, speeds))
    assert list(np.flatnonzero(found.duplicate)) == small and not found.jumps


@pytest.mark.parametrize("uneven", ["sways", "trembles", "random"])
def test_an_uneven_pace_is_no_damage(uneven):
    steps = np.arange(54)
    speeds = {"sways": 3 + 2 * np.sin(0.9 * steps), "trembles": 2 + 1.2 * np.sin(2.1 * steps),
              "random": 3 + np.random.default_rng(1).uniform(-2, 2, 54)}[uneven]
    found = found_in(panned(34, speeds))
    assert not found.duplicate.any() and not found.jumps


def test_a_pan_that_slows_down_is_no_mixture():
    """Its quick changes vanish for good, those of mixed pictures come back."""
    slowing = 0.3 + 6 / (1 + np.exp((np.arange(54) - 18) / 1.5))
    for seed in (33, 35):
        clip = panned(seed, slowing)
        assert blend.analyse(film.from_clip(clip)) is None
        assert blend.analyse(film.from_clip(degrade.coded(clip, 23))) is None
    mixed, _ = degrade.blended(panned(33, np.full(90, 2.5)).timed(24), 25)
    assert blend.analyse(film.from_clip(mixed)).name == "24/25"


def test_clean_still_and_cut_clips_are_left_alone(scenes):
    still = degrade.synth(4, 40, 120, 160, still=True)
    cut = Clip(*(np.concatenate([scenes[0][k][:20], scenes[1][k][:20]]) for k in range(3)), np.arange(40) / 25)
    for clip in (scenes[0], degrade.coded(scenes[1], 28), still, cut):
        found = found_in(clip)
        assert not found.duplicate.any() and not found.jumps


def test_repair_leaves_out_repeats_and_keeps_times(scenes):
    bad, shown = degrade.mistimed(scenes[0], 1, drops=0.0)
    source = film.from_clip(bad)
    out = film.to_clip(timing.repair(source, timing.analyse(source)))
    first = np.append(True, np.diff(shown) > 0)
    assert (out.y == scenes[0].y).all() and (out.at_s == bad.at_s[first]).all()


def test_a_gap_in_honest_times_makes_a_jump_surer(scenes):
    shown = np.delete(np.arange(60), [30])
    lying = found_in(scenes[0].take(shown).timed(25)).jumps
    honest = found_in(scenes[0].take(shown)).jumps
    assert [jump.number for jump in honest] == [30] and honest[0].confidence > max((jump.confidence for jump in lying), default=0)


@pytest.mark.parametrize("h,w", [(64, 64), (8, 640)])
def test_nothing_to_see(h, w):
    """Flat pictures, and strips too low to look for motion in."""
    for level in (np.zeros(20), np.arange(20)):
        y = np.broadcast_to(level[:, None, None], (20, h, w)).astype(np.uint8)
        found = found_in(Clip(y, y[:, ::2, ::2], y[:, ::2, ::2], np.arange(20) / 25))
        assert len(found.score) == 20 and not np.isnan(found.score).any() and not found.jumps


def test_short_films():
    clip = degrade.synth(31, 3, 64, 64)
    for count in (1, 2, 3):
        found = found_in(clip.take(slice(0, count)))
        assert len(found.duplicate) == count and not found.duplicate.any() and not found.jumps
