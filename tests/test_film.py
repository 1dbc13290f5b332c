"""Films, damage with known truth, measures, the probe: what all cleaning stages stand on."""

import itertools
import json
from collections import Counter
from fractions import Fraction

import av
import numpy as np
import pytest

from data_tools import degrade, film, measure, probe, stage
from data_tools.film import Clip


@pytest.fixture(scope="module")
def clip():
    return degrade.synth(1, 24, 120, 160)


def as_rgb48(path, frames=4):
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "gbrp16le"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 60 + 40 * i, np.uint8), format="rgb24")
            frame = frame.reformat(format="gbrp16le")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_lossless_writing_and_reading_gives_the_same_planes_and_times(clip, tmp_path):
    uneven = clip._replace(at_s=np.cumsum([0] + [0.04, 0.08] * 11 + [0.04]))
    assert film.write(tmp_path / "a.mp4", film.from_clip(uneven), crf=0) == 24
    back = film.to_clip(film.read(tmp_path / "a.mp4"))
    for made, read in zip(uneven[:3], back[:3], strict=True):
        assert np.array_equal(made, read)
    assert np.allclose(back.at_s, uneven.at_s, atol=1e-4)


def test_writing_twice_gives_the_same_bytes(clip, tmp_path):
    for name in "ab":
        film.write(tmp_path / f"{name}.mp4", film.from_clip(clip))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_film_starts_over_each_time_and_counts_nothing_twice(clip, tmp_path):
    degrade.encode(clip, str(tmp_path / "a.mkv"))
    read = film.read(tmp_path / "a.mkv")
    assert sum(1 for _ in read) == sum(1 for _ in read) == 24
    assert read.problems == Counter()


@pytest.mark.parametrize(("pixels", "codec", "shape"), [("yuv422p", "ffv1", (120, 80)), ("yuv444p", "ffv1", (120, 160)),
                                                        ("yuv420p10le", "ffv1", (60, 80)), ("yuv411p", "ffv1", (120, 80))])
def test_chroma_keeps_its_lines(clip, tmp_path, pixels, codec, shape):
    degrade.encode(clip, str(tmp_path / "a.mkv"), codec=codec, pixels=pixels)
    read = film.read(tmp_path / "a.mkv")
    first = next(iter(read))
    assert first.u.shape == first.v.shape == shape
    assert np.abs(first.y.astype(int) - clip.y[0]).max() <= 1
    film.write(tmp_path / "b.mp4", read, crf=0)  # 4:2:0 in the end
    back = film.to_clip(film.read(tmp_path / "b.mp4"))
    assert back.u.shape == clip.u.shape
    assert measure.psnr(back.u, clip.u) > 38


def test_rgb_of_16_bits_becomes_yuv(tmp_path):
    as_rgb48(tmp_path / "a.mkv")
    read = film.to_clip(film.read(tmp_path / "a.mkv"))
    assert read.y.shape == read.u.shape == (4, 48, 64)
    assert np.abs(np.diff(read.y[:, 0, 0].astype(int)) - 40 * 219 / 255).max() < 1.5
    assert np.abs(read.u.astype(int) - 128).max() <= 1


def test_odd_sizes_lose_a_line(tmp_path):
    chroma = np.full((3, 23, 32), 100, np.uint8)
    odd = Clip(np.full((3, 45, 63), 90, np.uint8), chroma, chroma, np.arange(3) / 25)
    film.write(tmp_path / "a.mp4", film.from_clip(odd))
    assert film.to_clip(film.read(tmp_path / "a.mp4")).y.shape == (3, 44, 62)


def test_a_turned_film_is_written_upright(clip, tmp_path):
    turned = film.from_clip(clip).through(lambda pictures: pictures, turns=1)
    film.write(tmp_path / "a.mp4", turned, crf=0)
    back = film.to_clip(film.read(tmp_path / "a.mp4"))
    assert np.array_equal(back.y, np.rot90(clip.y, 1, (1, 2)))


def test_spans_start_at_their_own_zero(clip, tmp_path):
    long = degrade.synth(2, 300, 48, 64)
    degrade.encode(long, str(tmp_path / "a.mkv"), crf=0, g="50")
    for start, end, first, count in ((0.0, 2.0, 0, 50), (0.4, 0.8, 10, 10), (8.0, 10.0, 200, 50), (11.0, np.inf, 275, 25)):
        span = film.to_clip(film.read(tmp_path / "a.mkv", start, end))
        assert len(span.y) == count
        assert span.at_s[0] == 0
        assert np.array_equal(span.y, long.y[first:first + count])
    with pytest.raises(ValueError, match=r"a\.mkv: no picture of it lies between 20 and 30 s"):
        film.read(tmp_path / "a.mkv", 20, 30)


def test_held_films_are_made_once_if_they_fit(clip, tmp_path):
    passes = []

    def counted(pictures):
        passes.append(1)
        yield from pictures

    source = film.from_clip(clip).through(counted)
    small, big = film.held(source, 0.1), film.held(source, 100)
    next(iter(big))  # a pass that is given up keeps nothing
    for _ in range(3):
        assert np.array_equal(film.to_clip(big).y, clip.y)
    assert len(passes) == 2
    for _ in range(3):
        assert np.array_equal(film.to_clip(small).y, clip.y)
    assert len(passes) == 5
    spilled = film.held(source, 0.1, tmp_path / "spill.mp4")
    for _ in range(4):
        assert np.array_equal(film.to_clip(spilled).y, clip.y)
    assert len(passes) == 7  # one that did not fit, one that was written


def test_a_cut_file_gives_what_is_left_and_says_so(clip, tmp_path):
    path = tmp_path / "a.mkv"
    degrade.encode(clip, str(path), g="6")
    path.write_bytes(path.read_bytes()[:-path.stat().st_size // 3])
    assert 4 < len(film.to_clip(film.read(path)).y) < 24
    for content in (b"", b"no film at all", b"\0" * 5000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.mkv: "):
            film.read(path)
    with pytest.raises(ValueError, match="no such video file"):
        film.read(tmp_path / "none.mp4")


# Damage: the truth that goes with it

def test_weave_takes_the_lines_of_two_pictures(clip):
    woven = degrade.weave(clip, "tff")
    assert len(woven.y) == 12
    assert np.array_equal(woven.y[3, 0::2], clip.y[6, 0::2])
    assert np.array_equal(woven.y[3, 1::2], clip.y[7, 1::2])
    assert np.array_equal(woven.u[3, 1::2], clip.u[7, 1::2])
    assert np.array_equal(degrade.weave(clip, "bff").y[3, 0::2], clip.y[7, 0::2])
    assert woven.rate == pytest.approx(12.5)


@pytest.mark.parametrize(("pattern", "count"), [("2:3", 30), ("2:3:3:2", 30), ("2:2", 24), ("euro", 25)])
def test_pulldown_shows_every_picture_as_long_as_its_pattern_says(clip, pattern, count):
    made = degrade.telecine(clip, pattern)
    assert len(made.clip.y) == count
    held = Counter(number for pair in made.pairs for number in pair)
    assert [held[i] for i in range(8)] == [degrade.PULLDOWNS[pattern][i % len(degrade.PULLDOWNS[pattern])] for i in range(8)]
    for i, (top, bottom) in enumerate(made.pairs):
        assert np.array_equal(made.clip.y[i, 0::2], clip.y[top, 0::2])
        assert np.array_equal(made.clip.y[i, 1::2], clip.y[bottom, 1::2])


def test_a_cut_deletes_fields(clip):
    assert len(degrade.telecine(clip, cuts=((20, 3),)).pairs) == 28
    shifted = degrade.telecine(clip, "2:2", phase=1)
    assert all(abs(top - bottom) == 1 for top, bottom in shifted.pairs)


def test_blends_ghosts_echoes_and_repeats_follow_their_formulas(clip):
    mixed, law = degrade.blended(clip, 30)
    index, share = int(law[7, 0]), law[7, 1]
    assert share == pytest.approx((7 * 25 / 30) % 1)
    assert np.abs(mixed.y[7] - ((1 - share) * clip.y[index] + share * clip.y[index + 1])).max() <= 0.51
    ghost = degrade.ghosted(clip, 0.5).y.astype(float)
    assert np.abs(ghost[5] - (clip.y[5] + ghost[4]) / 2).max() <= 1.5
    again, shown = degrade.mistimed(clip, 3, repeats=0.3)
    assert np.array_equal(again.y, clip.y[shown])
    assert (np.diff(shown) == 0).sum() > 0
    assert np.allclose(np.diff(again.at_s), 1 / 25)


def test_damage_is_the_same_for_the_same_seed_and_leaves_its_input_alone(clip):
    before = [part.copy() for part in clip]
    for damage in (degrade.dropouts, degrade.tape, degrade.scratched, degrade.flicker, degrade.head_switch, degrade.mistimed):
        one, again, other = (damage(clip, seed) if damage is degrade.tape else damage(clip, seed)[0] for seed in (5, 5, 6))
        assert one.y.tobytes() == again.y.tobytes() != other.y.tobytes()
    assert all(np.array_equal(a, b) for a, b in zip(before, clip, strict=True))
    lost, mask = degrade.dropouts(clip, 5)
    assert np.array_equal(lost.y[~mask], clip.y[~mask])


def test_bars_leave_the_box_alone(clip):
    for kind in degrade.BARS:
        barred, (top, left, bottom, right) = degrade.barred(clip, kind, 16, 20)
        assert np.array_equal(barred.y[:, top:bottom, left:right], clip.y[:, top:bottom, left:right])
        assert not np.array_equal(barred.y[:, :top], clip.y[:, :top])
        chroma = np.s_[:, top // 2:bottom // 2, left // 2:right // 2]
        assert np.array_equal(barred.u[chroma], clip.u[chroma])


def test_edits_say_where_they_are():
    shots = [degrade.synth(30 + i, 50, 48, 64) for i in range(7)]
    film_, joins = degrade.edited(shots, list(degrade.JOINS), 4)
    assert [join.kind for join in joins] == ["cut", "dissolve", "fade", "wipe", "whip", "flash", "cut"]
    spent = sum(join.last - join.first for join in joins if join.kind in ("dissolve", "wipe"))
    assert len(film_.y) == 7 * 50 - spent
    assert np.array_equal(film_.y[:50], shots[0].y)
    assert np.array_equal(film_.y[50:joins[1].first], shots[1].y[:joins[1].first - 50])
    fade = joins[2]
    assert film_.y[(fade.first + fade.last) // 2 - 1].max() == 16
    assert np.array_equal(film_.y[-50:], shots[-1].y)
    for join, after in itertools.pairwise(joins):
        assert join.last < after.first
    with pytest.raises(ValueError, match="a fade of"):
        degrade.edited([shots[0], shots[1].take(slice(0, 12))], ["fade"], 0)


# Measures

def test_measures_on_small_cases():
    a = np.zeros((2, 4, 4), np.uint8)
    b = a.copy()
    b[0, 0, 0] = 255
    assert measure.psnr(a, b) == pytest.approx(10 * np.log10(32))
    assert measure.psnr(a, b, b > 0) == 0
    assert measure.psnr(a, b, b == 0) == measure.CAP_DB
    assert measure.f1(np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)) == 0.5
    assert measure.auc(np.array([3, 2, 1, 1.0]), np.array([True, False, True, False])) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert measure.recall_at(np.array([5, 4, 3, 2, 1.0]), np.array([True, False, True, True, False])) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="shapes"):
        measure.psnr(a, b[:1])


def test_matching_finds_what_every_picture_shows(clip):
    shown = [0, 1, 1, 2, 5, 6, 7, 7, 7, 9, 10, 12, 13, 14, 15, 17, 18, 19, 20, 22, 23]
    assert measure.matched(clip.y[shown], clip.y) == shown


# Probe

def test_probe_names_what_is_odd(clip, tmp_path):
    uneven = clip._replace(at_s=np.delete(np.arange(26), [5, 9]) / 25)
    degrade.encode(uneven, str(tmp_path / "gaps.mkv"))
    assert "missing pictures" in probe.probe(tmp_path / "gaps.mkv").oddities
    degrade.encode(clip, str(tmp_path / "plain.mkv"))
    plain = probe.probe(tmp_path / "plain.mkv")
    assert plain.oddities == {}
    assert (plain.pictures, plain.width, plain.height, plain.codec) == (24, 160, 120, "h264")
    assert plain.rate == pytest.approx(25, rel=1e-3)
    degrade.encode(degrade.weave(clip), str(tmp_path / "fields.mkv"), interlaced="tff")
    assert "interlaced flags" in probe.probe(tmp_path / "fields.mkv").oddities
    degrade.encode(clip, str(tmp_path / "deep.mkv"), codec="ffv1", pixels="yuv420p10le")
    assert probe.probe(tmp_path / "deep.mkv").oddities == {"deep": "10 bits"}
    wide = clip._replace(y=np.clip((clip.y.astype(float) - 16) * 255 / 219, 0, 255).astype(np.uint8))
    degrade.encode(wide, str(tmp_path / "wide.mkv"))
    assert "full range" in probe.probe(tmp_path / "wide.mkv").oddities
    degrade.encode(clip.take(slice(0, 1)), str(tmp_path / "one.mkv"))
    assert "one picture" in probe.probe(tmp_path / "one.mkv").oddities


def test_probe_says_why_a_file_gives_nothing(tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("not a film")
    found = probe.probe(tmp_path / "text.mp4")
    assert found.unreadable.startswith("cannot be opened as a video")
    assert probe.main([str(tmp_path / "text.mp4"), "--report", str(tmp_path / "r.json")]) == 1
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "unreadable"
    assert "text.mp4" in capsys.readouterr().err


def test_a_stage_with_nothing_to_do_gives_back_the_very_bytes(clip, tmp_path):
    source, out = tmp_path / "a.mp4", tmp_path / "b.mp4"
    film.write(source, film.from_clip(clip))
    read = film.read(source)
    stage.finish(source, stage.Outcome(read, "nothing", 1.0), read, out, tmp_path / "r.json")
    assert out.read_bytes() == source.read_bytes()
    assert json.loads((tmp_path / "r.json").read_text())["edits"] == []
    darker = read.through(lambda pictures: (picture.each(lambda plane: plane // 2) for picture in pictures))
    edit = stage.Edit("darken", {"by": Fraction(1, 2)}, 1.0)
    stage.finish(source, stage.Outcome(darker, "dark", 1.0, [edit]), read, out, tmp_path / "r.json")
    assert out.read_bytes() != source.read_bytes()
    assert json.loads((tmp_path / "r.json").read_text())["edits"][0] == {
        "step": "darken", "settings": {"by": 0.5}, "confidence": 1.0, "version": stage.VERSION}


def test_times_that_no_mp4_can_hold_are_one_error(tmp_path):
    clip = degrade.synth(1, 3, 48, 64)
    far = film.from_clip(clip._replace(at_s=np.array([0.0, 0.04, 40_000.0])))
    with pytest.raises(ValueError, match=r"^far.mp4: an mp4 cannot hold times so far apart$"):
        film.write(tmp_path / "far.mp4", far)
    assert not list(tmp_path.iterdir())
