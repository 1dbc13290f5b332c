"""Baked combs: are they found, by scale, and how much nearer the truth does the repair come? Beside idet, bwdif and a blur."""

import av
import cv2
import numpy as np

from cleanbench.common import Bench, Row, mean, sheet, through_filters
from data_tools import degrade, film
from data_tools.film import Clip
from data_tools.measure import auc, psnr, recall_at
from data_tools.repair import baked

FAMILIES = ("synth", "bbb", "bikes", "car", "city")
FOUND = ((0.5, "area"), (0.6, "area"), (2 / 3, "bicubic"), (0.75, "area"), (0.75, "bicubic"), (0.75, "lanczos"), (0.9, "bicubic"),
         (1.25, "bilinear"), (1.5, "bicubic"), (2.0, "lanczos"))  # scale and kernel
CODED = (0, 18, 23, 28)  # crf, in turn
OFFSETS = (0, 0, 0.25)  # lines, in turn; by half a line, interpolation mixes the fields and no comb is left
REPAIRED = ((2 / 3, "area"), (2 / 3, "bicubic"), (0.75, "area"), (0.75, "bicubic"), (0.9, "bicubic"), (1.5, "bicubic"))


def score(bench: Bench) -> list[Row]:
    """Rows of detection and of repair."""
    return [*detection(bench), *repairs(bench)]


def detection(bench: Bench) -> list[Row]:
    """AUC, recall and false alarms by scale; of every clip and scale also the unwoven pictures, as what must not be found."""
    results = []  # scale, baked, our score, our verdict, idet's verdict
    turn = 0
    for _, _, clip in bench.clips(FAMILIES, 60, 3):
        for scale, how in FOUND:
            turn += 1
            for woven in (True, False):
                damaged = degrade.weave(clip, degrade.ORDERS[turn % 2]) if woven else clip.take(slice(0, None, 2))
                damaged = degrade.rescaled(damaged, scale, how, OFFSETS[turn % len(OFFSETS)])
                crf = CODED[turn % len(CODED)]
                damaged = degrade.coded(damaged, crf) if crf else damaged
                found, value = baked.scored(film.from_clip(damaged))
                results.append((scale, woven, value, found is not None, idet(damaged)))
        for clean in (clip, degrade.weave(clip)):
            found, value = baked.scored(film.from_clip(clean))
            results.append((1.0, False, value, found is not None, False))
    scales, woven, scores, ours, theirs = (np.array(part) for part in zip(*results, strict=True))
    rows = []
    for name, chosen in (("scale 0.5 to 2", scales > 0), ("scale 0.75 to 2", (scales >= 0.75)),
                         *((f"scale {scale:.2f}", scales == scale) for scale in sorted({scale for scale, _ in FOUND}))):
        chosen = chosen | ~woven
        positive = chosen & woven
        rows += [Row("baked comb", name, "AUC", auc(scores[chosen], woven[chosen]), ">= 0.99", clips=int(positive.sum())),
                 Row("baked comb", name, "recall at 1 % false alarms", recall_at(scores[chosen], woven[chosen]), ">= 0.95",
                     {"idet": float(theirs[positive].mean())}, int(positive.sum())),
                 Row("baked comb", name, "recall of verdicts", float(ours[positive].mean()), ">= 0.95", clips=int(positive.sum()))]
    clean = ~woven
    return [*rows, Row("baked comb", "clean and native woven clips", "false alarms", float(ours[clean].mean()), "<= 0.01",
                       {"idet": float(theirs[clean].mean())}, int(clean.sum()))]


def idet(clip: Clip) -> bool:
    """Whether FFmpeg's idet calls more pictures of a clip interlaced than progressive."""
    graph = av.filter.Graph()
    f, h, w = clip.y.shape
    kind = film.Kind(width=w, height=h, rate=25)
    source, sink = graph.add_buffer(width=w, height=h, format="yuv420p", time_base="1/25"), graph.add("buffersink")
    tested = graph.add("idet")
    source.link_to(tested)
    tested.link_to(sink)
    graph.configure()
    last = None
    for i, (y, u, v, _) in enumerate(zip(*clip, strict=True)):
        frame = film.frame_of(film.Picture(y, u, v, 0.0), kind)
        frame.pts, frame.time_base = i, film.Fraction(1, 25)
        graph.push(frame)
        try:
            last = graph.pull()
        except (BlockingIOError, av.error.BlockingIOError):
            continue
    counts = {key: float(last.metadata[f"lavfi.idet.multiple.{key}"]) for key in ("tff", "bff", "progressive")}
    return counts["tff"] + counts["bff"] > counts["progressive"]


def repairs(bench: Bench) -> list[Row]:
    """PSNR gains over what was given, of the luma of first fields' moments; 0 where nothing was found or the gate refused."""
    gains: dict[tuple, list[tuple[float, float, float, bool]]] = {}
    for _, name, clip in bench.clips(FAMILIES, 32, 2):
        for turn, (scale, how) in enumerate(REPAIRED):
            crf = (0, 23)[turn % 2]
            damaged = degrade.rescaled(degrade.weave(clip), scale, how)
            damaged = degrade.coded(damaged, crf) if crf else damaged
            truth = degrade.rescaled(clip.take(slice(0, len(damaged.y) * 2, 2)), scale, how).y
            given = film.from_clip(damaged)
            found = baked.analyse(given)
            ours = film.to_clip(baked.repair(given, found)).y if found else damaged.y
            bwdif = through_filters(damaged, "bwdif=mode=send_frame:deint=all").y
            blur = np.stack([cv2.sepFilter2D(plane, -1, np.ones(1), np.array([0.25, 0.5, 0.25])) for plane in damaged.y])
            before = psnr(damaged.y, truth)
            gains.setdefault((scale, how, crf), []).append((*(psnr(planes, truth) - before for planes in (ours, bwdif, blur)),
                                                            found is not None and found.fits))
            if bench.pictures and (name, scale, how) == ("bbb0", 0.75, "area"):
                i, top, left = busiest(damaged.y)
                cut = np.s_[i, top:top + 96, left:left + 128]
                shown = {"before": damaged.y, "bwdif": bwdif, "ours": ours, "truth": truth}
                sheet(bench.pictures / "baked.png", [(word, planes[cut]) for word, planes in shown.items()], 2)
    rows = []
    for (scale, how, crf), values in gains.items():
        ours, bwdif, blur, repaired = zip(*values, strict=True)
        setting, count = f"scale {scale:.2f} {how}, crf {crf or 'none'}", len(values)
        rows += [Row("baked repair", setting, "gain, dB", mean(ours), ">= 3" if scale >= 0.75 else ">= 1.5",
                     {"bwdif": mean(bwdif), "blur": mean(blur)}, count),
                 Row("baked repair", setting, "least gain, dB", min(ours), ">= 0", {"bwdif": min(bwdif), "blur": min(blur)}, count),
                 Row("baked repair", setting, "share repaired", float(np.mean(repaired)), clips=count)]
    return rows


def busiest(y: np.ndarray) -> tuple[int, int, int]:
    """Picture, line and column of the 96 x 128 part that differs most from the picture before."""
    change = np.abs(np.diff(y.astype(np.float32), axis=0))
    i = int(np.argmax(change.mean((1, 2))))
    spread = cv2.blur(change[i], (128, 96), borderType=cv2.BORDER_CONSTANT)[48:-48, 64:-64]
    top, left = np.unravel_index(int(np.argmax(spread)), spread.shape)
    return i + 1, int(top), int(left)
