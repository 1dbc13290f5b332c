"""Which fields belong together, and the stage that acts on it: on scenes woven, pulled down and coded with known truth."""

import json
from functools import cache

import cv2
import numpy as np
import pytest

from data_tools import degrade, film, measure
from data_tools.deinterlace import _misfit, command, deinterlace
from data_tools.film import Clip, from_clip
from data_tools.repair import baked, fields
from data_tools.repair.fields import TOP, Segment, analyse, mark_of

SIZE = {"height": 180, "width": 320}


@cache
def scene(seed: int = 3, frames: int = 48) -> Clip:
    return degrade.synth(seed, frames, **SIZE)


def after(one: Clip, other: Clip) -> Clip:
    """One clip and then another."""
    joined = [np.concatenate(pair) for pair in zip(one[:3], other[:3], strict=True)]
    return Clip(*joined, np.arange(len(joined[0]), dtype=float)).timed(25)


def titled(clip: Clip, order: str) -> Clip:
    """A clip under a line of text that moves with the fields."""
    twice = clip.take(np.repeat(np.arange(len(clip.y)), 2)).timed(50)
    return degrade.weave(degrade.ticker(twice, "SOME NEWS THAT RUN ALONG THE BOTTOM " * 3, 2.5, height=28, x0=200.0)[0], order)


def credits(step: int, frames: int, height: int) -> Clip:
    """White text of thin strokes that rolls up by `step` whole lines a picture."""
    width, gap = height * 16 // 9, max(14, height // 18)
    page = np.full((2 * height + step * frames, width), 16, np.uint8)
    for k in range(len(page) // gap):
        line = ("DIRECTED BY", "Jane Q. Example", "", "PRODUCED BY", "Max Mustermann", "The Quick Brown Foxes")[k % 6]
        cv2.putText(page, line, (width // 4, (k + 1) * gap), cv2.FONT_HERSHEY_SIMPLEX, height / 450, 235, 1, cv2.LINE_AA)
    y, grey = np.stack([page[i * step:i * step + height] for i in range(frames)]), np.full((frames, height // 2, width // 2), 128)
    return Clip(y, grey.astype(np.uint8), grey.astype(np.uint8), np.arange(frames, dtype=float)).timed(25)


CODED = {"clean": lambda clip: clip, "crf 28": lambda clip: degrade.coded(clip, 28),
         "mpeg2": lambda clip: degrade.coded(clip, codec="mpeg2video", bit_rate=800_000),
         "noise": lambda clip: degrade.tape(clip, 1, noise=8, jitter=0)}


# Marks and verdicts

def test_marks_of_fields_by_their_times():
    assert mark_of((0, 0), (1, 1)) == 0
    assert mark_of((0, 0.5), (1, 1.5)) == TOP[0]  # interlaced, top first
    assert mark_of((1, 1), (1, 2)) == TOP[1]  # from film to a picture of two
    assert mark_of((1, 2), (2, 3)) == TOP[2]
    assert mark_of((2, 3), (3, 3)) == TOP[3]
    assert mark_of((0.5, 0), (1.5, 1)) == fields.BOTTOM[0]


@pytest.mark.parametrize("how", CODED)
@pytest.mark.parametrize("seed", [3, 4])
def test_progressive_stays_progressive(how, seed):
    analysis = analyse(from_clip(CODED[how](scene(seed))))
    assert analysis.verdict == "progressive" and analysis.confidence > 0.8
    assert [(segment.first, segment.last) for segment in analysis.segments] == [(0, 48)]


@pytest.mark.parametrize("how", CODED)
@pytest.mark.parametrize("lowpass", ["none", "soft"])
@pytest.mark.parametrize("order", degrade.ORDERS)
def test_video_is_told_with_its_order(order, lowpass, how):
    analysis = analyse(from_clip(CODED[how](degrade.weave(scene(4), order, lowpass))))
    assert analysis.verdict == order and analysis.confidence > 0.6
    assert {segment.order for segment in analysis.segments} == {order}


@pytest.mark.parametrize("how", ["clean", "crf 28"])
@pytest.mark.parametrize(("pattern", "phase"), [("2:3", 0), ("2:3", 3), ("2:3:3:2", 0), ("2:3:3:2", 1), ("euro", 7)])
def test_telecine_is_told_with_its_pattern(pattern, phase, how):
    order = degrade.ORDERS[phase % 2]
    analysis = analyse(from_clip(CODED[how](degrade.telecine(scene(), pattern, phase, order).clip)))
    assert analysis.verdict == "telecine"
    assert [(segment.pattern, segment.order) for segment in analysis.segments] == [(pattern, order)]


def test_phase_of_a_pulldown():
    phases = [analyse(from_clip(degrade.telecine(scene(), "2:3", 2 * k).clip)).segments[0].phase for k in range(5)]
    assert np.array_equal((np.array(phases) - phases[0]) % 5, np.arange(5))


def test_telecine_is_followed_through_breaks_of_its_cadence():
    pulled = degrade.telecine(scene(), "2:3", 0, cuts=((31, 3), (70, 1))).clip
    analysis = analyse(from_clip(pulled))
    assert analysis.verdict == "telecine" and len(analysis.segments) == 1


@pytest.mark.parametrize("order", degrade.ORDERS)
def test_shifted_film_is_no_video(order):
    shifted = degrade.telecine(scene(), "2:2", 1, order).clip
    for how in ("clean", "noise"):
        analysis = analyse(from_clip(CODED[how](shifted)))
        assert analysis.verdict == "shifted" and analysis.segments[0].order == order, how


def test_a_flip_of_the_order_makes_two_segments():
    flipped = after(degrade.weave(scene(), "tff"), degrade.weave(scene(4), "bff"))
    segments = analyse(from_clip(flipped)).segments
    assert [segment.verdict for segment in segments] == ["tff", "bff"]
    assert abs(segments[0].last - 24) <= 1 and segments[1].last == 48


@pytest.mark.parametrize("order", degrade.ORDERS)
@pytest.mark.parametrize("cut", [True, False])
def test_segments_change_at_the_very_picture(cut, order):
    long, other = scene(3, 80), scene(4, 40)
    to_film = after(degrade.weave(long.take(slice(40)), order), other if cut else long.take(slice(40, 80)))
    to_video = after(other if cut else long.take(slice(40)), degrade.weave(long.take(slice(40, 80)), order))
    for clip, change, verdicts in ((to_film, 20, [order, "progressive"]), (to_video, 40, ["progressive", order])):
        segments = analyse(from_clip(clip)).segments
        assert [segment.verdict for segment in segments] == verdicts and segments[0].last == segments[1].first == change


@pytest.mark.parametrize("order", degrade.ORDERS)
def test_a_title_that_fills_a_part_of_a_cell_makes_a_hybrid(order):
    cells = fields.CELLS[0] * fields.CELLS[1]
    votes = np.zeros((60, cells, fields.FAST + 1), np.float16)
    votes[:, :, 0] = 10
    votes[:, -1, 0], votes[:, -1, (fields.TOP if order == "tff" else fields.BOTTOM)[0]] = 4, 4
    verdict = fields.judge(fields.Evidence(votes, np.full((60, cells), 10, np.float16), np.full(60, 3.0)))
    assert verdict.verdict == "hybrid" and verdict.segments[0].order == order
    votes[:, -1, fields.TOP[0]] = votes[:, -1, fields.BOTTOM[0]] = 2
    assert fields.judge(fields.Evidence(votes, np.full((60, cells), 10, np.float16), np.full(60, 3.0))).verdict == "progressive"


def test_parts_in_time_and_parts_of_the_picture_make_hybrids():
    film_part = degrade.telecine(scene(), "2:3").clip
    in_time = analyse(from_clip(after(film_part, degrade.weave(scene(4)))))
    assert in_time.verdict == "hybrid" and [segment.kind for segment in in_time.segments] == ["telecine", "interlaced"]
    for under in (film_part, scene()):
        over = analyse(from_clip(titled(under, "tff")))
        assert over.verdict == "hybrid" and over.segments[0].order == "tff"


# What is no evidence

def test_what_never_moves_is_progressive_without_confidence():
    still = degrade.synth(1, 6, **SIZE)
    for clip in (still.take([0] * 6).timed(25), still.take([0]), still.each(lambda planes: planes * 0 + 16)):
        analysis = analyse(from_clip(clip))
        assert analysis.verdict == "progressive" and analysis.confidence == 0
    noisy = degrade.tape(degrade.synth(2, 30, still=True, **SIZE), 1, noise=10, jitter=0)
    assert analyse(from_clip(noisy)).verdict == "progressive"


def test_cuts_repeats_and_fine_lines_are_no_evidence():
    cuts = np.concatenate([[k] * 5 for k in range(6)])
    shots = Clip(*(np.concatenate([scene(seed)[k][:1] for seed in range(6)]) for k in range(3)), np.arange(6.0)).take(cuts)
    assert analyse(from_clip(shots.timed(25))).verdict == "progressive"
    assert analyse(from_clip(scene().take(np.arange(48) // 2).timed(25))).verdict == "progressive"
    assert analyse(from_clip(degrade.mistimed(scene(), 1, 0.3)[0])).verdict == "progressive"
    lines = scene().y.copy()
    lines[:, ::2] = np.clip(lines[:, ::2].astype(int) - 40, 16, 235)
    assert analyse(from_clip(scene()._replace(y=lines))).verdict == "progressive"


@pytest.mark.parametrize("frames", [2, 4, 6])
def test_few_pictures(frames):
    assert analyse(from_clip(degrade.weave(scene().take(slice(frames))))).verdict in ("tff", "progressive")
    assert analyse(from_clip(scene().take(slice(frames)))).verdict == "progressive"


def test_odd_and_tiny_sizes():
    for height, width in ((181, 321), (17, 33), (12, 12), (1, 2)):
        clip = Clip(*(planes[:, :height, :width] for planes in scene()[:3]), scene().at_s)
        assert analyse(from_clip(clip)).verdict == "progressive"


def test_evidence_is_small_and_repeats():
    clip = degrade.weave(scene())
    one, other = (fields.gather(iter(from_clip(clip))) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert sum(part.nbytes for part in one) < 700 * len(clip.y)


# The stage

def repaired(clip: Clip, truth: Clip, **options) -> tuple[object, Clip, float]:
    """The outcome, its film, and the 5th percentile of the PSNR of its pictures to the true ones that they show."""
    outcome = deinterlace(from_clip(clip), **options)
    out = film.to_clip(outcome.film)
    assert (np.diff(out.at_s) > 0).all()
    shown = measure.matched(out.y, truth.y)
    return outcome, out, float(np.percentile([measure.psnr(out.y[i], truth.y[j]) for i, j in enumerate(shown)], 5))


def test_progressive_film_is_given_back_itself():
    given = from_clip(scene())
    outcome = deinterlace(given)
    assert outcome.film is given and outcome.verdict == "progressive" and not outcome.edits


@pytest.mark.parametrize(("rate", "count"), [("frame", 24), ("field", 48)])
def test_video_is_filled_at_either_rate(rate, count):
    outcome, out, quality = repaired(degrade.weave(scene(), "bff"), scene(), rate=rate)
    assert outcome.verdict == "bff" and len(out.y) == count and quality > 30
    assert [(edit.step, edit.settings["order"], edit.settings["rate"]) for edit in outcome.edits] == [("deinterlace", "bff", rate)]
    assert outcome.film.kind.rate == from_clip(degrade.weave(scene())).kind.rate * (2 if rate == "field" else 1)


def test_telecine_gives_the_film_back_exactly():
    outcome, out, quality = repaired(degrade.telecine(scene(), "2:3", 2).clip, scene())
    assert outcome.verdict == "telecine" and abs(len(out.y) - 47) <= 1 and quality == measure.CAP_DB
    assert outcome.film.kind.rate == 25


@pytest.mark.parametrize("order", degrade.ORDERS)
def test_shifted_film_is_only_woven_again(order):
    outcome, out, quality = repaired(degrade.telecine(scene(), "2:2", 1, order).clip, scene())
    assert outcome.verdict == "shifted" and outcome.edits[0].step == "reweave" and quality == measure.CAP_DB
    assert len(out.y) == 46  # of 47 pictures the first and the last hold a field of their own


@pytest.mark.parametrize("how", ["clean", "crf 23"])
@pytest.mark.parametrize(("height", "steps"), [(180, (1, 2, 3, 4, 6, 8)), (360, (2, 3, 4))])
def test_progressive_credits_are_left_alone(height, steps, how):
    for step in steps:
        clip = credits(step, 32, height)
        given = from_clip(degrade.coded(clip, 23) if how == "crf 23" else clip)
        outcome = deinterlace(given)
        assert outcome.verdict == "progressive" and outcome.film is given, step


@pytest.mark.parametrize("how", ["clean", "crf 23"])
@pytest.mark.parametrize("order", degrade.ORDERS)
def test_credits_whose_fields_move_apart_are_video(order, how):
    for step in (1, 2, 3, 4):  # lines a field
        clip = degrade.weave(credits(step, 64, 180), order)
        outcome = deinterlace(from_clip(degrade.coded(clip, 23) if how == "crf 23" else clip))
        assert outcome.verdict == order and [edit.step for edit in outcome.edits] == ["deinterlace"], step


def test_rolling_by_whole_lines_is_told_from_other_motion():
    clips = {"progressive": credits(4, 20, 180), "shifted": degrade.telecine(credits(4, 20, 180), "2:2", 1, "bff").clip}
    assert {name: fields.rolled(list(from_clip(clip)))[:2] for name, clip in clips.items()} == \
        {"progressive": ("progressive", ""), "shifted": ("shifted", "bff")}
    still = scene().take([0] * 4).timed(25)
    for other in (scene(), degrade.weave(scene()), degrade.telecine(credits(4, 20, 180), "2:3").clip, still):
        assert fields.rolled(list(from_clip(other))) is None


def test_mixed_pictures_are_unmixed():
    outcome, out, quality = repaired(degrade.blended(scene(), 30, 24)[0], scene())
    assert outcome.verdict == "blended" and outcome.edits[0].step == "deblend" and quality > 40


def test_each_segment_gets_its_own_repair():
    film_part, video = degrade.telecine(scene(), "2:3").clip, degrade.weave(scene(4))
    outcome = deinterlace(from_clip(after(film_part, video)))
    out = film.to_clip(outcome.film)
    assert outcome.verdict == "hybrid" and [edit.step for edit in outcome.edits] == ["telecine", "deinterlace"]
    assert abs(len(out.y) - (48 + 24)) <= 2 and (np.diff(out.at_s) > 0).all()
    assert [segment["verdict"] for segment in outcome.found["segments"]] == ["telecine", "tff"]


def test_the_gate_refuses_what_does_not_fit():
    pictures = list(from_clip(scene()))[:20]
    for verdict, order, pattern in (("tff", "tff", ""), ("bff", "bff", ""), ("shifted", "tff", "2:2")):
        assert _misfit(Segment(0, 20, verdict, 0.9, order, pattern), pictures) is not None
    woven = list(from_clip(degrade.weave(scene())))
    assert _misfit(Segment(0, 24, "tff", 0.9, "tff"), woven) is None
    assert _misfit(Segment(0, 24, "bff", 0.9, "bff"), woven) is not None


def test_a_refused_repair_leaves_the_film_and_says_so(monkeypatch):
    given = from_clip(scene())
    wrong = fields.Analysis("tff", 0.9, (Segment(0, 48, "tff", 0.9, "tff"),))
    monkeypatch.setattr(fields, "analyse", lambda film: wrong)
    outcome = deinterlace(given)
    assert outcome.film is given and not outcome.edits and "left alone" in outcome.notes[0]


@pytest.mark.parametrize("misfit", [0.1, 0.9])
def test_a_baked_comb_is_repaired_only_where_that_fits(monkeypatch, misfit):
    given = from_clip(scene())
    comb = baked.Found(3.0, 0.95, 0.75, 240, "tff", "bicubic", 0.0, left=0.1, misfit=misfit)
    monkeypatch.setattr(baked, "analyse", lambda film: comb)
    outcome = deinterlace(given)
    assert outcome.verdict == "baked_comb"
    assert (outcome.film is given, bool(outcome.edits), bool(outcome.notes)) == (not comb.fits, comb.fits, not comb.fits)


def test_unknown_options_are_refused():
    for options in ({"grade": "fastest"}, {"rate": "fields"}):
        with pytest.raises(ValueError, match="unknown; it is one of"):
            deinterlace(from_clip(scene()), **options)


def test_command_line(tmp_path):
    source, out, report = tmp_path / "in.mp4", tmp_path / "out.mp4", tmp_path / "r.json"
    film.write(source, from_clip(degrade.weave(scene())), crf=14)
    assert command([str(source), "--out", str(out), "--report", str(report), "--rate", "field"]) == 0
    told = json.loads(report.read_text())
    assert told["verdict"] == "tff" and told["edits"][0]["settings"]["rate"] == "field" and told["confidence"] > 0.6
    assert len(film.to_clip(film.read(out)).y) == 48
