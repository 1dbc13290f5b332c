"""Film out of pulldowns, and pictures that a rate conversion mixed: against known truth."""

import numpy as np
import pytest

from data_tools import degrade, film, measure
from data_tools.film import Clip
from data_tools.repair import blend, telecine


@pytest.fixture(scope="module")
def scene() -> Clip:
    return degrade.synth(11, 48, 144, 192, rate=24.0)


def undone(clip: Clip, order: str, **options) -> tuple[Clip, telecine.Tally]:
    tally = telecine.Tally()
    return film.to_clip(telecine.inverse(film.from_clip(clip), order, tally=tally, **options)), tally


def scored(out: Clip, truth: Clip) -> tuple[float, float, float]:
    """5th percentile of PSNR, share of true pictures present, share of repeats."""
    path = np.array(measure.matched(out.y, truth.y))
    quality = [measure.psnr(picture, truth.y[i]) for picture, i in zip(out.y, path, strict=True)]
    return float(np.percentile(quality, 5)), len(set(path)) / len(truth.y), float(np.mean(np.diff(path) == 0))


@pytest.mark.parametrize("pattern,phase,order", [("2:3", 0, "tff"), ("3:2", 3, "bff"), ("2:3:3:2", 0, "tff"), ("2:2", 1, "tff"),
                                                 ("euro", 0, "bff")])
def test_a_clean_pulldown_is_undone_exactly(scene, pattern, phase, order):
    out, tally = undone(degrade.telecine(scene, pattern, phase, order).clip, order)
    quality, cover, repeats = scored(out, scene)
    assert quality == measure.CAP_DB and cover >= 0.95 and repeats == 0
    assert tally.unlike == tally.combed == 0 and tally.breaks <= 1


def test_film_times_are_even_and_at_the_films_rate(scene):
    out, _ = undone(degrade.telecine(scene, "2:3").clip, "tff")
    assert out.at_s[0] == 0
    np.testing.assert_allclose(np.diff(out.at_s), 1 / 24, atol=1e-6)


def test_broken_cadence_and_coding(scene):
    cuts = ((31, 1), (62, 2), (90, 3))
    broken = degrade.telecine(scene, "2:3", cuts=cuts)
    out, tally = undone(degrade.coded(broken.clip, 23), "tff")
    quality, cover, repeats = scored(out, scene)
    assert cover >= 0.94 and repeats == 0 and tally.breaks >= 1 and tally.unlike == 0
    steady, _ = undone(degrade.coded(degrade.telecine(scene, "2:3").clip, 23), "tff")
    assert quality > scored(steady, scene)[0] - 3
    assert (np.diff(out.at_s) > 0).all()


def test_progressive_pictures_stay_as_they_are(scene):
    out, tally = undone(scene, "tff")
    assert (out.y == scene.y).all() and (out.u == scene.u).all() and tally.fits == 1


def test_a_still_film_is_not_torn():
    still = degrade.synth(3, 20, 96, 128, still=True)
    out, tally = undone(still, "tff", cadence="2:2")
    assert len(out.y) == 20 and (out.y == still.y).all() and tally.combed == 0


def test_a_title_at_field_rate_is_filled(scene):
    pulled = degrade.telecine(scene, "2:3")
    fields = scene.take(np.array([number for pair in pulled.pairs for number in pair]))
    titled, _ = degrade.ticker(fields, "A LINE OF NEWS THAT RUNS AT THE RATE OF FIELDS", 4, height=32, bottom=16, x0=60)
    woven = degrade.weave(titled, "tff")
    out, tally = undone(woven._replace(at_s=pulled.clip.at_s), "tff")
    assert tally.combed > 0.8 * tally.pictures
    path = measure.matched(out.y[:, :90], scene.y[:, :90])
    assert np.mean([measure.psnr(a[:64], scene.y[i][:64]) for a, i in zip(out.y, path, strict=True)]) > 60
    teeth = telecine._combs(out.y[20][0::2], out.y[20][1::2])
    assert teeth.max() < telecine._combs(woven.y[25][0::2], woven.y[25][1::2]).max() / 2


def test_memory_is_bounded(scene):
    """Pictures are asked for no further ahead than the look-ahead."""
    asked = 0

    def counted():
        nonlocal asked
        for picture in film.from_clip(degrade.telecine(scene, "2:3").clip):
            asked += 1
            yield picture

    next(telecine.inverse(counted(), "tff"))
    assert asked <= 24


def test_other_formats_of_chroma(scene):
    wide = degrade.telecine(scene, "2:3").clip
    wide = Clip(wide.y, wide.y, wide.y, wide.at_s)
    out, _ = undone(wide, "tff")
    assert (out.u == out.y).all()


@pytest.mark.parametrize("options,word", [({"order": "top"}, "order"), ({"order": "tff", "cadence": "5:4"}, "cadence")])
def test_unknown_options_are_refused(scene, options, word):
    with pytest.raises(ValueError, match=word):
        next(telecine.inverse(film.from_clip(scene), **options))


# Mixed pictures

@pytest.mark.parametrize("source,rate", [(24, 30), (24, 25), (25, 30)])
def test_mixed_pictures_are_unmixed(source, rate):
    clip = degrade.synth(12, 60, 120, 160, rate=float(source))
    bad, law = degrade.blended(clip, rate)
    shown = film.from_clip(bad)
    found = blend.analyse(shown)
    assert found is not None and found.name == f"{source}/{rate}" and min(found.phase, 1 - found.phase) < 0.02
    index, share = found.shares(len(bad.y))
    np.testing.assert_allclose(index + share, law.sum(1), atol=0.05)
    out = film.to_clip(blend.repair(shown, found))
    truth = clip.y[:len(out.y)]
    near = clip.y[np.rint(law.sum(1)).astype(int)]
    assert measure.psnr(out.y, truth) > measure.psnr(bad.y, near) + 6
    again, nearest = blend.check(shown, found)
    assert again < nearest / 20
    np.testing.assert_allclose(np.diff(out.at_s)[1:], 1 / source, atol=1e-3)


def test_mixed_and_coded():
    clip = degrade.synth(12, 60, 120, 160, rate=24.0)
    bad, law = degrade.blended(clip, 30)
    bad, law = degrade.coded(bad.take(slice(3, None)), 18), law[3:]
    found = blend.analyse(film.from_clip(bad))
    assert found is not None and abs(found.ratio - 0.8) < 0.002
    out = film.to_clip(blend.repair(film.from_clip(bad), found))
    path = measure.matched(out.y, clip.y)
    near = clip.y[np.rint(law.sum(1)).astype(int)]
    assert measure.psnr(out.y, clip.y[path]) > measure.psnr(bad.y, near) + 2


def test_what_is_not_mixed_is_left_alone():
    clip = degrade.synth(12, 60, 120, 160)
    repeated = clip.take(np.arange(70) * 4 // 5)
    for shown in (clip, degrade.coded(clip, 28), degrade.ghosted(clip, 0.5), repeated, degrade.synth(4, 60, 120, 160, still=True)):
        assert blend.analyse(film.from_clip(shown)) is None
    assert blend.analyse(film.from_clip(clip.take(slice(0, 10)))) is None
