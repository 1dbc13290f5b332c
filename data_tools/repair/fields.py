"""Which fields belong together: progressive, interlaced, telecined, shifted, or parts of each, told by content alone.

Four fields meet between two pictures: top and bottom lines of the earlier one and of the later one. How well a top and a bottom
field fit together (the lines between its lines against the other's, as FFmpeg's idet and every field matcher ask) says how far
apart in time they were taken. The four distances at a gap, in blocks where something moves and scaled to 0..1, are (later top -
earlier bottom, within the earlier, within the later, earlier top - later bottom): (1 0 0 1) for progressive pictures,
(0 0 0 1) when the top field is first, (1 0 0 0) when the bottom one is, and each gap of a pulldown has its own such mark. A
repeated picture and a still one weigh nothing, and a coder that smooths combs away moves a mark towards (1 0 0 1), but never makes
that one lean to a side. The most likely run of marks is found by dynamic programming (Viterbi 1967), in which changing the cadence
costs something and changing the kind costs more.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from data_tools.degrade import PULLDOWNS
from data_tools.film import Film, Picture

BLOCK = 8, 16  # lines of a field and sampled columns of a block
COLUMNS = 320  # at least as many columns are sampled
CELLS = 6, 3  # rows and columns of cells in which evidence is summed, so that parts of a picture can differ
COMB, DETAIL = 4.0, 1.0  # fields are unlike when they differ by more levels than COMB + DETAIL of what lines of one field differ
LEAST, SHARE = 1.0, 0.2  # a block counts when its distances differ by more levels than LEAST + SHARE of the smallest one


H, E = 0.55, 0.2  # how far apart neighbouring film pictures are beside those around them; that less what a coder smoothed away
MARKS = np.array([(1, 0, 0, 1),  # progressive; then, with the top field first:
                  (0, 0, 0, 1), (0, 0, 1, 1), (0, H, H, 1), (0, 1, 0, 1),  # video; into shifted film, within it, and out of it
                  (0, E, E, 1), (E, 0, 0, 1),  # shifted film and video when smoothed by a coder
                  (1, 0, 0, 0), (1, 0, 1, 0), (1, H, H, 0), (1, 1, 0, 0), (1, E, E, 0), (1, 0, 0, E)], np.float32)  # bottom first
TOP, BOTTOM = range(1, 7), range(7, 13)  # the marks of the two orders
APART = 0.1  # by which distances differ that are told apart
FAST = len(MARKS)  # the vote that comes after those for marks
KINDS = {"tff": "interlaced", "bff": "interlaced", "shifted": "telecine"}  # verdicts whose kind is not their own name
FAR = 0.25  # squared distance from which on a block is near no mark


class Evidence(NamedTuple):
    """What is kept of a film of f pictures: small numbers for each of its f - 1 gaps."""

    votes: np.ndarray  # [f-1, cells, FAST + 1] blocks that speak, by the mark that is nearest; float16
    weights: np.ndarray  # [f-1, cells] blocks that speak, those near no mark too
    change: np.ndarray  # [f-1] mean difference of a field to the same lines a picture later, levels


def thinned(y: np.ndarray) -> np.ndarray:
    """A plane [h w] of evenly spaced columns, and an even number of lines."""
    return y[:y.shape[0] // 2 * 2, ::max(1, y.shape[1] // COLUMNS)]


def fields_of(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Top and bottom lines of a plane [h w], of evenly spaced columns."""
    lines = thinned(y)
    return np.ascontiguousarray(lines[::2]), np.ascontiguousarray(lines[1::2])


class Halves(NamedTuple):
    """The two fields of a picture, each also where the other one's lines are."""

    top: np.ndarray  # [m w] from the second line on
    top_between: np.ndarray  # [m w] means of neighbouring lines of the top field, at the bottom lines
    bottom: np.ndarray  # [m w] without the last line
    bottom_between: np.ndarray  # [m w] at the lines of `top`


def blocks_of(levels: np.ndarray, lines: int = BLOCK[0]) -> np.ndarray:
    """Means of blocks of so many lines, float32; what does not fill a block is left off."""
    columns = BLOCK[1]
    down, across = levels.shape[0] // lines, levels.shape[1] // columns
    return cv2.resize(levels[:down * lines, :across * columns].astype(np.float32), (across, down), interpolation=cv2.INTER_AREA)


def apart(one: Halves, other: Halves) -> np.ndarray:
    """Distances in blocks, float32, between the top field of one picture and the bottom field of another, levels."""
    return blocks_of(cv2.add(cv2.absdiff(one.top_between, other.bottom), cv2.absdiff(one.top, other.bottom_between),
                             dtype=cv2.CV_16U)) / 2


def detail(field: Halves) -> np.ndarray:
    """Differences in blocks, float32, between neighbouring lines of one field, and between the means of the two fields, levels."""
    return 2 * blocks_of(cv2.absdiff(field.top, field.top_between)) + np.abs(blocks_of(field.top) - blocks_of(field.bottom))


def gather(pictures: Iterator[Picture]) -> Evidence:
    """Goes through the pictures once; what is too small for a block gives no evidence."""
    votes, weights, change, last = [], [], [], None
    for picture in pictures:
        top, bottom = fields_of(picture.y)
        if len(top) <= BLOCK[0] or top.shape[1] < BLOCK[1]:
            top, bottom = (np.zeros((BLOCK[0] + 1, BLOCK[1]), np.uint8) for _ in range(2))
        now = Halves(top[1:], cv2.addWeighted(top[:-1], 0.5, top[1:], 0.5, 0), bottom[:-1],
                     cv2.addWeighted(bottom[:-1], 0.5, bottom[1:], 0.5, 0))
        own, fine = apart(now, now), detail(now)
        if last is not None:
            before, last_own, last_fine = last
            cast = _cast(np.stack([apart(now, before), last_own, own, apart(before, now)]), np.maximum(fine, last_fine),
                         blocks_of(cv2.absdiff(now.bottom, before.bottom)))
            votes.append(cast[:, :-1].astype(np.float16))
            weights.append(cast.sum(1).astype(np.float16))
            change.append(float(cv2.absdiff(now.bottom, before.bottom).mean()))
        last = now, own, fine
    shape = len(votes), CELLS[0] * CELLS[1], FAST + 1
    return Evidence(np.array(votes).reshape(shape), np.array(weights).reshape(shape[:2]), np.array(change))


def _cast(distances: np.ndarray, fine: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The votes of blocks with the four distances [4 down across]: [cells, marks + 2], the last one for no mark at all.

    Where things move so fast that all fields are equally unlike, far beyond their own detail, the vote is FAST.
    """
    low = distances.min(0)
    spread = distances.max(0) - low
    speaks = np.maximum(spread - LEAST - SHARE * low, 0) / np.maximum(spread, 1e-6)
    scaled = ((distances - low) / np.maximum(spread, 1e-6)).reshape(4, -1)
    away = ((scaled[None] - MARKS[:, :, None]) ** 2).sum(1)
    nearest = np.where(away.min(0) < FAR, away.argmin(0), FAST + 1)
    inner, outer = np.sort(scaled[1:3], axis=0), scaled[[0, 3]]
    for side, match in ((TOP, outer[0]), (BOTTOM, outer[1])):  # the two pictures must agree that they fit worse, or better
        video, *_, late, early = side
        nearest[((nearest == late) & (inner[0] - match < APART)) | ((nearest == early) & (match - inner[1] < APART))] = video
    comb = np.minimum(distances[1], distances[2])
    unlike = np.maximum(np.minimum(comb, 2 * change) - COMB - DETAIL * fine, 0) / np.maximum(comb, 1e-6)
    nearest = np.where((speaks == 0).ravel(), FAST, nearest)
    speaks = np.where(speaks == 0, unlike, speaks)
    down, across = (np.arange(n) * cells // n for n, cells in zip(low.shape, CELLS, strict=True))
    place = (down[:, None] * CELLS[1] + across).ravel() * (FAST + 2) + nearest
    return np.bincount(place, speaks.ravel(), CELLS[0] * CELLS[1] * (FAST + 2)).reshape(-1, FAST + 2)


class Mode(NamedTuple):
    """One hypothesis: the marks of its gaps in turn, as numbers of MARKS."""

    verdict: str
    order: str  # of fields; "" where it does not matter
    pattern: str  # of a pulldown
    marks: tuple[int, ...]

    @property
    def kind(self) -> str:
        """progressive, interlaced or telecine."""
        return KINDS.get(self.verdict, self.verdict)


def mark_of(earlier: tuple[float, float], later: tuple[float, float]) -> int:
    """The mark nearest to the distances at a gap, from the times (top, bottom), in pictures, at which its fields were taken."""
    times = np.abs([later[0] - earlier[1], earlier[0] - earlier[1], later[0] - later[1], earlier[0] - later[1]])
    distances = np.interp(times, (0, 0.5, 1, 1.5, 2), (0, 0.35, 0.6, 0.8, 1))
    distances = (distances - distances.min()) / np.ptp(distances)
    return int(np.square(MARKS - distances).sum(1).argmin())


@cache
def modes() -> tuple[Mode, ...]:
    """All hypotheses, the plain ones first."""
    out = [Mode("progressive", "", "", (mark_of((0, 0), (1, 1)),))]
    for order, lag in (("tff", 0.5), ("bff", -0.5)):
        out.append(Mode(order, order, "", (mark_of((0, lag), (1, 1 + lag)),)))
        out.append(Mode("shifted", order, "2:2", (mark_of((0, 2 * lag), (1, 1 + 2 * lag)),)))
    for order in ("tff", "bff"):
        for pattern in ("2:3", "2:3:3:2", "euro"):
            held = PULLDOWNS[pattern]
            for skipped in ((0, 1) if sum(held) % 2 == 0 else (0,)):
                out.append(Mode("telecine", order, pattern, _pulled(held, order, skipped)))
    return tuple(out)


def _pulled(held: tuple[int, ...], order: str, skipped: int) -> tuple[int, ...]:
    """The marks of a whole cycle of a pulldown whose first `skipped` fields are left off."""
    period = sum(held) * (2 if sum(held) % 2 else 1)
    sequence = [i for i in range(2 * period) for _ in range(held[i % len(held)])][skipped:]
    pairs = [tuple(sequence[2 * k:2 * k + 2][::1 if order == "tff" else -1]) for k in range(period // 2 + 1)]
    return tuple(mark_of(a, b) for a, b in itertools.pairwise(pairs))


# Hypotheses over time

BREAK, SWITCH = 6.0, 14.0  # what a break of the cadence and a change of the mode cost, in units of log likelihood
FEW = 4.0  # blocks that speak at a gap for half of its full weight
SMOOTHED = (0.1, 0.4, 0.6, 0.8)  # shares of combs that a coder may have smoothed away


@cache
def _likelihoods(smoothed: float) -> np.ndarray:
    """log P(vote | true mark), [FAST, FAST + 1], where a coder smoothed a share of the combs away; slow film looks like video."""
    out = np.full((FAST, FAST + 1), 0.006)
    out[0, 0] = 0.93
    for side in (TOP, BOTTOM):
        video, inward, inside, outward = side[:4]
        out[side] = 0.003
        out[video, [*side, FAST]] = 0.3, 0.13, 0.02, 0.13, 0.12, 0.19, 0.1
        out[inward, side] = 0.02, 0.9, 0.03, 0.004, 0.03, 0.01
        out[inside, side] = 0.135, 0.095, 0.25, 0.095, 0.33, 0.07
        out[outward, side] = 0.02, 0.004, 0.03, 0.9, 0.03, 0.01
    out[1:] = smoothed * out[0] + (1 - smoothed) * out[1:]
    return np.log(out)


class States(NamedTuple):
    """All modes' gaps, one after the other."""

    mark: np.ndarray  # of each state
    mode: np.ndarray  # its mode
    before: np.ndarray  # the state that comes before it in the mode's turn
    first: np.ndarray  # of each mode, its first state


@cache
def _states() -> States:
    lengths = [len(mode.marks) for mode in modes()]
    first = np.cumsum([0, *lengths[:-1]])
    before = np.concatenate([start + (np.arange(n) - 1) % n for start, n in zip(first, lengths, strict=True)])
    return States(np.concatenate([mode.marks for mode in modes()]), np.repeat(np.arange(len(lengths)), lengths), before, first)


class Path(NamedTuple):
    """One explanation of a film."""

    states: np.ndarray  # [n]
    likelihood: float  # log
    scores: np.ndarray  # [n marks]


def scores_of(votes: np.ndarray, weights: np.ndarray, smoothed: float) -> np.ndarray:
    """Log likelihoods [n, marks] of each true mark at each gap, from votes [n, FAST + 1] and the weight [n] of all blocks."""
    return votes / np.maximum(weights, 0.5)[:, None] @ _likelihoods(smoothed).T * (weights / (weights + FEW))[:, None]


def follow(scores: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, float]:
    """The most likely state at each gap [n] and its log likelihood, given `scores_of` [n, marks]; allowed: bool [modes]."""
    states = _states()
    forbidden = np.where(allowed[states.mode], 0, -np.inf)
    came = np.empty((len(scores), len(forbidden)), np.int16)
    cost = forbidden  # a change that could as well come later comes later: no evidence is left to what was before
    for t, score in enumerate(scores):
        best = np.maximum.reduceat(cost, states.first)
        stay, again, anew = cost[states.before], best[states.mode] - BREAK, best.max() - SWITCH
        came[t] = np.where(stay > np.maximum(again, anew) + 1e-6, states.before, np.where(again >= anew, -1, -2))
        for k in np.flatnonzero(came[t] < 0) if t else ():
            among = cost if came[t, k] == -2 else np.where(states.mode == states.mode[k], cost, -np.inf)
            came[t, k] = among.argmax()
        cost = np.maximum(np.maximum(stay, again), anew) + score[states.mark] + forbidden
    path = np.zeros(len(scores), int)
    for t in range(len(scores) - 1, -1, -1):
        path[t] = came[t + 1, path[t + 1]] if t + 1 < len(scores) else cost.argmax()
    return path, float(cost.max())


def likeliest(votes: np.ndarray, weights: np.ndarray, allowed: np.ndarray, smoothed: tuple[float, ...] = SMOOTHED) -> Path:
    """The best of the paths through votes [n, FAST + 1] with weights [n], each taken for a share of combs that is smoothed away."""
    paths = []
    for share in smoothed:
        scores = scores_of(votes, weights, share)
        paths.append(Path(*follow(scores, allowed), scores))
    return max(paths, key=lambda path: path.likelihood)


def lean_of(votes: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """By how much of all weight the votes lean to the top field first (below 0: to the other), and that in standard errors.

    Whatever a coder, noise or a pattern of lines does to progressive pictures, it does to both sides alike.
    """
    side = votes[:, TOP].sum(1) - votes[:, BOTTOM].sum(1)
    share = side / np.maximum(weights, FEW)
    return float(side.sum() / max(weights.sum(), FEW)), float(share.mean() * len(share)**0.5 / np.hypot(share.std(), 0.1)) \
        if len(share) else 0.0


# The verdict

SAMPLE = 30  # pictures of a segment's liveliest stretch, for those who try something on it
LEAN, SURE = 0.03, 2.5  # share of all weight, and standard errors, by which votes lean to one side in what is not progressive
SIDED = 0.35  # share of a cell's votes by which one order outweighs the other where a part of the cell is video, of film
VIDEO, PART, MOST = 0.6, 0.05, 0.3  # hybrids: least share of votes for video where a cell is video; of fast ones there, and of all
#                                     weight in the film part; of all weight there when it is progressive
ORDERED = 0.6  # share of a segment's mean votes for its order that prove that both pictures at a gap are of it
MARGIN = 8.0  # log likelihood by which the film part must be better explained as film; progressive film by half


@dataclass(frozen=True)
class Segment:
    """Pictures first .. last - 1 that share a verdict."""

    first: int
    last: int
    verdict: str  # progressive, tff, bff, telecine, shifted, hybrid, or unknown where nothing moves
    confidence: float  # 0 to 1
    order: str = ""  # tff or bff: which field is shown first, where it matters
    pattern: str = ""  # of a pulldown: 2:2, 2:3, 2:3:3:2 or euro
    phase: int = 0  # of the segment's first picture in the pattern, in pictures
    lean: float = 0.0  # share of votes for the top field first, less that for the bottom field: -1 to 1
    lively: int = 0  # the first of the SAMPLE pictures of it in which most moves

    @property
    def kind(self) -> str:
        """progressive, interlaced, telecine, hybrid or unknown."""
        return KINDS.get(self.verdict, self.verdict)


@dataclass(frozen=True)
class Analysis:
    """The segments of a film, and what is true of it as a whole."""

    verdict: str  # that of most of it; hybrid where its parts are of different kinds; progressive where nothing moves
    confidence: float  # 0 to 1
    segments: tuple[Segment, ...]


def analyse(film: Film) -> Analysis:
    """Goes through a film once and tells which fields of it belong together."""
    return judge(gather(iter(film)))


def judge(evidence: Evidence) -> Analysis:
    """The verdict on a film's evidence. A shot cut is none, and what never moves is progressive with confidence 0."""
    quiet = _cuts(evidence.change)
    votes, weights = evidence.votes * ~quiet[:, None, None], evidence.weights * ~quiet[:, None]
    whole, weight = votes.sum(1, dtype=np.float32), weights.sum(1, dtype=np.float32)
    path, _, scores = likeliest(whole, weight, np.ones(len(modes()), bool))
    for first, last in _runs(path):
        span = np.s_[first:last]
        share, errors = lean_of(whole[span], weight[span])
        plain = modes()[_states().mode[path[first]]].order == ""
        if plain and abs(share) >= LEAN and abs(errors) >= SURE:  # combs that a coder all but smoothed away
            side = "tff" if share > 0 else "bff"
            path[span], _, scores[span] = likeliest(whole[span], weight[span], np.array([mode.order == side for mode in modes()]))
    segments = []
    for first, last in _runs(path):
        segments.append(_segment(path[first:last], votes[first:last], weights[first:last], scores[first:last], first))
    segments = _joined(segments, whole, quiet, weight)
    return summed(segments)


def _cuts(change: np.ndarray) -> np.ndarray:
    """Where a shot ends: gaps [n] at which much more changes than at the two before and after."""
    padded = np.pad(change, 2)
    around = np.max([padded[:-4], padded[1:-3], padded[3:-1], padded[4:]], axis=0)
    return change > 3 * around + 6 if len(change) > 1 else np.zeros(len(change), bool)


def _runs(path: np.ndarray) -> list[tuple[int, int]]:
    """First and last + 1 of each stretch of one mode."""
    mode = _states().mode[path]
    edges = [0, *(np.flatnonzero(np.diff(mode)) + 1).tolist(), len(path)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def _segment(path: np.ndarray, votes: np.ndarray, weights: np.ndarray, scores: np.ndarray, first: int) -> Segment:
    """What a stretch of one mode says, from its part of path [n], votes [n cells FAST + 1], weights [n cells], scores [n FAST]."""
    last, whole, weight = first + len(path), votes.sum(1, dtype=np.float32), weights.sum(1, dtype=np.float32)
    if weight.sum() < FEW:
        return Segment(first, last, "unknown", 0.0)
    parts = _parts(path, votes, weights)
    share, errors = lean_of(whole, weight)
    if parts is not None:
        mode, phase = _mode_at(parts[0])
        return Segment(first, last, "hybrid", 0.9, mode.order or parts[1], mode.pattern, phase, share)
    mode, phase = _mode_at(path)
    if mode.order and min(share / LEAN, errors / SURE, key=abs) * (1 if mode.order == "tff" else -1) < 1:
        mode, phase = modes()[0], 0
    if mode.order:
        sure = 1 - np.exp(-abs(errors) / 4)
    else:
        others = max(scores[:, other.marks[0]].sum() for other in modes() if len(other.marks) == 1 and other.order)
        sure = 1 - np.exp(-max(scores[:, 0].sum() - others, 0) / MARGIN)
    return Segment(first, last, mode.verdict, float(sure), mode.order, mode.pattern, phase, share)


def _mode_at(path: np.ndarray) -> tuple[Mode, int]:
    """The mode that a path starts with, and the place in its turn."""
    mode = _states().mode[path[0]]
    return modes()[mode], int(path[0] - _states().first[mode])


def _parts(path: np.ndarray, votes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, str] | None:
    """The path of the film where some cells are video and the others film, and the video's order; None where all are alike."""
    def added(part: np.ndarray, axis: int) -> np.ndarray:
        return part.sum(axis, dtype=np.float32)

    total, fast = added(weights, 0), added(votes[:, :, FAST], 0)
    plain = np.isin(_states().mark[path], (0, TOP[0], BOTTOM[0]))  # where shifted film, smoothed by a coder, is not taken for video
    whole, seen = added(weights[plain], 0), added(votes[plain], 0)
    top, bottom = (seen[:, [video, early]].sum(1) for video, *_, early in (TOP, BOTTOM))
    mixed = 1.0 if _mode_at(path)[0].kind == "interlaced" else SIDED  # of video, cells of fine lines look progressive in part
    leaning = np.abs(top - bottom) > np.where(seen[:, 0] < 0.15 * whole, VIDEO / 3, mixed) * whole
    combed = (fast > np.maximum(FEW, PART * total)) | ((whole > 4 * FEW) & ((np.maximum(top, bottom) > VIDEO * whole) | leaning))
    rest = total[~combed].sum()
    if not combed.any() or rest < PART * total.sum():
        return None
    top, bottom = (seen[combed][:, [side[0], *side[4:]]].sum() for side in (TOP, BOTTOM))
    order = "tff" if top >= bottom else "bff"
    part = added(votes[:, ~combed], 1), added(weights[:, ~combed], 1)
    film = likeliest(*part, np.ones(len(modes()), bool))
    video = likeliest(*part, np.array([mode.verdict == order for mode in modes()]))
    mode, (share, _) = _mode_at(film.states)[0], lean_of(*part)
    better = film.likelihood - video.likelihood
    pictures = mode.kind == "progressive" and better > MARGIN / 2 and abs(share) < LEAN and rest > MOST * total.sum()
    return (film.states, order) if pictures or (mode.kind == "telecine" and better > MARGIN) else None


def _joined(segments: list[Segment], votes: np.ndarray, cuts: np.ndarray, weight: np.ndarray) -> list[Segment]:
    """Segments of gaps made segments of pictures; neighbours that say the same, or nothing, become one.

    From votes [n, FAST + 1], cuts [n] and weight [n] of the gaps.
    """
    out, pictures = [], len(weight) + 1
    for k, segment in enumerate(segments):
        segment = replace(segment, first=_first(segments[k - 1], segment, votes, cuts, weight) if k else 0)
        alike = out and (out[-1].verdict, out[-1].order, out[-1].pattern) == (segment.verdict, segment.order, segment.pattern)
        if (out and segment.verdict == "unknown") or alike:
            out[-1] = replace(out[-1], last=segment.last)
        elif out and out[-1].verdict == "unknown":
            out[-1] = replace(segment, first=out[-1].first)
        else:
            out.append(segment)
    firsts = [0, *(segment.first for segment in out[1:])]
    spans = zip(out or [Segment(0, pictures, "unknown", 0.0)], firsts, [*firsts[1:], pictures], strict=True)
    return [replace(segment, first=a, last=b, lively=_lively(weight[a:b - 1], a)) for segment, a, b in spans]


def _first(old: Segment, new: Segment, votes: np.ndarray, cuts: np.ndarray, weight: np.ndarray) -> int:
    """The first picture of a segment whose first gap is known; the picture before that gap is of the one or of the other.

    Across a cut all fields are unlike, as if the pictures were progressive. So only votes for an order prove what that picture is.
    """
    first = start = new.first
    while start > 0 and not cuts[start - 1] and weight[start - 1] < 0.5:
        start -= 1
    if start and cuts[start - 1]:
        return start

    def proven(segment: Segment, gap: int) -> bool:
        side = votes[:, TOP if segment.order == "tff" else BOTTOM].sum(1) / np.maximum(weight, FEW)
        return side[gap] > ORDERED * side[segment.first:segment.last].mean()

    if new.kind == "interlaced":
        later = not proven(new, first)
    else:
        later = bool(old.order) and new.verdict == "progressive" and proven(old, first - 1)
    return first + int(later or cuts[first])


def _lively(weight: np.ndarray, first: int) -> int:
    """The first of the SAMPLE pictures in a row that hold most weight, given that of the gaps from picture `first` on."""
    if len(weight) < SAMPLE:
        return first
    return first + int(np.convolve(weight, np.ones(SAMPLE - 1), "valid").argmax())


def summed(segments: list[Segment]) -> Analysis:
    """The verdict of most pictures that say anything; hybrid where a twentieth and more are of another kind."""
    length = {}
    for segment in segments:
        length[segment.kind] = length.get(segment.kind, 0) + segment.last - segment.first
    spoken = [segment for segment in segments if segment.verdict != "unknown"]
    total = sum(segment.last - segment.first for segment in spoken)
    kinds = [kind for kind, n in length.items() if kind != "unknown" and n >= total / 20]
    if not spoken:
        return Analysis("progressive", 0.0, tuple(segments))
    most = max(spoken, key=lambda segment: segment.last - segment.first)
    confidence = sum(segment.confidence * (segment.last - segment.first) for segment in spoken) / total
    return Analysis("hybrid" if len(kinds) > 1 else most.verdict, confidence, tuple(segments))


# What rolls by whole lines

ROLL = 8  # lines a picture up to which rolling is looked for, both ways
ROLLS = 0.85  # least share of the moving blocks, over a sample, that another picture's lines explain when shifted
MOVES, EXPLAINED = 2.0, 0.35  # levels by which a moving block changes; at most so much of that is left of it by the right shift


def rolled(sample: list[Picture]) -> tuple[str, str, float] | None:
    """Verdict, order and share of moving blocks that say so, of pictures that roll by whole lines; None when they do not.

    Lines that repeat fit so well a few lines on that fields seem to belong together that do not. But where one shift of s lines
    leads from each picture to the next, the time between the two fields of a picture is the shift between them: none when it is
    progressive, s / 2 when it is video, s when it is shifted film. The one for which the bottom lines fit best between the top
    lines, so that strokes have no combs, is the truth. Of a pulldown's pictures many fit no shift at all.
    """
    hypotheses = [("progressive", "", 0.0)] + [(mode, order, sign * lag) for mode, lag in (("", 0.5), ("shifted", 1.0))
                                               for order, sign in (("tff", 1), ("bff", -1))]
    moving, explained, apart_by = 0, 0, np.zeros(len(hypotheses))
    for before, now in itertools.pairwise(np.ascontiguousarray(thinned(picture.y)) for picture in sample):
        if now.shape[0] < 6 * BLOCK[0] or now.shape[1] < BLOCK[1]:
            return None
        change = blocks_of(cv2.absdiff(before, now), 2 * BLOCK[0])
        shift, where = _shift(before, now, change)
        moving, explained = moving + int((change > MOVES).sum()), explained + int(where.sum())
        inside = where.copy()
        inside[[0, -1]] = False  # where lines come in, and leave
        if inside.any():
            apart_by += [_between(now, lag * shift)[inside].sum() for *_, lag in hypotheses]
    if explained == 0 or explained < ROLLS * moving:
        return None
    verdict, order, _ = hypotheses[int(apart_by.argmin())]
    return verdict or order, order, explained / moving


def _shift(before: np.ndarray, now: np.ndarray, change: np.ndarray) -> tuple[int, np.ndarray]:
    """The shift in lines that explains most moving blocks of a picture [h w] by the one before (up is above 0); which ones."""
    wide = cv2.copyMakeBorder(before, ROLL, ROLL, 0, 0, cv2.BORDER_REPLICATE)
    best = 0, np.zeros(change.shape, bool)
    for shift in sorted((s for s in range(-ROLL, ROLL + 1) if s), key=abs):
        left = blocks_of(cv2.absdiff(wide[ROLL + shift:ROLL + shift + len(now)], now), 2 * BLOCK[0])
        where = (change > MOVES) & (left < EXPLAINED * change)
        if where.sum() > best[1].sum():
            best = shift, where
    return best


def _between(y: np.ndarray, lines: float) -> np.ndarray:
    """How far the bottom lines of a picture [h w] lie from its top ones that many lines below them, in blocks; levels."""
    top, bottom = y[::2].astype(np.float32), y[1::2]
    whole, part = divmod((1 + lines) / 2, 1)
    above, below = (top[np.clip(np.arange(len(top)) + int(whole) + k, 0, len(top) - 1)] for k in (0, 1))
    return blocks_of(np.abs((1 - part) * above + part * below - bottom))


def settled(segment: Segment, sample: list[Picture]) -> Segment:
    """A segment with the verdict that follows from how its pictures roll, where they do."""
    found = rolled(sample)
    if found is None or found[:2] == (segment.verdict, segment.order):
        return segment
    verdict, order, share = found
    return replace(segment, verdict=verdict, order=order, confidence=share, pattern="2:2" if verdict == "shifted" else "", phase=0)
