"""Which fields belong together: the verdict on moving clips, beside FFmpeg's idet, and what follows from a wrong one."""

from collections import defaultdict
from collections.abc import Iterator

import av
import numpy as np

from cleanbench.common import FOOTAGE, Bench, Row, mean, sheet, through_filters
from data_tools import degrade, film, measure
from data_tools.deinterlace import deinterlace
from data_tools.film import Clip, from_clip
from data_tools.repair import fields

WORDS = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG AND RUNS FAR AWAY INTO THE WOODS"
KINDS = {"progressive": "progressive", "tff": "interlaced", "bff": "interlaced", "telecine": "telecine", "shifted": "telecine",
         "hybrid": "hybrid", "undetermined": "none"}
REPEATED = 0.1  # share of repeated top and of bottom fields from which on what idet calls interlaced is taken for telecine


def idet(clip: Clip) -> str:
    """The verdict of FFmpeg's idet over a clip, from its counts of frames; telecine is told by its counts of repeated fields."""
    graph = av.filter.Graph()
    f, h, w = clip.y.shape
    source = graph.add_buffer(width=w, height=h, format="yuv420p", time_base="1/25")
    step, sink = graph.add("idet"), graph.add("buffersink")
    source.link_to(step)
    step.link_to(sink)
    graph.configure()
    counts: dict[str, float] = {}

    def drain():
        while True:
            try:
                counts.update({key.removeprefix("lavfi.idet."): float(value) for key, value in graph.pull().metadata.items()
                               if not key.endswith("current_frame")})
            except (BlockingIOError, EOFError, av.error.BlockingIOError, av.error.EOFError):
                return

    kind = film.Kind(width=w, height=h, rate=film.Fraction(25))
    for i, picture in enumerate(from_clip(clip)):
        frame = film.frame_of(picture, kind)
        frame.pts, frame.time_base = i, film.Fraction(1, 25)
        graph.push(frame)
        drain()
    graph.push(None)
    drain()
    votes = {name: counts.get(f"multiple.{name}", 0.0) for name in ("progressive", "tff", "bff")}
    if not any(votes.values()):
        return "undetermined"
    best = max(votes, key=votes.get)
    repeats = min(counts.get("repeated.top", 0.0), counts.get("repeated.bottom", 0.0))
    return "telecine" if best != "progressive" and repeats > REPEATED * f else best


def titled(clip: Clip, order: str, speed: float) -> Clip:
    """A clip with a line of text that moves with the fields."""
    twice = clip.take(np.repeat(np.arange(len(clip.y)), 2)).timed(2 * clip.rate)
    return degrade.weave(degrade.ticker(twice, WORDS, speed, x0=clip.y.shape[2] * 0.7)[0], order)


def coded(clip: Clip, order: str = "") -> Iterator[tuple[str, Clip]]:
    """A clip as it is, and what codecs and noise make of it; order: of fields, where there are any."""
    yield "clean", clip
    for crf in (18, 23, 30):
        yield f"x264 crf {crf}", degrade.coded(clip, crf)
    if order:
        yield "x264 crf 23 interlaced", degrade.coded(clip, 23, interlaced=order)
    yield "mpeg2 2M", degrade.coded(clip, codec="mpeg2video", bit_rate=2_000_000, interlaced=order)
    yield "noise 10", degrade.tape(clip, 1, noise=10, jitter=0)


def damaged(clip: Clip, number: int) -> Iterator[tuple[str, str, str, Clip]]:
    """(verdict, order, how it was coded, clip) of everything a clip is put through; the orders take turns by `number`."""
    order, other = degrade.ORDERS[number % 2], degrade.ORDERS[1 - number % 2]
    for how, each in coded(clip):
        yield "progressive", "", how, each
    for lowpass, turn in (("none", order), ("121", other), ("soft", order)):
        for how, each in coded(degrade.weave(clip, turn, lowpass), turn):
            yield turn, turn, how, each
    cut = ((41, 3),)
    for pattern, phase, turn, cuts in (("2:3", number % 5, order, ()), ("2:3", 1, other, cut), ("2:3:3:2", number % 2, order, ()),
                                       ("euro", 5 + number, other, ())):
        pulled = degrade.telecine(clip, pattern, phase, turn, cuts).clip
        yield "telecine", turn, "clean", pulled
        yield "telecine", turn, "x264 crf 23", degrade.coded(pulled, 23)
    shifted = degrade.telecine(clip, "2:2", 1, order).clip
    yield "shifted", order, "clean", shifted
    yield "shifted", order, "x264 crf 23", degrade.coded(shifted, 23)
    for under in (degrade.telecine(clip, "2:3", number % 5, order).clip, clip):
        over = titled(under, order, 2 + number % 3)
        yield "hybrid", order, "clean", over
        yield "hybrid", order, "x264 crf 23", degrade.coded(over, 23)


def score(bench: Bench) -> list[Row]:
    right: dict[tuple[str, str], list[tuple[bool, bool]]] = defaultdict(list)
    families: dict[str, list[bool]] = defaultdict(list)
    for number, (family, _, clip) in enumerate(bench.clips(("synth", "bbb", "bikes", "car", "city"), 100, 5)):
        for verdict, order, how, each in damaged(clip, number):
            ours, theirs = fields.analyse(from_clip(each)), idet(each)
            orders = {segment.order for segment in ours.segments if segment.order}
            kind = KINDS[verdict]
            right["kind", kind].append((KINDS[ours.verdict] == kind, KINDS[theirs] == kind))
            right["kind", how].append(right["kind", kind][-1])
            families[family].append(right["kind", kind][-1][0])
            if kind == "interlaced":
                right["order", how].append((ours.verdict == verdict, theirs == verdict))
            elif order:
                right["other orders", ""].append((orders == {order}, False))

    def row(setting: str, metric: str, pairs: list[tuple[bool, bool]], goal: str, peer: bool = True) -> Row:
        ours, theirs = (100 * mean(map(float, side)) for side in zip(*pairs, strict=True))
        return Row("verdict", setting, metric, ours, goal, {"idet": theirs} if peer else None, len(pairs))

    rows = []
    every = [pair for (what, _), pairs in right.items() if what == "order" for pair in pairs]
    rows.append(row("woven, clean and coded", "tff or bff right, %", every, ">= 99.5"))
    rows += [row(f"woven, {how}", "tff or bff right, %", pairs, ">= 99.5")
             for (what, how), pairs in right.items() if what == "order"]
    kinds = ("progressive", "interlaced", "telecine", "hybrid")
    both = [pair for kind in kinds for pair in right["kind", kind]]
    rows.append(row("all, clean and coded", "kind of four right, %", both, ">= 98"))
    rows += [row(kind, "kind of four right, %", right["kind", kind], ">= 98") for kind in kinds]
    rows += [Row("verdict", f"all, {family}", "kind of four right, %", 100 * mean(map(float, each)), ">= 98", None, len(each))
             for family, each in families.items()]
    rows.append(row("telecine, shifted, hybrid", "order right, %", right["other orders", ""], "", peer=False))
    return rows + _quiet(bench) + _repaired(bench)


def _quiet(bench: Bench) -> list[Row]:
    """Clips that look interlaced and are not: still ones, fine lines, repeats, and a badly coded one that idet calls interlaced."""
    clips = []
    for i in range(1 if bench.quick else 6):
        clips.append(degrade.synth(9_000 + i, 40, still=True))
        clips.append(degrade.tape(clips[-1], i, noise=6, jitter=0))
        moving = degrade.synth(9_100 + i, 40)
        lines = moving.y.copy()
        lines[:, ::2, :lines.shape[2] // 2] = np.clip(lines[:, ::2, :lines.shape[2] // 2].astype(int) - 30 - 5 * i, 16, 235)
        clips.append(moving._replace(y=lines))
        clips.append(degrade.mistimed(moving, i, 0.3)[0])
        clips.append(moving.take(np.arange(40) // 2).timed(25))
    path = FOOTAGE / "carphone_distorted.mp4"
    clips += [film.to_clip(film.read(path))] if path.exists() else []
    pairs = [(fields.analyse(from_clip(clip)).verdict == "progressive", idet(clip) in ("progressive", "undetermined"))
             for clip in clips]
    ours, theirs = (100 * mean(map(float, side)) for side in zip(*pairs, strict=True))
    return [Row("verdict", "still, fine lines, repeats, bad coding", "progressive, %", ours, "100", {"idet": theirs}, len(clips))]


def _repaired(bench: Bench) -> list[Row]:
    """What the stage makes of what de-interlacers do not know: shifted film, and film under titles that move with the fields."""
    shifted, titles = [], []
    for number, (_, name, clip) in enumerate(bench.clips(frames=60, count=3)):
        order = degrade.ORDERS[number % 2]
        for kind, gains, given, truth in (
                ("shifted", shifted, degrade.telecine(clip, "2:2", 1, order).clip, clip),
                ("hybrid", titles, titled(degrade.telecine(clip, "2:3", 0, order).clip, order, 2), clip)):
            outcome = deinterlace(from_clip(given))
            out = film.to_clip(outcome.film)
            peer = through_filters(given, f"bwdif=mode=send_frame:parity={order}")
            top = truth.y.shape[1] - 50 if kind == "hybrid" else truth.y.shape[1]  # the title is not in the truth
            gains.append((_quality(out, truth, top), _quality(peer, truth, top)))
            if bench.pictures is not None and name == "bbb0":
                shown = measure.matched(out.y, truth.y)[len(out.y) // 2]
                near = measure.matched(peer.y, truth.y).index(shown)
                box = np.s_[-120:, 200:440]
                sheet(bench.pictures / f"verdict_{kind}.png",
                      [("before", given.y[near][box]), ("bwdif", peer.y[near][box]), ("ours", out.y[len(out.y) // 2][box]),
                       ("truth", truth.y[shown][box])])
    return [Row("verdict", setting, "PSNR of the repaired film, dB", mean(pair[0] for pair in gains), goal,
                {"bwdif": mean(pair[1] for pair in gains)}, len(gains))
            for setting, gains, goal in (("2:2 shifted by a field", shifted, "99"),
                                         ("2:3 under a title at 60 Hz, above the title", titles, "> bwdif"))]


def _quality(out: Clip, truth: Clip, lines: int) -> float:
    """Mean PSNR of pictures to the ones they show, in the upper `lines`."""
    which = measure.matched(out.y[:, :lines], truth.y[:, :lines])
    return mean(measure.psnr(out.y[i, :lines], truth.y[j, :lines]) for i, j in enumerate(which))
