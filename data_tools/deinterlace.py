"""Interlace, pulldown, shifted fields, mixed pictures and baked combs taken out of a film: a picture for each moment shot.

    python -m data_tools.deinterlace IN.mp4 --out OUT.mp4 --report R.json [--grade fast|fine|best] [--rate frame|field]

What fields.analyse says of each segment decides what is done with it:

    tff, bff     the missing lines of each field are filled (fill), in the asked-for grade, at frame or at field rate
    telecine     inverse telecine (telecine): the pictures of the film, at the film's rate
    shifted      each top field is woven with the bottom field that belongs to it, a picture earlier or later
    hybrid       inverse telecine, and what stays combed, like a title that moves with the fields, is filled
    progressive  nothing; unless the whole film is: then mixed pictures (blend) and a baked comb (baked) are looked for and undone

Each is tried on the liveliest stretch of its segment first. What does not explain the input better than that the film is
progressive is not done, and a note says so.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from functools import partial

import cv2
import numpy as np

from data_tools.film import Film, Picture
from data_tools.repair import baked, blend, fields, fill, telecine
from data_tools.repair.fields import SAMPLE, Segment
from data_tools.stage import Edit, Outcome, main

FILM_RATES = {"2:3": Fraction(4, 5), "2:3:3:2": Fraction(4, 5), "euro": Fraction(24, 25)}  # pictures of film a picture
STEADIER = 0.99  # the gate of fields: of how far pictures are apart in the other order, at most so much in the claimed one
FITS = 0.5  # the gate of inverse telecine: least share of pictures that telecining again gives back
MIXED = 0.5  # the gate of mixed pictures: of the error of the nearest true picture, at most so much when mixed again


def deinterlace(film: Film, grade: str = "fast", rate: str = "frame") -> Outcome:
    """The film without its interlace; the very same film where there is none, or no repair fits.

    grade: fast, fine or best; rate: frame or field, of what was shot interlaced (see fill). The verdict is progressive, tff, bff,
    telecine, shifted, blended, baked_comb or hybrid; `found` has the segments. Raises ValueError for an unknown option.
    """
    for name, value, known in (("grade", grade, fill.GRADES), ("rate", rate, fill.RATES)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown; it is one of {', '.join(known)}")
    analysis = fields.analyse(film)
    tried = {}
    for segment, sample in _samples(film, [segment for segment in analysis.segments if _doubtful(segment)]):
        settled = fields.settled(segment, sample)
        tried[segment.first] = settled, _misfit(settled, sample) if _doubtful(settled) else None
    if tried:
        analysis = fields.summed([tried.get(segment.first, (segment,))[0] for segment in analysis.segments])
    doubtful = [segment for segment in analysis.segments if _doubtful(segment)]
    found = {"segments": [asdict(segment) for segment in analysis.segments]}
    if not doubtful:
        return _of_whole_pictures(film, rate, Outcome(film, "progressive", analysis.confidence, found=found), analysis)
    outcome = Outcome(film, analysis.verdict, analysis.confidence, found=found)
    fitting = set()
    for segment in doubtful:
        why = tried[segment.first][1]
        if why is None:
            fitting.add(segment.first)
            outcome.edits.append(_edit(segment, grade, rate))
        else:
            outcome.notes.append(f"pictures {segment.first} to {segment.last - 1} look {segment.verdict} but are left alone: {why}")
    if fitting:
        segments = analysis.segments
        scale = _rate_of(segments[0], rate) if len(segments) == 1 else 1
        outcome.film = film.through(partial(_repaired, segments=segments, fitting=fitting, grade=grade, rate=rate),
                                    rate=film.kind.rate * scale)
    return outcome


def _doubtful(segment: Segment) -> bool:
    """Whether a segment's fields may not belong together as they are."""
    return segment.kind not in ("progressive", "unknown")


def _of_whole_pictures(film: Film, rate: str, outcome: Outcome, analysis: fields.Analysis) -> Outcome:
    """What is done for films without fields: pictures that were mixed, or woven and then rescaled."""
    mixed = blend.analyse(film)
    if mixed is not None:
        outcome.verdict, outcome.confidence, outcome.found["blend"] = "blended", mixed.confidence, asdict(mixed)
        again, nearest = blend.check(film, mixed)
        if again <= MIXED * nearest:
            outcome.film = blend.repair(film, mixed)
            outcome.edits.append(Edit("deblend", asdict(mixed), mixed.confidence))
        else:
            outcome.notes.append(f"the unmixed pictures, mixed again, miss the input: error {again:.2f} beside {nearest:.2f}")
        return outcome
    comb = baked.analyse(film)
    if comb is not None:
        longest = max(analysis.segments, key=lambda segment: segment.last - segment.first)
        if fields.rolled(next(_samples(film, [longest]))[1]) is not None:  # lines that repeat look like a comb when they roll
            return outcome
        outcome.verdict, outcome.confidence, outcome.found["baked"] = "baked_comb", comb.confidence, asdict(comb)
        if comb.fits:
            outcome.film = baked.repair(film, comb, rate)
            outcome.edits.append(Edit("baked", asdict(comb) | {"rate": rate}, comb.confidence))
        else:
            outcome.notes.append(f"the fields, woven and rescaled again, miss the input by {comb.misfit:.0%} of the change, "
                                 f"and {comb.left:.0%} of the comb would be left")
    return outcome


def _edit(segment: Segment, grade: str, rate: str) -> Edit:
    settings = {"first": segment.first, "last": segment.last, "order": segment.order}
    if segment.kind == "interlaced":
        return Edit("deinterlace", settings | {"grade": grade, "rate": rate}, segment.confidence)
    if segment.verdict == "shifted":
        return Edit("reweave", settings, segment.confidence)
    return Edit("telecine", settings | {"pattern": segment.pattern, "grade": grade}, segment.confidence)


def _rate_of(segment: Segment, rate: str) -> Fraction:
    """Pictures out for a picture in."""
    if segment.kind == "interlaced":
        return Fraction(2 if rate == "field" else 1)
    return FILM_RATES.get(segment.pattern, Fraction(1))


# The repair

def _repaired(pictures: Iterator[Picture], segments: list[Segment], fitting: set[int], grade: str, rate: str) -> Iterator[Picture]:
    """Each segment whose first picture is in `fitting` through its own repair, the others as they are. Times rise strictly."""
    last = -np.inf
    for segment in segments:
        part = itertools.islice(pictures, segment.last - segment.first)
        for picture in _undone(part, segment, grade, rate) if segment.first in fitting else part:
            if picture.at_s > last:
                last = picture.at_s
                yield picture


def _undone(pictures: Iterator[Picture], segment: Segment, grade: str, rate: str) -> Iterator[Picture]:
    """The pictures of one segment without what was found in it."""
    if segment.kind == "interlaced":
        return fill.deinterlace(pictures, segment.order, rate, grade)
    if segment.verdict == "shifted":
        return rewoven(pictures, segment.order)
    return telecine.inverse(pictures, segment.order, partial(_filled, grade=grade), segment.pattern or "2:2")


def _filled(pictures: Iterator[Picture], order: str, rate: str, grade: str) -> Iterator[Picture]:
    return fill.deinterlace(pictures, order, rate, grade)


def rewoven(pictures: Iterator[Picture], order: str) -> Iterator[Picture]:
    """Film whose fields are a picture apart, put together: one picture less, each at the time of the one with its first field."""
    first = 0 if order == "tff" else 1  # of a picture that is shown: its first lines belong to the picture before
    for before, picture in itertools.pairwise(pictures):
        planes = [plane.copy() for plane in before[:3]]
        for plane, lines in zip(planes, picture[:3], strict=True):
            plane[first::2] = lines[first::2]
        yield Picture(*planes, before.at_s)


# The gate

def _samples(film: Film, segments: list[Segment]) -> Iterator[tuple[Segment, list[Picture]]]:
    """Each segment with the pictures of its liveliest stretch, at most SAMPLE."""
    pictures, number = iter(film), 0
    for segment in segments:
        last = min(segment.lively + SAMPLE, segment.last)
        sample = list(itertools.islice(pictures, segment.lively - number, last - number))
        number = last
        yield segment, sample


def _misfit(segment: Segment, sample: list[Picture]) -> str | None:
    """Why the hypothesis does not explain a sample better than that it is progressive; None when it does."""
    if len(sample) < 2:
        return "there are too few pictures to try it on"
    if segment.kind == "interlaced":
        steady, unsteady = (_unsteadiness(sample, order) for order in (segment.order, *({"tff", "bff"} - {segment.order})))
        return None if steady <= STEADIER * unsteady else \
            f"its fields move no more steadily in this order ({steady:.2f} levels from picture to picture, else {unsteady:.2f})"
    if segment.verdict == "shifted":
        combs, woven = _combs(sample), _combs(list(rewoven(iter(sample), segment.order)))
        return None if woven < combs else f"fields a picture apart fit no better, {woven:.2f} levels than as they are, {combs:.2f}"
    tally = telecine.Tally()
    for _ in telecine.inverse(iter(sample), segment.order, None, segment.pattern or "2:2", tally):
        pass
    fits = tally.fits if segment.verdict == "telecine" else 1 - tally.unlike / max(tally.pictures, 1)
    return None if fits >= FITS else f"telecined again, only {fits:.0%} of the pictures would be as they are"


def _unsteadiness(sample: list[Picture], order: str) -> float:
    """How far the second field of a picture lies from the first one of the next, both filled, where anything moves; levels.

    Fields in their true order move by the same step all the time; in the wrong one every other step goes back, and the next is
    three times as wide. Fields of one moment show no difference between the orders.
    """
    shown = [picture.y for picture in fill.deinterlace(iter(sample), order, "field")]
    steps = [cv2.absdiff(shown[k], shown[k + 1]) for k in range(1, len(shown) - 1, 2)]
    moving = [cv2.absdiff(a.y, b.y) > 12 for a, b in itertools.pairwise(sample)]
    return float(sum(step[where].sum(dtype=np.int64) for step, where in zip(steps, moving, strict=True))
                 / max(sum(int(where.sum()) for where in moving), 1))


def _combs(pictures: list[Picture]) -> float:
    """How far neighbouring lines lie from the means of those around them, levels."""
    return float(np.mean([cv2.absdiff(cv2.addWeighted(y[:-2], 0.5, y[2:], 0.5, 0), y[1:-1]).mean() for y, *_ in pictures]))


def command(argv: list[str] | None = None) -> int:
    """The command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grade", choices=fill.GRADES, default="fast", help="of the filled lines: see data_tools.repair.fill")
    parser.add_argument("--rate", choices=fill.RATES, default="frame", help="of interlaced film: a picture a frame or a field")
    return main(deinterlace, parser, argv)


if __name__ == "__main__":
    sys.exit(command())
