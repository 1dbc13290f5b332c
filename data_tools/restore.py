"""Restores what was done to a film: repeats, ghosts, dropouts, lost colour, scratches, a torn foot, flicker, blocks, noise.

    python -m data_tools.restore IN.mp4 --out OUT.mp4 --report R.json

In that order, each looked for in what the one before left. Every repair has to prove itself: a ghost laid over the repaired film
must give the film back, what is taken away as noise must be noise alone, and no repaired film may show what was repaired again;
else the film stays as it was and a note says why. Jumps, places where pictures are missing, are reported and left.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np

from data_tools.film import Film, Picture
from data_tools.repair import dropout, ghost, smooth, timing, wear
from data_tools.stage import Edit, Outcome, main

SURE, FEWEST, HABIT = 2.0, 4, 0.04  # log odds of a sure repeat; how many, and which share, are not held drawings or chance
LEFT = 0.25  # most of the lost parts, or of the flicker, that a repair may leave
STILL_BLOCKY = 0.6  # most of the blocks' excess that may be left


class Look:
    """What one passage through a film shows of all damages."""

    def __init__(self, shot: tuple[int, ...] = ()):
        self.ghosts, self.losses = ghost.Watch(), dropout.Watch(shot)
        self.scratches, self.foot, self.colour = wear.ScratchWatch(), wear.FootWatch(), wear.ColourWatch()
        self.gains, self.blocks, self.noise = smooth.FlickerWatch(), smooth.BlockWatch(), smooth.NoiseWatch()

    def again(self, film: Film) -> "Look":
        """What a passage through another state of the film shows."""
        look = Look(self.losses.shot)
        for _ in look.beside(iter(film)):
            pass
        return look

    def beside(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        """The same pictures, looked at as they pass."""
        for picture in pictures:
            for watch in vars(self).values():
                watch.add(picture if watch is self.colour else picture.y)
            yield picture

    def trace(self) -> dict:
        """The measurements, for the report."""
        blocks, noise = self.blocks.measured(), self.noise.measured()
        return {"ghost": self.ghosts.trace(), "dropouts": self.losses.trace(), "blockiness": blocks and round(blocks.score, 3),
                "noise": noise and asdict(noise)}


def restore(film: Film, shot: tuple[int, ...] = ()) -> Outcome:
    """The film without what was done to it; the very same film when it has no such damage, or no repair fits.

    shot: which lines of a de-interlaced film were shot, as in dropout.Watch. The verdict names the repaired damages, joined by "+",
    in the order of repair, or is "nothing".
    """
    outcome, look = Outcome(film, "nothing", 1.0), Look(shot)
    times = timing.analyse(film.through(look.beside))
    outcome.found = look.trace() | {"repeats": int(times.duplicate.sum()),
                                    "jumps": [round(jump.at_s, 3) for jump in times.jumps]}
    if times.jumps:
        outcome.notes.append(f"pictures seem to be missing at {len(times.jumps)} places; they are left")
    sure = int((times.score > SURE).sum())
    if times.duplicate.any() and sure < max(FEWEST, HABIT * len(times.score)):
        outcome.notes.append(f"{int(times.duplicate.sum())} pictures look like repeats; so few are left")
    elif times.duplicate.any():
        score = np.abs(times.score[times.duplicate])
        _accept(outcome, timing.repair(film, times), "repeats", {"left out": int(times.duplicate.sum())},
                float(np.mean(1 / (1 + np.exp(-score)))))
        look = Look().again(outcome.film)  # pictures are missing now: whose lines were shot is no longer known
    for step in (_deghost, _fill, _colour, _unscratch, _cut, _steady, _deghost, _deblock, _denoise):  # a ghost may be hidden
        look = step(outcome, look)
    outcome.verdict = "+".join(edit.step for edit in outcome.edits) or "nothing"
    if outcome.edits:
        outcome.confidence = min(edit.confidence for edit in outcome.edits)
    return outcome


def _accept(outcome: Outcome, film: Film, step: str, settings: dict, confidence: float) -> None:
    outcome.film = film
    outcome.edits.append(Edit(step, settings, round(confidence, 4)))


def _deghost(outcome: Outcome, look: Look) -> Look:
    if any(edit.step == "ghost" for edit in outcome.edits):
        return look
    for found in look.ghosts.found():
        why = ghost.prove(outcome.film, ghost.repair(outcome.film, found), found)
        if not why:
            found = replace(found, chroma=ghost.in_chroma(outcome.film, found))
            repaired = ghost.repair(outcome.film, found)
            _accept(outcome, repaired, "ghost", asdict(found), found.confidence)
            return look.again(repaired)
        outcome.notes.append(f"it looks like a ghost ({found.kind} of {found.share:.2f}) but is left alone: {why}")
    return look


def _fill(outcome: Outcome, look: Look) -> Look:
    if not look.losses.found():
        return look
    repaired = dropout.repair(outcome.film, look.losses.shot)
    after = look.again(repaired)
    if after.losses.parts > LEFT * look.losses.parts:
        outcome.notes.append(f"{look.losses.parts} parts of lines look lost but are left: filling them leaves {after.losses.parts}")
        return look
    confidence = 1 - after.losses.parts / look.losses.parts
    _accept(outcome, repaired, "dropouts", {"pictures": look.losses.damaged, "parts": look.losses.parts}, confidence)
    return after


def _colour(outcome: Outcome, look: Look) -> Look:
    grey = look.colour.found()
    if not grey:
        return look
    repaired = wear.coloured(outcome.film, grey)
    after = look.again(repaired)
    if after.colour.found():
        outcome.notes.append(f"{len(grey)} pictures seem to have lost colour but are left: filling does not end it")
        return look
    _accept(outcome, repaired, "colour", {"pictures": grey}, 0.9)
    return after


def _unscratch(outcome: Outcome, look: Look) -> Look:
    scratches = look.scratches.found()
    if not scratches:
        return look
    repaired = wear.unscratched(outcome.film, scratches)
    after = look.again(repaired)
    if after.scratches.found():
        outcome.notes.append(f"{len(scratches)} scratches are left alone: filling them leaves {len(after.scratches.found())}")
        return look
    _accept(outcome, repaired, "scratches", {"columns": [list(scratch.columns.items()) for scratch in scratches]}, 0.9)
    return after


def _cut(outcome: Outcome, look: Look) -> Look:
    lines = look.foot.found()
    if not lines:
        return look
    _accept(outcome, wear.footless(outcome.film, lines), "foot", {"lines": lines + lines % 2}, 0.9)
    return look.again(outcome.film)


def _steady(outcome: Outcome, look: Look) -> Look:
    flicker = look.gains.found()
    if flicker is None:
        return look
    repaired = smooth.steadied(outcome.film, flicker)
    after = look.again(repaired)
    rest, before = (float(np.square(np.diff(gains.fast())).sum()) for gains in (after.gains, look.gains))
    if rest > LEFT * before:
        outcome.notes.append(f"it looks like flicker but is left alone: taking the gains out leaves {rest / before:.0%} of it")
        return look
    _accept(outcome, repaired, "flicker", {"log_gain": [round(float(gain), 4) for gain in flicker.log_gain]}, flicker.confidence)
    return after


def _deblock(outcome: Outcome, look: Look) -> Look:
    blocks = look.blocks.found()
    if blocks is None:
        return look
    repaired = smooth.deblocked(outcome.film, blocks)
    after = smooth.BlockWatch()
    for picture in repaired:
        after.add(picture.y)
    left = (after.measured().score - 1) / (blocks.score - 1)
    if left > STILL_BLOCKY:
        outcome.notes.append(f"it looks blocky ({blocks.score:.2f}) but is left alone: softening leaves {left:.0%} of it")
        return look
    _accept(outcome, repaired, "blocks", asdict(blocks), 1 - 0.5 * left)
    return look


def _denoise(outcome: Outcome, look: Look) -> Look:
    noise = look.noise.found()
    if noise is None:
        return look
    repaired = smooth.denoised(outcome.film, noise)
    why = smooth.prove_noise(outcome.film, repaired, noise)
    if why:
        outcome.notes.append(f"it looks noisy ({noise.level:.1f} levels) but is left alone: {why}")
    else:
        _accept(outcome, repaired, "noise", asdict(noise), 0.9)
    return look


if __name__ == "__main__":
    sys.exit(main(restore, argparse.ArgumentParser(description="Undo what tapes, recorders and codecs did to a film")))
