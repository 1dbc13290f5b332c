"""Restoring: ghosts, dropouts, flicker and blocks are found, measured, undone and proved; a film without them stays the same."""

import argparse
import json
from functools import cache

import numpy as np
import pytest

from data_tools import degrade
from data_tools.film import Clip, Picture, from_clip, read, to_clip
from data_tools.measure import f1, psnr
from data_tools.repair import dropout, fill, ghost, smooth, wear
from data_tools.restore import restore
from data_tools.stage import main


@cache
def scene(seed: int = 2, frames: int = 48, height: int = 180, width: int = 320) -> Clip:
    return degrade.synth(seed, frames, height, width)


def deghosted(clip: Clip) -> tuple[ghost.Found | None, Clip]:
    film = from_clip(clip)
    for found in ghost.analyse(film):
        repaired = ghost.repair(film, found)
        if not ghost.prove(film, repaired, found):
            return found, to_clip(repaired)
    return None, clip


def watched(watch, clip: Clip):
    for plane in clip.y:
        watch.add(plane)
    return watch


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_trail_is_measured_and_taken_back(share):
    clip = scene()
    damaged = degrade.ghosted(clip, share)
    found, made = deghosted(damaged)
    assert found.kind == "trail" and abs(found.share - share) <= 0.03
    assert psnr(made.y, clip.y) >= psnr(damaged.y, clip.y) + 12
    assert psnr(made.u, clip.u) > psnr(damaged.u, clip.u)


def test_a_trail_under_compression_is_taken_back_as_well_as_with_the_true_share():
    clip = scene()
    damaged = degrade.coded(degrade.ghosted(clip, 0.5), 22)
    found, made = deghosted(damaged)
    exact = to_clip(ghost.repair(from_clip(damaged), ghost.Found("trail", 0.5)))
    assert abs(found.share - 0.5) <= 0.07
    before = psnr(damaged.y, clip.y)
    assert psnr(made.y, clip.y) - before >= 0.8 * (psnr(exact.y, clip.y) - before) > 2


def test_an_echo_is_told_from_a_trail():
    clip = scene()
    damaged = degrade.echoed(clip, 0.5)
    found, made = deghosted(damaged)
    assert found.kind == "echo" and abs(found.share - 0.5) <= 0.05
    assert psnr(made.y, clip.y) >= psnr(damaged.y, clip.y) + 12


def test_a_trail_that_changes_over_the_picture_is_followed():
    clip = scene(frames=60)
    share = np.broadcast_to(np.linspace(0.3, 0.6, clip.y.shape[2], dtype=np.float32), clip.y.shape[1:])
    damaged = degrade.ghosted(clip, share)
    found, made = deghosted(damaged)
    assert 0.1 < found.across < 0.4 and abs(found.share - 0.45) < 0.1
    assert psnr(made.y, clip.y) >= psnr(damaged.y, clip.y) + 6


def test_a_trail_of_the_luma_alone_leaves_chroma_alone():
    film = from_clip(degrade.ghosted(scene(0), 0.5, chroma=False))
    assert not ghost.in_chroma(film, ghost.Found("trail", 0.5))
    assert ghost.in_chroma(from_clip(degrade.ghosted(scene(0), 0.5)), ghost.Found("trail", 0.5))
    kept = to_clip(ghost.repair(film, ghost.Found("trail", 0.5, chroma=False)))
    assert np.array_equal(kept.u, scene(0).u)


def test_a_share_that_does_not_fit_is_refused():
    film = from_clip(scene())
    wrong = ghost.Found("trail", 0.4)
    assert ghost.prove(film, ghost.repair(film, wrong), wrong)
    damaged = from_clip(degrade.ghosted(scene(), 0.3))
    much = ghost.Found("trail", 0.6)
    assert ghost.prove(damaged, ghost.repair(damaged, much), much)


@pytest.mark.parametrize("across", [False, True])
def test_a_trail_is_followed_across_a_cut_only_if_it_goes_across(across):
    one, two = scene(2, 12), scene(7, 12)
    joined = Clip(*(np.concatenate([a, b]) for a, b in zip(one, two, strict=True))).timed(25)
    parts = [degrade.ghosted(one, 0.4), degrade.ghosted(two, 0.4)]
    edited = Clip(*(np.concatenate([a, b]) for a, b in zip(*parts, strict=True))).timed(25)
    damaged = degrade.ghosted(joined, 0.4) if across else edited
    made = to_clip(ghost.repair(from_clip(damaged), ghost.Found("trail", 0.4)))
    assert psnr(made.y[12:], joined.y[12:]) > 45


def panned(clip: Clip) -> Clip:
    def moved(planes):
        step = 4 * planes.shape[2] // clip.y.shape[2]
        return np.stack([np.roll(planes[0], step * i, 1) for i in range(len(planes))])

    return clip.each(moved)


def faded(clip: Clip) -> Clip:
    gain = np.clip(1.2 - np.arange(len(clip.y)) / 30, 0, 1)[:, None, None]
    return clip._replace(y=np.rint(16 + (clip.y - 16.0) * gain).astype(np.uint8))


@pytest.mark.parametrize("make", [lambda clip: clip, panned, faded, lambda clip: degrade.coded(clip, 28),
                                  lambda clip: degrade.blended(clip, 30, 24)[0], lambda clip: degrade.weave(clip)],
                         ids=["moving", "panning", "fading", "coded", "blended", "woven"])
def test_what_has_no_such_damage_shows_none(make):
    clip = make(scene(5))
    assert deghosted(clip)[0] is None
    assert not watched(dropout.Watch(), clip).found()
    assert watched(smooth.FlickerWatch(), clip).found() is None
    assert watched(smooth.BlockWatch(), clip).found() is None
    assert watched(smooth.NoiseWatch(), clip).found() is None
    assert not watched(wear.ScratchWatch(), clip).found() and not watched(wear.FootWatch(), clip).found()


@pytest.mark.parametrize("seed", [1, 4])
def test_dropouts_are_found_and_only_they_are_filled(seed):
    clip = scene(seed, 24)
    damaged, lost = degrade.dropouts(clip, seed)
    made = list(dropout.mended(iter(from_clip(damaged))))
    mask = np.stack([np.zeros(lost.shape[1:], bool) if each.mask is None else each.mask for each in made])
    filled = to_clip(each.picture for each in made)
    assert watched(dropout.Watch(), damaged).found()
    assert f1(mask, lost) >= 0.9
    assert np.array_equal(filled.y[~mask], damaged.y[~mask])
    assert psnr(filled.y, clip.y, lost) >= psnr(damaged.y, clip.y, lost) + 12
    assert psnr(filled.y, clip.y, ~lost) >= 50


def test_lines_held_instead_of_lost_ones_are_found_and_filled():
    clip = scene(1, 20)
    damaged, lost = degrade.dropouts(clip, 1, held=True)
    made = list(dropout.mended(iter(from_clip(damaged))))
    mask = np.stack([np.zeros(lost.shape[1:], bool) if each.mask is None else each.mask for each in made])
    filled = to_clip(each.picture for each in made)
    assert watched(dropout.Watch(), damaged).found()
    assert (mask & lost).sum() >= 0.9 * mask.sum() > 0.2 * lost.sum()
    assert psnr(filled.y, clip.y, lost) >= psnr(damaged.y, clip.y, lost) + 1


def test_dropouts_are_filled_as_the_film_passes():
    taken = []

    def pictures():
        for i in range(20):
            taken.append(i)
            yield Picture(np.full((64, 80), 90, np.uint8), *(np.full((32, 40), 128, np.uint8) for _ in range(2)), i / 25)

    for count, each in enumerate(dropout.mended(pictures())):
        assert each.mask is None and len(taken) <= count + 3
    assert count == 19
    assert len(list(dropout.mended(iter(from_clip(scene().take([0, 1])))))) == 2


def test_scratches_that_wander_are_filled_and_still_lines_are_not():
    clip = scene()
    damaged, _ = degrade.scratched(clip, 1, dust=0)
    scratches = watched(wear.ScratchWatch(), damaged).found()
    made = to_clip(wear.unscratched(from_clip(damaged), scratches))
    assert len(scratches) == 2 and psnr(made.y, clip.y) > psnr(damaged.y, clip.y) + 10
    still = clip._replace(y=clip.y.copy())
    still.y[:, :, 100:102] = 225
    assert not watched(wear.ScratchWatch(), still).found()


def test_lost_colour_comes_from_the_pictures_around():
    clip = scene(1)
    damaged, lost = degrade.discoloured(clip, 2, 0.15)
    watch = wear.ColourWatch()
    for picture in from_clip(damaged):
        watch.add(picture)
    made = to_clip(wear.coloured(from_clip(damaged), watch.found()))
    mask = np.broadcast_to(lost[:, :, None], clip.u.shape)
    assert watch.found() == np.flatnonzero(lost.any(1)).tolist()
    assert psnr(made.u, clip.u, mask) > psnr(damaged.u, clip.u, mask) + 10
    assert np.array_equal(made.u[~mask], clip.u[~mask]) and np.array_equal(made.y, clip.y)
    assert restore(from_clip(damaged)).verdict == "colour"


def greyed(clip: Clip) -> Clip:
    return clip._replace(u=clip.u // 64 + 127, v=clip.v // 64 + 127)


def with_a_grey_shot(clip: Clip) -> Clip:
    parts = clip.take(slice(0, 20)), greyed(scene(7)).take(slice(0, 2)), clip.take(slice(20, 40))
    return Clip(*(np.concatenate(planes) for planes in zip(*parts, strict=True))).timed(25)


@pytest.mark.parametrize("make", [lambda clip: clip, greyed, with_a_grey_shot], ids=["coloured", "grey", "a grey shot"])
def test_colour_that_was_never_there_is_not_lost(make):
    watch = wear.ColourWatch()
    for picture in from_clip(make(scene(1))):
        watch.add(picture)
    assert not watch.found()


def test_a_torn_foot_is_cut_off_to_an_even_number_of_lines():
    clip = scene()
    damaged, lines = degrade.head_switch(clip, 1, 7)
    assert watched(wear.FootWatch(), damaged).found() == lines
    film = wear.footless(from_clip(damaged), lines)
    made = to_clip(film)
    assert film.kind.height == 172 and made.u.shape[1:] == (86, 160)
    assert np.array_equal(made.y, clip.y[:, :172])
    letters = clip._replace(y=clip.y.copy())
    letters.y[:, -6:] = damaged.y[0, -6:]  # as rough, but they stay
    assert not watched(wear.FootWatch(), letters).found()


def test_flicker_is_taken_out_and_fades_are_not():
    clip = scene()
    damaged, gains = degrade.flicker(clip, 3, 0.06)
    flicker = watched(smooth.FlickerWatch(), damaged).found()
    made = to_clip(smooth.steadied(from_clip(damaged), flicker))
    rest = np.log(gains) - flicker.log_gain
    assert np.square(np.diff(np.log(gains))).sum() >= 5 * np.square(np.diff(rest)).sum()
    assert psnr(made.y, clip.y) > psnr(damaged.y, clip.y) + 3


def test_edges_of_blocks_are_softened():
    clip = scene()
    damaged = degrade.coded(clip, codec="mpeg2video", bit_rate=150_000)
    blocks = watched(smooth.BlockWatch(2), damaged).found()
    made = to_clip(smooth.deblocked(from_clip(damaged), blocks))
    assert (blocks.column, blocks.line) == (0, 0)
    assert watched(smooth.BlockWatch(2), made).measured().score < blocks.score - 0.1
    assert psnr(made.y, clip.y) >= psnr(damaged.y, clip.y)


def noisy(clip: Clip, level: float) -> Clip:
    return degrade.tape(clip, 3, noise=level, chroma_noise=0, chroma_shift=0, jitter=0)


def test_noise_is_averaged_away_and_nothing_else():
    clip = scene(2, 18)
    damaged = noisy(clip, 8)
    noise = watched(smooth.NoiseWatch(), damaged).found()
    film = smooth.denoised(from_clip(damaged), noise)
    assert abs(noise.level - 8) < 1 and not smooth.prove_noise(from_clip(damaged), film, noise)
    assert psnr(to_clip(film).y, clip.y) > psnr(damaged.y, clip.y) + 3
    assert np.array_equal(to_clip(film).u, damaged.u)
    blurred = damaged._replace(y=np.stack([damaged.y[0], *((damaged.y[1:].astype(int) + damaged.y[:-1]) // 2)]).astype(np.uint8))
    assert smooth.prove_noise(from_clip(damaged), from_clip(blurred), noise)


@pytest.mark.parametrize("make", [lambda clip: noisy(clip, 3), lambda clip: degrade.coded(noisy(clip, 8), 23),
                                  lambda clip: degrade.coded(clip, 30)], ids=["grain", "coded noise", "coded"])
def test_little_noise_and_what_a_codec_made_of_it_stay(make):
    assert watched(smooth.NoiseWatch(), make(scene(2, 18))).found() is None


def test_the_stage_undoes_what_came_one_upon_the_other():
    clip = scene(2, 30, 120, 192)
    damaged = degrade.dropouts(degrade.flicker(degrade.ghosted(clip, 0.4), 2, 0.06)[0], 3)[0]
    outcome = restore(from_clip(damaged))
    assert outcome.verdict == "dropouts+flicker+ghost" and 0 < outcome.confidence <= 1
    assert [edit.step for edit in outcome.edits] == ["dropouts", "flicker", "ghost"]
    assert psnr(to_clip(outcome.film).y, clip.y) > psnr(damaged.y, clip.y) + 6
    json.dumps(outcome.report(), default=float)


def test_the_stage_gives_back_the_very_film_that_has_nothing():
    film = from_clip(scene(5))
    outcome = restore(film)
    assert outcome.film is film and outcome.verdict == "nothing" and not outcome.edits


def test_the_command_writes_film_and_report(tmp_path):
    source, out, report = tmp_path / "in.mkv", tmp_path / "out.mp4", tmp_path / "report.json"
    with open(source, "wb") as file:
        degrade.encode(degrade.ghosted(scene(), 0.5), file, crf=12)
    argv = [str(source), "--out", str(out), "--report", str(report)]
    assert main(restore, argparse.ArgumentParser(), argv) == 0
    told, first = json.loads(report.read_text()), out.read_bytes()
    assert told["verdict"] == "ghost" and abs(told["edits"][0]["settings"]["share"] - 0.5) <= 0.05
    assert len(to_clip(read(out)).y) == 48
    assert main(restore, argparse.ArgumentParser(), argv) == 0 and out.read_bytes() == first


def test_dropouts_of_a_deinterlaced_film_are_looked_for_on_the_lines_that_were_shot():
    damaged, _ = degrade.dropouts(degrade.weave(degrade.synth(3, 40, 120, 160, rate=50)), 3)
    bobbed = from_clip(damaged).through(lambda pictures: fill.deinterlace(pictures, "tff", "frame", "fast"))
    outcome = restore(bobbed, (0,))
    assert outcome.verdict == "dropouts"
    for picture in bobbed:
        assert not dropout.Plane(picture.y, 0).odd[1::2].any()
