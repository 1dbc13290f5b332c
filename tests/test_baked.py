"""Baked combs: scales and their undoing, detection with what stands behind it, and repairs that help or do not happen."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from data_tools import degrade, film
from data_tools.film import Clip
from data_tools.measure import psnr
from data_tools.repair import baked


def scene(frames=40, seed=3, height=240, width=320) -> Clip:
    return degrade.synth(seed, frames, height, width, 50)


def damaged(clip: Clip, scale: float, how: str, order: str = "tff", crf: int = 0) -> Clip:
    out = degrade.rescaled(degrade.weave(clip, order), scale, how)
    return degrade.coded(out, crf) if crf else out


@pytest.fixture(scope="module")
def pictures() -> Clip:
    return scene()


@pytest.fixture(scope="module")
def shrunk(pictures) -> film.Film:
    """Woven, top field first, and shrunk to 3/4."""
    return film.from_clip(damaged(pictures, 0.75, "area"))


@pytest.fixture(scope="module")
def found(shrunk) -> baked.Found:
    return baked.analyse(shrunk)


@pytest.mark.parametrize("how", baked.KERNELS)
@pytest.mark.parametrize("scale", [0.75, 1.5])
def test_resize_matrix_is_the_scaler(how, scale):
    clip = scene(1, height=120, width=64)
    out = degrade.rescaled(clip, scale, how)
    widened = degrade.rescaled(Clip(clip.y[:, :, :1].repeat(64, 2), clip.u, clip.v, clip.at_s), scale, how).y[0, :, 8]
    ours = baked.resize_matrix(how, 120, out.y.shape[1]) @ clip.y[0, :, 0]
    assert np.abs(ours - widened)[6:-6].max() < 6, "rounded and fixed-point arithmetic may differ by little"


def test_undo_gives_back_what_an_enlarged_picture_was():
    rng = np.random.default_rng(0)
    woven = np.cumsum(rng.normal(0, 4, (120, 8)), 0) + 100 + 20 * (-1.0) ** np.arange(120)[:, None]
    resize = baked.resize_matrix("bicubic", 120, 180)
    assert np.abs(baked.undo_matrix(resize, noise=0.1) @ (resize @ woven) - woven).mean() < 1.5


def test_fields_of_a_way_are_taken_apart_and_put_together():
    for top_first in (True, False):
        for lines in (10, 11):
            way = baked.Way(np.zeros((8, lines), np.float32), np.zeros((lines, 8), np.float32), 0.5, top_first)
            plane = np.arange(lines * 3, dtype=np.float32).reshape(lines, 3)
            assert np.array_equal(way.woven(way.fields(plane)), plane)
    assert np.array_equal(way.fields(plane[:10])[0][::-1], plane[1:10:2]), "the bottom field is first"


def test_shifts_of_lines_move_the_rescaled_picture():
    ramp = np.arange(40.0)
    moved = baked.resize_matrix("bilinear", 40, 30, 1.0) @ ramp
    assert np.allclose(moved[4:-4], (baked.resize_matrix("bilinear", 40, 30) @ ramp)[4:-4] - 1)


@pytest.mark.parametrize(("scale", "how", "order", "crf"), [(0.75, "area", "tff", 0), (0.9, "bicubic", "bff", 23),
                                                            (1.5, "bicubic", "tff", 23)])
def test_found_and_repaired(pictures, scale, how, order, crf):
    whole = damaged(pictures, scale, how, order, crf)
    found = baked.analyse(film.from_clip(whole))
    assert found is not None
    assert found.height == 240
    assert found.order == order
    assert abs(found.offset) < 0.1
    assert found.fits
    before = whole.take(slice(0, 5))
    repaired = film.to_clip(baked.repair(film.from_clip(before), found))
    truth = degrade.rescaled(pictures.take(slice(0, 10, 2)), scale, how)
    assert psnr(repaired.y, truth.y) > psnr(before.y, truth.y) + 4
    assert psnr(repaired.u, truth.u) > psnr(before.u, truth.u) - 0.1
    assert np.array_equal(repaired.at_s, before.at_s)


def test_both_fields_come_out_at_the_rate_of_fields(pictures, found):
    given = film.from_clip(damaged(pictures.take(slice(0, 10)), 0.75, "area"))
    fast = baked.repair(given, found, "field")
    out = film.to_clip(fast)
    truth = degrade.rescaled(pictures.take(slice(0, 10)), 0.75, "area")
    assert fast.kind.rate == given.kind.rate * 2
    assert len(out.y) == 10
    assert np.allclose(np.diff(out.at_s), 0.02)
    assert psnr(out.y[1::2], truth.y[1::2]) > psnr(film.to_clip(given).y, truth.y[1::2]) + 4
    assert psnr(out.y[0::2], out.y[1::2]) < 30, "fields of two moments"


@pytest.mark.parametrize("scale", [1.0, 0.75, 1.5])
@pytest.mark.parametrize("crf", [0, 26])
def test_clean_pictures_have_none(pictures, scale, crf):
    clip = pictures.take(slice(0, None, 2))
    clip = clip if scale == 1 else degrade.rescaled(clip, scale, "bicubic")
    assert baked.analyse(film.from_clip(degrade.coded(clip, crf) if crf else clip)) is None


def test_only_what_change_alone_can_be_behind_counts():
    rng = np.random.default_rng(0)
    upright, other, noise = rng.normal(0, 1, (3, 6, 5000))
    for moved, slope, own, bond in ((0.0, 0.2, 1.0, 0.42), (3.0, 0.2, 0.1, 0.42), (30.0, 0.0, 0.001, 0.0)):
        change = other + moved * upright
        carrier = np.stack([0.2 * (other if slope else noise) + 0.4 * upright + 0.4 * noise, 0 * noise], 2)
        table = np.stack([change, upright, *rng.normal(0, 1, (2, 6, 5000))], 1)
        found = baked._of_change(table @ table.transpose(0, 2, 1), table @ carrier, float(np.square(carrier).sum()))
        assert np.allclose(found[:3], (slope, own, bond), atol=0.05), (moved, found)
        assert (found[3] > 0.9) == bool(slope)


def test_text_that_rolls_is_no_comb():
    big = np.full((440, 320), 16, np.uint8)
    for i, top in enumerate(range(20, 440, 22)):
        text = "ABCDEFGHIJKLMNOPRSTUVWXYZ"[i:i + 9]
        cv2.putText(big, text, (60 + 7 * i % 40, top), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 225, 1, cv2.LINE_AA)
    shifts = [np.float32([[1, 0, 0], [0, 1, -1.5 * i]]) for i in range(20)]
    y = np.stack([cv2.warpAffine(big, shift, (320, 240)) for shift in shifts])
    grey = np.full((20, 120, 160), 128, np.uint8)
    for scale in (0.75, 1.5):
        assert baked.analyse(film.from_clip(degrade.rescaled(Clip(y, grey, grey, np.arange(20) / 25), scale, "bicubic"))) is None


def evidence(place: float, slope: float, own: float = 1.0) -> baked.Evidence:
    return baked.Evidence(place, line=9.0, bond=0.4, lock=0.5, still_lock=0.0, accord=0.95, slope=slope, own=own, excess=0.2,
                          near=0.0, moving=9.0)


def test_the_comb_is_the_carrier_that_carries_most():
    head = baked._heads()["comb"]
    strong, faint, upright = evidence(1 / 3, 0.05), evidence(0.2, 0.001), evidence(0.25, 0.05, own=0.1)
    assert baked.chosen([evidence(0.2, 0.03), strong, faint], 240, head)[0] == strong.place
    assert baked.chosen([strong, evidence(0.4995, 0.1)], 240, head) == (None, -20.0), "fields on lines of their own"
    assert baked.chosen([faint, upright], 240, head) == (None, -baked.HOME)
    assert baked.chosen([], 240, head) == (None, -20.0)


def test_fields_on_lines_of_their_own_are_not_baked(pictures):
    assert baked.analyse(film.from_clip(degrade.weave(pictures))) is None


def test_films_without_motion_or_of_few_pictures_have_none(pictures):
    still = pictures.take([0] * 8).timed(25)
    assert baked.analyse(film.from_clip(still)) is None
    assert baked.analyse(film.from_clip(pictures.take([0]))) is None
    tiny = pictures.each(lambda planes: planes[:, :16, :16])
    assert baked.analyse(film.from_clip(tiny)) is None


def test_the_gate_leaves_a_film_whose_repair_does_not_fit(shrunk, found):
    assert baked.repair(shrunk, replace(found, left=0.9)) is shrunk
    assert baked.repair(shrunk, replace(found, misfit=0.5)) is shrunk
    with pytest.raises(ValueError, match="frame or field"):
        baked.repair(shrunk, found, "double")


def test_a_repair_the_wrong_way_round_does_not_fit(shrunk, found):
    left, _ = baked.tried(baked.moments(shrunk)[:4], 1 / 3, replace(found, order="bff"))
    assert left < -2 or left > 0.75


def test_moments_are_few_however_long_the_film(pictures):
    long = film.from_clip(pictures.take(list(range(40)) * 4).timed(25))
    kept = baked.moments(long, most=6)
    assert 6 <= len(kept) <= 13
    assert all(moment.now.shape[1] <= baked.COLUMNS for moment in kept)


def test_the_same_film_gives_the_same_bytes(pictures, shrunk, found):
    assert found == baked.analyse(shrunk)
    given = film.from_clip(damaged(pictures.take(slice(0, 4)), 0.75, "area"))
    first, second = (film.to_clip(baked.repair(given, found)) for _ in range(2))
    assert np.array_equal(first.y, second.y)
