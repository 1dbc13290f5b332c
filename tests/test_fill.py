"""Filling missing lines: known lines stay, truth is approached, every format and run length works; what the side-car is sent."""

import itertools
import sys

import cv2
import numpy as np
import pytest
import torch

from data_tools import degrade, film, measure
from data_tools.film import Picture
from data_tools.repair import fill, train_fill

GRADES = ("fast", "fine")


def filled(clip, order, rate="field", grade="fast"):
    return film.to_clip(fill.deinterlace(iter(film.from_clip(clip)), order, rate, grade))


def noise_pictures(rng, count, luma, chroma):
    return [Picture(*(rng.integers(0, 256, shape, np.uint8) for shape in (luma, chroma, chroma)), 1 + i * 0.04)
            for i in range(count)]


def keeps_known_lines(out, pictures, order, rate):
    each = 2 if rate == "field" else 1
    assert len(out) == each * len(pictures)
    for i, picture in enumerate(out):
        woven, k = pictures[i // each], i % each
        first = 0 if (order == "tff") == (k == 0) else 1
        for plane, source in zip(picture[:3], woven[:3], strict=True):
            assert plane.shape == source.shape and plane.dtype == np.uint8
            np.testing.assert_array_equal(plane[first::2], source[first::2])


@pytest.mark.parametrize(("order", "rate", "grade"), list(itertools.product(fill.ORDERS, fill.RATES, GRADES)))
def test_known_lines_stay_in_every_chroma_format_and_size(order, rate, grade):
    rng = np.random.default_rng(0)
    for luma, chroma, count in (((32, 48), (16, 24), 3), ((32, 48), (32, 24), 2), ((32, 48), (32, 48), 2), ((37, 51), (19, 26), 2),
                                ((37, 51), (18, 25), 2), ((6, 5), (3, 3), 1), ((1, 1), (1, 1), 1)):
        pictures = noise_pictures(rng, count, luma, chroma)
        keeps_known_lines(list(fill.deinterlace(iter(pictures), order, rate, grade)), pictures, order, rate)


@pytest.mark.parametrize("grade", GRADES)
def test_times_and_both_rates(grade):
    clip = degrade.weave(degrade.synth(11, 8, 48, 64), "bff")._replace(at_s=np.array([0, 0.04, 0.1, 0.14]))
    both, one = filled(clip, "bff", "field", grade), filled(clip, "bff", "frame", grade)
    np.testing.assert_allclose(both.at_s, [0, 0.02, 0.04, 0.07, 0.1, 0.12, 0.14, 0.16])
    for a, b in zip(one, both, strict=True):
        np.testing.assert_array_equal(a, b[::2])
    single = filled(clip.take(slice(1)), "bff", "field", grade)
    np.testing.assert_allclose(single.at_s, [0, 0.02])
    assert list(fill.deinterlace(iter([]), "tff", "field", grade)) == []


def test_fast_is_bwdif_and_asks_for_few_pictures_ahead():
    truth = degrade.synth(12, 16, 120, 160)
    out = filled(degrade.weave(truth, "tff"), "tff")
    assert measure.psnr(out.y[4:-4], truth.y[4:-4]) > 30
    asked = []

    def endless():
        for i in itertools.count():
            asked.append(i)
            yield Picture(*(np.full(shape, i % 200, np.uint8) for shape in ((32, 32), (16, 16), (16, 16))), i * 0.04)

    for grade, most in (("fast", 2), ("fine", 4)):
        asked.clear()
        pictures = fill.deinterlace(endless(), "tff", "frame", grade)
        for _ in range(6):
            next(pictures)
        assert len(asked) <= 6 + most


@pytest.mark.parametrize(("order", "lowpass", "gain"), [("tff", "none", 1.5), ("bff", "none", 1.5), ("tff", "121", 0.5)])
def test_fine_is_better_than_fast(order, lowpass, gain):
    truth = degrade.synth(9_001, 16, 120, 160)
    woven, truth = degrade.weave(truth, order, lowpass), degrade.lowpassed(truth, lowpass)
    fast, fine = (filled(woven, order, "field", grade) for grade in GRADES)
    for planes in range(3):
        ours, theirs = (measure.psnr(out[planes][4:-4], truth[planes][4:-4]) for out in (fine, fast))
        assert ours > theirs + (gain if planes == 0 else 0)


def test_a_still_picture_comes_back_whole():
    truth = degrade.synth(13, 1, 120, 160)
    still = truth.take([0] * 12).timed(50)
    for grade, least in (("fast", 35), ("fine", 45)):
        assert measure.psnr(filled(degrade.weave(still, "tff"), "tff", "field", grade).y, still.y) > least


def test_fine_is_deterministic_and_small():
    clip = degrade.weave(degrade.synth(14, 12, 64, 96), "tff")
    for a, b in zip(filled(clip, "tff", grade="fine"), filled(clip, "tff", grade="fine"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sum(weight.numel() for weight in fill.load(fill.WEIGHTS).parameters()) <= 40_000


def test_a_fresh_network_is_a_mean_of_candidates():
    x = torch.randn(2, fill.INPUTS, 6, 8)
    expected = x[:, :fill.CANDIDATES].sum(1) / (fill.CANDIDATES + 1)
    torch.testing.assert_close(fill.Fill(16, 2)(x), expected)


def test_bad_options_are_named():
    for options, right in ((("ttf",), "tff, bff"), (("tff", "double"), "frame, field"),
                           (("tff", "frame", "good"), "fast, fine, best")):
        with pytest.raises(ValueError, match=right):
            fill.deinterlace(iter([]), *options)


# The side-car

# Takes QTGMC's place behind the pipe: reads the woven planes and gives each twice, with every line changed.
STAND_IN = """#!{python}
import sys
import numpy as np
assert sys.argv[1] == "-c" and "QTempGaussMC" in sys.argv[2]
path, w, h, sub_w, sub_h, count, order = sys.argv[3], *map(int, sys.argv[4:9]), sys.argv[9]
planes = np.fromfile(path, np.uint8).reshape(count, h * w + 2 * (h >> sub_h) * (w >> sub_w))
for i, picture in enumerate(planes):
    if i == {stop}:
        sys.exit("no more memory")
    for k in (0, 1):
        sys.stdout.buffer.write(((picture // 2) + k).tobytes())
"""


def stand_in(tmp_path, monkeypatch, stop=-1):
    program = tmp_path / "python"
    program.write_text(STAND_IN.format(python=sys.executable, stop=stop))
    program.chmod(0o755)
    monkeypatch.setenv("LATTE_QTGMC_PYTHON", str(program))


@pytest.mark.parametrize(("luma", "chroma"), [((37, 51), (19, 26)), ((32, 48), (32, 24)), ((32, 48), (32, 48))])
def test_best_sends_planes_and_keeps_known_lines(tmp_path, monkeypatch, luma, chroma):
    stand_in(tmp_path, monkeypatch)
    pictures = noise_pictures(np.random.default_rng(1), 3, luma, chroma)
    for order, rate in itertools.product(fill.ORDERS, fill.RATES):
        out = list(fill.deinterlace(iter(pictures), order, rate, "best"))
        keeps_known_lines(out, pictures, order, rate)
        np.testing.assert_array_equal(out[0].u[1 if order == "tff" else 0::2], pictures[0].u[1 if order == "tff" else 0::2] // 2)
    assert list(fill.deinterlace(iter([]), "tff", "field", "best")) == []


def test_best_says_why_it_cannot(tmp_path, monkeypatch):
    monkeypatch.delenv("LATTE_QTGMC_PYTHON", raising=False)
    with pytest.raises(ValueError, match="LATTE_QTGMC_PYTHON"):
        fill.deinterlace(iter([]), "tff", "field", "best")
    monkeypatch.setenv("LATTE_QTGMC_PYTHON", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="absent"):
        fill.deinterlace(iter([]), "tff", "field", "best")
    stand_in(tmp_path, monkeypatch, stop=1)
    with pytest.raises(ValueError, match="no more memory"):
        list(fill.deinterlace(iter(noise_pictures(np.random.default_rng(2), 3, (32, 32), (16, 16))), "tff", "field", "best"))


# Training

class Drawn(train_fill.Stock):
    """A stock without files."""

    def __init__(self):
        self.films = []

    def photograph(self, rng):
        return cv2.resize(rng.integers(0, 256, (96, 144), np.uint8), (576, 384), interpolation=cv2.INTER_CUBIC)

    def clip(self, seed):
        return train_fill.layers(self, seed)


def test_training_lowers_the_error_and_goes_on_where_it_was(tmp_path, monkeypatch):
    first = train_fill.prepare(Drawn(), 2, 0, tmp_path / "first")
    assert first.parts[0].shape == (2, len(train_fill.FIELDS), train_fill.HEIGHT // 2, train_fill.WIDTH)
    assert (first.errors > 0).all()

    def trained(sets, until, name):
        torch.manual_seed(0)
        return train_fill.train(fill.Fill(8, 1), sets, until, 20, 0, tmp_path / name, 2)

    middle = trained([first], 10, "a.pt")
    second = train_fill.prepare(Drawn(), 1, 2, tmp_path / "second", middle)
    whole = trained([first, second], 20, "a.pt")
    trained([first], 10, "b.pt")
    with monkeypatch.context() as patch:
        patch.setattr(train_fill, "batch", stopping(train_fill.batch, 3))
        with pytest.raises(InterruptedError):
            trained([first, second], 20, "b.pt")
    for name, weight in trained([first, second], 20, "b.pt").state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name
    x, wanted, _ = train_fill.batch([first, second], 0, 100, 4)
    with torch.inference_mode():
        assert (whole(x) - wanted).square().mean() < (fill.Fill(8, 1)(x) - wanted).square().mean()


def stopping(function, after):
    calls = itertools.count()

    def called(*args):
        if next(calls) == after:
            raise InterruptedError
        return function(*args)

    return called


def test_layers_move_and_stay_within_levels():
    clip = train_fill.layers(Drawn(), 3)
    assert clip.y.shape == (train_fill.FRAMES, train_fill.HEIGHT, train_fill.WIDTH) and clip.y.std() > 5
    assert np.array_equal(clip.y, train_fill.layers(Drawn(), 3).y)
