"""Tickers: bands of text that run at a constant velocity, cut in half by a weave or doubled by a rate conversion, drawn anew.

    python -m data_tools.ticker IN.mp4 --out OUT.mp4 --report R.json

Every picture shows one strip at another place: picture n of a film that mixes the two nearest of its source shows
(1 - s) S(x + v k) + s S(x + v (k + 1)), k and s being the whole and the fraction of n * ratio + phase. From picture to picture such
text seems to jump by the distance of its ghosts, so the velocity is sought where correlations over many distances in time agree,
and ratio and phase by how sharp the pictures are in turn. The strip is the least-squares solution over all pictures (multi-frame
super-resolution by conjugate gradients), and what it would look like under that law has to be what the film shows; only then
is the band drawn again, unmixed. It works on runs of pictures, so a ticker may start, stop and change its speed.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.film import Film, Picture
from data_tools.stage import Edit, Outcome, main

GROUP = 4  # lines that the search for a band looks at together
LOOK, EVERY = 16, 96  # pictures in a row that it looks at, and from one look to the next
BANDS = 3  # that are tried
LAGS = (1, 2, 3, 4, 5, 6, 10, 12)  # pictures apart; cycles of usual conversions are among them
FASTEST = 40.0  # pixels a picture
RUN, MARGIN = 128, 16  # pictures that share one strip, and those before and after that only help to make it
SHORT = 48  # pictures of a run on which laws are tried
RATIOS = (4 / 5, 5 / 6, 24 / 25, 2 / 5, 1 / 2, 6 / 5, 25 / 24, 2 / 3, 5 / 4)  # source pictures a picture, of usual conversions
STEADY = 0.3  # how well the worst third of a band's width has to fit itself before any law is tried
FITS = 0.94  # share of the band's variance that a law has to explain
LEAST, WHOLE = 0.4, 0.97  # below and above these shares of a plain law no other one is tried
ALIEN = 60.0  # squared levels: lines that the law misses by more belong to the scene
BETTER = 0.5  # of the unexplained variance that a mixing law may leave, against a plain one


class Band(NamedTuple):
    """Lines top .. bottom - 1 of luma, whose text moves to the left by `speed` pixels a picture."""

    top: int
    bottom: int
    speed: float


class Law(NamedTuple):
    """How a run of pictures shows its strip."""

    name: str  # clean, blended, or woven tff / bff
    speed: float  # pixels a picture, to the left
    ratio: float = 1.0  # source pictures a picture
    phase: float = 0.0  # of the run's first picture, in source pictures
    explained: float = 0.0  # share of variance


def ticker(film: Film) -> Outcome:
    """Draws a woven or blended ticker anew. Verdict: `nothing to do`, `blended ticker` or `woven ticker`."""
    bands = find(film)
    if not bands:
        return Outcome(film, "nothing to do", 1.0)
    for band in bands:
        laws = [_law(run.planes[0], band, run.last - run.first) for run in _runs(film, band)]
        if any(laws):
            break
    place = {"top": band.top, "bottom": band.bottom, "speed": round(band.speed, 3),
             "laws": [law._asdict() if law else None for law in laws]}
    damaged = [law for law in laws if law and law.name != "clean"]
    if not damaged:
        known = any(laws)
        note = "is whole" if known else "fits no law of ours; it stays as it was"
        return Outcome(film, "nothing to do", 1.0 if known else 0.5, found=place,
                       notes=[f"text that runs at lines {band.top} to {band.bottom} {note}"])
    notes = [f"run {i} of {RUN} pictures fits no law of a ticker; it stays as it was" for i, law in enumerate(laws) if law is None]
    confidence = float(np.mean([law.explained for law in damaged]))
    fixed = Film(film.kind, lambda: _redrawn(film, band, laws), film.problems)
    settings = {"top": band.top, "bottom": band.bottom, "laws": place["laws"]}
    verdict = "blended ticker" if damaged[0].name == "blended" else "woven ticker"
    return Outcome(fixed, verdict, confidence, [Edit("ticker", settings, confidence)], notes, place)


# The band

def find(film: Film) -> list[Band]:
    """Bands of lines that run sideways at one velocity while most others do not, the likeliest of at most BANDS first.

    Looks at 1 picture in 6.
    """
    if film.kind.height < 2 * GROUP:
        return []
    held, seen = [], []
    for i, picture in enumerate(film):
        if i % EVERY >= LOOK:
            continue
        held.append(_grouped(picture.y))
        if len(held) == LOOK:
            seen = sorted(seen + _bands(np.stack(held)), key=lambda pair: -pair[0])
            apart = []
            for strength, band in seen:
                if all(band.top >= other.bottom or band.bottom <= other.top for _, other in apart):
                    apart.append((strength, band))
            held, seen = [], apart[:BANDS]
    return [band for _, band in seen]


def _grouped(y: np.ndarray) -> np.ndarray:
    """Differences along means of GROUP lines: float32 [h/4 w]; soft, so that a ghost lies near enough to its text."""
    h, w = y.shape
    small = cv2.resize(y[:h // GROUP * GROUP], (w, h // GROUP), interpolation=cv2.INTER_AREA).astype(np.float32)
    return cv2.Sobel(cv2.blur(small, (5, 1)), cv2.CV_32F, 1, 0, ksize=1)


def _bands(lines: np.ndarray) -> list[tuple[float, Band]]:
    """What may be tickers in the grouped lines [f g w] of a look, and how well each fits itself, 0 to 1."""
    f, g, w = lines.shape
    speeds = np.arange(-FASTEST, FASTEST + 0.1, 0.25)
    speeds = speeds[np.abs(speeds) * 4 < 0.45 * w]
    score = _agreement(lines, speeds, LAGS, best=0.5)
    energy = np.square(lines).mean((0, 2))
    moving = np.abs(speeds) >= 0.75
    still = score[:, ~moving].max(1)
    chosen = np.argmax(np.where(moving, score, -1), 1)
    strong = (score[np.arange(g), chosen] > 0.4) & (score[np.arange(g), chosen] > 1.25 * still) & (energy > 4)
    out = []
    for k in np.unique(chosen[strong]):
        member = strong & (np.abs(speeds[chosen] - speeds[k]) <= 0.5)
        run = _longest(member)
        if run is None or member.sum() > 0.3 * g:  # a band, not a pan of the camera
            continue
        first, last = run
        if 3 <= last - first <= 0.25 * g:
            band = Band(max(first - 1, 0) * GROUP, min(last + 1, g) * GROUP, float(speeds[k]))
            out.append((_throughout(lines[:, first:last], speeds[k:k + 1]), band))
    return [(strength, band) for strength, band in out if strength > STEADY]


def _throughout(lines: np.ndarray, speed: np.ndarray) -> float:
    """How well lines [f g w] fit themselves at a speed [1] in the worst third of the width that shows anything."""
    thirds = [np.ascontiguousarray(part) for part in np.array_split(lines, 3, axis=2) if np.square(part).mean() > 4]
    thirds = [part for part in thirds if abs(speed[0]) * 2 < 0.6 * part.shape[2]]
    return min((float(_agreement(part, speed, LAGS, best=0.5).mean()) for part in thirds), default=0.0)


def _agreement(lines: np.ndarray, speeds: np.ndarray, lags, best: float = 1.0) -> np.ndarray:
    """How well lines [f g w] fit themselves over distances in time, moved at each speed: [g speeds], 1 is perfectly.

    best: share of the distances that counts, the better ones: there pictures are mixed alike.
    """
    f, g, w = lines.shape
    size = 2 * w  # no wrapping around
    spectra = np.fft.rfft(lines, size, axis=2).astype(np.complex64)
    fits = np.full((len(lags), g, len(speeds)), -1, np.float32)
    for fit, lag in zip(fits, lags, strict=True):
        match = np.fft.irfft((spectra[:-lag] * spectra[lag:].conj()).sum(0), size, axis=1)
        near = np.abs(speeds) * lag < 0.6 * w
        at = speeds[near] * lag
        low = np.floor(at).astype(int)
        part = at - low
        power = np.square(lines[:-lag]).sum((0, 2)) / 2 + np.square(lines[lag:]).sum((0, 2)) / 2 + 1e-3
        shared = 1 - np.abs(at) / w  # of the width that both show
        fit[:, near] = (match[:, low] * (1 - part) + match[:, low + 1] * part) / power[:, None] / shared
    return np.sort(fits, axis=0)[-max(round(len(lags) * best), 1):].mean(0)


def _longest(flags: np.ndarray) -> tuple[int, int] | None:
    """First and last + 1 of the longest run of true ones; single gaps are passed over."""
    closed = flags.copy()
    closed[1:-1] |= flags[:-2] & flags[2:]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], closed, [0]])))
    if not len(edges):
        return None
    k = int(np.argmax(edges[1::2] - edges[::2]))
    return int(edges[2 * k]), int(edges[2 * k + 1])


# Runs of pictures and their law

class _Run(NamedTuple):
    """Planes [f r w] of the band in a run of pictures with its margins; first .. last - 1 of them are the run's own."""

    first: int
    last: int
    planes: list[np.ndarray]


def _runs(film: Film, band: Band) -> Iterator[_Run]:
    """The band through the film, in runs; the last one may be short."""
    held, before = [], 0  # how many of held lie before the run
    for picture in film:
        held.append([_lines(plane, picture.y, band).copy() for plane in picture[:3]])
        if len(held) == before + RUN + MARGIN:
            yield _Run(before, before + RUN, [np.stack(part) for part in zip(*held, strict=True)])
            held, before = held[before + RUN - MARGIN:], MARGIN
    if len(held) > before:
        yield _Run(before, len(held), [np.stack(part) for part in zip(*held, strict=True)])


def _lines(plane: np.ndarray, luma: np.ndarray, band: Band) -> np.ndarray:
    """The band's lines of a plane."""
    down = -(-luma.shape[0] // plane.shape[0])
    return plane[band.top // down:band.bottom // down]


def _law(lines: np.ndarray, band: Band, own: int) -> Law | None:
    """The law of a run's luma [f r w], or None when none fits well enough; `own` pictures of it are not margin."""
    if own < 8 or len(lines) < 2 * LOOK:
        return None
    inner = lines[:, GROUP:-GROUP]
    sample = inner[:, ::max(len(inner[0]) // 8, 1)].astype(np.float32)
    short = sample[:SHORT]
    few = sample[:2 * LOOK, ::2]
    speed = _speed(few, band.speed, 0.3, (12,))
    if _explained(few, Law("clean", speed)) < LEAST:
        return None  # a scene that drifts: most of what the search finds ends here
    plain = _tuned(short, Law("clean", _speed(sample, speed, 0.075, (30, RUN))), 0.03)
    if LEAST < plain.explained < WHOLE:
        mixed = max((law._replace(explained=_explained(short, law)) for law in _mixing(sample, plain.speed)),
                    key=lambda law: law.explained)
        for part, step, wanted in ((short, 0.03, FITS - 0.04), (sample, 0.01, FITS)):
            if 1 - mixed.explained > 0.8 * (1 - plain.explained):  # no better than the plain law: do not go on
                break
            mixed = _tuned(part, mixed, step)
            if mixed.explained < wanted:
                break
        else:
            if 1 - mixed.explained < BETTER * (1 - plain.explained):
                return mixed
    if plain.explained < FITS:
        return None
    plain = _tuned(sample, plain, 0.01)
    return _woven(lines.astype(np.float32), plain) if plain.explained > FITS else None


def _speed(sample: np.ndarray, speed: float, span: float, distances: tuple[int, ...]) -> float:
    """The velocity within `span` of `speed` at which pictures [f r w] at ever larger distances in time agree."""
    soft = cv2.blur(sample.reshape(-1, sample.shape[2]), (5, 1)).reshape(sample.shape)
    steps = np.diff(soft, axis=2)
    reach = int(min(0.5 * sample.shape[2] / abs(speed), 0.6 * len(sample)))
    for far in distances:  # each step as fine as its distance in time allows; ghosts lie even-handedly around the truth
        lags = range(max(min(far, reach) - 11, 1), min(far, reach) + 1)
        tried = speed + np.linspace(-span, span, 61)
        speed = float(tried[np.argmax(_agreement(steps, tried, lags).mean(0))])
        span /= 4
    return speed


def _mixing(sample: np.ndarray, speed: float) -> list[Law]:
    """The mixing laws that say best which pictures of [f r w] are sharp."""
    sharp = np.square(np.diff(sample, axis=2)).mean((1, 2))
    sharp = np.log(sharp + 1)
    trend = np.convolve(np.pad(sharp, 15, mode="edge"), np.ones(31) / 31, "valid")  # text comes and goes
    sharp = sharp - trend
    found = []
    for ratio in RATIOS:
        phases = np.arange(0, 1, 0.02)
        share = (np.arange(len(sample)) * ratio + phases[:, None]) % 1
        soft = share * (1 - share)
        soft = soft - soft.mean(1, keepdims=True)
        like = -(soft * sharp).sum(1) / np.sqrt((soft**2).sum(1) * (sharp**2).sum() + 1e-9)
        k = int(np.argmax(like))
        found.append((float(like[k]), Law("blended", speed, ratio, float(phases[k]))))
    return [law for _, law in sorted(found, reverse=True)[:4]]


def _tuned(sample: np.ndarray, law: Law, step: float) -> Law:
    """The law with speed and phase moved, by at most about 2 * step, to where they explain most of [f r w]."""
    law = law._replace(explained=_explained(sample, law))
    steps = {"speed": step, "phase": 0.01} if law.name == "blended" else {"speed": step}
    for _ in range(3):
        for name in steps:
            for sign in (1, -1):
                tried = law._replace(**{name: getattr(law, name) + sign * steps[name]})
                tried = tried._replace(explained=_explained(sample, tried))
                if tried.explained > law.explained:
                    law = tried
                    break
            steps[name] /= 3
    return law


def _explained(sample: np.ndarray, law: Law) -> float:
    """Share of the variance of [f r w] that the law's best strip explains."""
    taps = _taps(law, len(sample), 1)
    left = sample - _shown(_strip(sample, taps, 6), taps, sample.shape[2])
    return 1 - float(np.square(left).mean()) / max(float((sample - sample.mean((0, 2), keepdims=True)).var()), 1.0)


def _woven(lines: np.ndarray, law: Law) -> Law:
    """The plain law, or a woven one where every other line of the strip fits its neighbours only when moved by half a step."""
    strip = _strip(lines, _taps(law, len(lines), 1), 6)
    even, odd = strip[2:-1:2], (strip[1:-2:2], strip[3::2])
    n = min(len(even), len(odd[1]))

    def misfit(shift):
        move = np.float32([[1, 0, -shift], [0, 1, 0]])
        between = (odd[0][:n] + odd[1][:n]) / 2
        moved = cv2.warpAffine(between, move, between.shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        edge = int(abs(law.speed)) + 1
        return float(np.square(moved - even[:n])[:, edge:-edge].mean())

    as_is, later, earlier = misfit(0), misfit(law.speed / 2), misfit(-law.speed / 2)
    if min(later, earlier) < 0.5 * as_is and abs(law.speed) > 1:
        return law._replace(name="woven tff" if later < earlier else "woven bff")
    return law


# The strip

def _taps(law: Law, count: int, across: int, mixed: bool = True) -> list[list[tuple[int, float]]]:
    """For each picture, the whole places of the strip that its column 0 is made of, and their shares; in planes of w / across.

    mixed: as the film shows it, else as it would look unmixed.
    """
    step = law.speed / law.ratio  # pixels a source picture
    place = np.arange(count) * law.ratio + law.phase
    k = np.floor(place + 1e-6)
    share = np.clip(place - k, 0, 1) if law.name == "blended" else place - place
    origin = min(k.min() * step, k.max() * step, (k.max() + 1) * step, (k.min() + 1) * step)
    parts = [(np.ones(count), place * step)]
    if mixed and law.name == "blended":
        parts = [(1 - share, k * step), (share, (k + 1) * step)]
    taps = [[] for _ in range(count)]
    for share, at in parts:
        at = np.maximum(at - origin, 0) / across
        low = np.floor(at).astype(int)
        for i in range(count):
            part = at[i] - low[i]
            taps[i] += [(int(low[i]), float(share[i] * (1 - part))), (int(low[i]) + 1, float(share[i] * part))]
    return taps


def _shown(strip: np.ndarray, taps: list, width: int) -> np.ndarray:
    """What pictures show of a strip [r L]: [f r w]."""
    out = np.zeros((len(taps), len(strip), width), np.float32)
    for picture, parts in zip(out, taps, strict=True):
        for at, share in parts:
            picture += np.float32(share) * strip[:, at:at + width]
    return out


def _spread(pictures: np.ndarray, taps: list, length: int) -> np.ndarray:
    """The transpose of `_shown`: [r L]."""
    out = np.zeros((pictures.shape[1], length), np.float32)
    for picture, parts in zip(pictures, taps, strict=True):
        for at, share in parts:
            out[:, at:at + picture.shape[1]] += np.float32(share) * picture
    return out


def _strip(pictures: np.ndarray, taps: list, steps: int) -> np.ndarray:
    """The strip [r L] that shows pictures [f r w] best: conjugate gradients on the normal equations, from the plain mean on."""
    width = pictures.shape[2]
    length = max(at for parts in taps for at, _ in parts) + width + 1
    seen = _spread(np.ones_like(pictures[:, :1]), taps, length)
    strip = _spread(pictures, taps, length) / np.maximum(seen, 1e-3)
    scale = 1 / np.maximum(seen, 0.5)  # Jacobi's preconditioner: columns at the ends are seen by few pictures
    left = _spread(pictures - _shown(strip, taps, width), taps, length)
    towards = scale * left
    direction, power = towards, (left * towards).sum(1, keepdims=True)
    for _ in range(steps):
        image = _shown(direction, taps, width)
        along = np.square(image).sum((0, 2))[:, None] + 1e-6
        strip = strip + power / along * direction
        left = left - power / along * _spread(image, taps, length)
        towards = scale * left
        fresh = (left * towards).sum(1, keepdims=True)
        direction, power = towards + fresh / (power + 1e-6) * direction, fresh
    return strip


def _redrawn(film: Film, band: Band, laws: list[Law | None]) -> Iterator[Picture]:
    """The film with the band of every damaged run drawn from its strip; the film is read by two readers, one ahead of the other."""
    pictures = iter(film)
    for run, law in zip(_runs(film, band), laws, strict=True):
        drawn = None if law is None or law.name == "clean" else [_drawn(planes, law, run.planes[0].shape[2], k > 0)
                                                                 for k, planes in enumerate(run.planes)]
        for i in range(run.first, run.last):
            picture = next(pictures)
            if drawn is not None:
                planes = [plane.copy() for plane in picture[:3]]
                for plane, new in zip(planes, drawn, strict=True):
                    _lines(plane, picture.y, band)[:] = new[i]
                picture = Picture(*planes, picture.at_s)
            yield picture


def _drawn(planes: np.ndarray, law: Law, luma_width: int, chroma: bool) -> np.ndarray:
    """The band's pictures [f r w] as they would be unmixed: uint8."""
    if chroma and np.ptp(planes) <= 4:
        return planes
    across = -(-luma_width // planes.shape[2])
    pictures, count = planes.astype(np.float32), len(planes)
    taps = _taps(law, count, across)
    strip = _strip(pictures, taps, 10)
    wrong = np.square(_shown(strip, taps, planes.shape[2]) - pictures).mean((0, 2))  # of each line
    alien = wrong > max(ALIEN, 4 * float(np.median(wrong)))
    if law.name.startswith("woven"):
        late = slice(1, None, 2) if law.name == "woven tff" else slice(0, None, 2)  # lines of the field shown second
        move = np.float32([[1, 0, law.speed / 2 / across], [0, 1, 0]])
        strip[late] = cv2.warpAffine(np.ascontiguousarray(strip[late]), move, strip[late].shape[::-1], flags=cv2.INTER_LINEAR,
                                     borderMode=cv2.BORDER_REPLICATE)
    strip = np.pad(strip, ((0, 0), (0, 2)), mode="edge")  # the last place may lie a rounding further
    made = _shown(strip, _taps(law, count, across, mixed=False), planes.shape[2])
    made[:, alien] = pictures[:, alien]
    return np.clip(np.rint(made), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main(ticker, argparse.ArgumentParser(description="Draw a woven or blended ticker anew")))
