"""The missing lines: PSNR of all lines at field rate, against FFmpeg's de-interlacers, and the speed of the grades.

Clips are woven with the top field first; the first and last two pictures are left out. QTGMC (grade best) runs where
LATTE_QTGMC_PYTHON is set.
"""

import os
import time

import numpy as np

from cleanbench.common import Bench, Row, mean, sheet, through_filters
from data_tools import degrade, film, measure
from data_tools.film import Clip
from data_tools.repair import fill

FAMILIES = ("synth", "bbb", "bikes", "car", "city")
FILTERS = {"yadif": "yadif=mode=send_field:parity=tff:deint=all", "w3fdif": "w3fdif=mode=field:parity=tff:deint=all",
           "estdif": "estdif=mode=field:parity=tff:deint=all", "bwdif": "bwdif=mode=send_field:parity=tff:deint=all"}
DAMAGE = {"unfiltered": dict(lowpass="none"), "lowpass 121": dict(lowpass="121"), "x264 crf 23": dict(lowpass="none")}
ENDS = slice(4, -4)  # fields of the pictures that count


def score(bench: Bench) -> list[Row]:
    rows = []
    for damage, settings in DAMAGE.items():
        families = FAMILIES if damage != "x264 crf 23" else FAMILIES[:3]
        found: dict[str, list] = {}
        for family, _, clip in bench.clips(families, frames=24, count=3):
            found.setdefault(family, []).append(_compared(clip, settings["lowpass"], coded="x264" in damage))
            if bench.pictures is not None and len(found[family]) == 1 and damage == "unfiltered" and family in ("synth", "bbb"):
                _pictured(bench, family, clip)
        rows += [row for family, results in found.items() for row in _rows(family, damage, results)]
    return rows + _speeds(next(bench.clips(("synth",), 40, 1))[2])


def _compared(truth: Clip, lowpass: str, coded: bool) -> dict[str, dict[str, float]]:
    """PSNR in dB by filter and by what is counted: all luma, moving luma, chroma."""
    woven = degrade.weave(truth, "tff", lowpass)
    woven = degrade.coded(woven, 23, interlaced="tff") if coded else woven
    truth = degrade.lowpassed(truth, lowpass)
    moves = measure.moving(truth.y)[ENDS]
    outs = {"weave": woven.take(np.repeat(np.arange(len(woven.y)), 2)), "line average": averaged(woven),
            **{name: through_filters(woven, filters) for name, filters in FILTERS.items()}, "fine": _filled(woven, "fine")}
    if os.environ.get("LATTE_QTGMC_PYTHON"):
        outs["qtgmc"] = _filled(woven, "best")
    truth = truth.take(slice(2 * len(woven.y)))
    moves = moves[:2 * len(woven.y)]
    return {name: {"all": measure.psnr(out.y[ENDS], truth.y[ENDS]), "moving": measure.psnr(out.y[ENDS], truth.y[ENDS], moves),
                   "chroma": mean(measure.psnr(a[ENDS], b[ENDS]) for a, b in zip(out[1:3], truth[1:3], strict=True))}
            for name, out in outs.items()}


def _filled(woven: Clip, grade: str) -> Clip:
    return film.to_clip(fill.deinterlace(iter(film.from_clip(woven)), "tff", "field", grade))


def averaged(woven: Clip) -> Clip:
    """Each field with the means of its lines between them."""
    def filled(planes):
        out = planes.repeat(2, 0)
        for k in (0, 1):  # the missing lines of field k are 1 - k, 3 - k, ...
            lines = planes[:, k::2].astype(np.uint16)
            after = np.concatenate([lines[:, 1:], lines[:, -1:]], 1) if k == 0 else np.concatenate([lines[:, :1], lines[:, :-1]], 1)
            out[k::2, 1 - k::2] = (lines + after + 1) >> 1
        return out

    return woven.each(filled)._replace(at_s=woven.at_s.repeat(2))


def _rows(family: str, damage: str, results: list[dict]) -> list[Row]:
    rows = []
    for counted, metric in (("all", "PSNR, dB"), ("moving", "PSNR of moving pixels, dB"), ("chroma", "PSNR of chroma, dB")):
        if counted == "chroma" and damage != "unfiltered":
            continue
        values = {name: mean(result[name][counted] for result in results) for name in results[0]}
        goal = ""
        if counted == "all":
            margin = {"unfiltered": 1.5, "lowpass 121": -0.2}.get(damage)
            goal = "" if margin is None else f">= bwdif {margin:+.1f} = {values['bwdif'] + margin:.2f}"
        rows.append(Row("fill", f"{family}, {damage}", metric, values.pop("fine"), goal, values, len(results)))
    return rows


def _speeds(clip: Clip) -> list[Row]:
    """Pictures a second of processor time, at frame rate."""
    woven = degrade.weave(clip, "tff")
    rows = []
    for grade, goal, times in (("fast", "", 10), ("fine", ">= 3", 1)):
        frames = list(film.from_clip(woven)) * times
        next(fill.deinterlace(iter(frames), "tff", "frame", grade))
        start = time.process_time()
        for _ in fill.deinterlace(iter(frames), "tff", "frame", grade):
            pass
        speed = len(frames) / (time.process_time() - start)
        rows.append(Row("fill", f"speed of {grade}, 640x360", "pictures a second and core", speed, goal, clips=1))
    return rows


def _pictured(bench: Bench, family: str, clip: Clip) -> None:
    """What differs most from bwdif's, with the truth beside it."""
    woven = degrade.weave(clip, "tff")
    bwdif, ours = through_filters(woven, FILTERS["bwdif"]), _filled(woven.take(slice(12)), "fine")
    t = 12
    gain = np.square(bwdif.y[t].astype(float) - clip.y[t]) - np.square(ours.y[t].astype(float) - clip.y[t])
    blocks = gain[:gain.shape[0] // 20 * 20, :gain.shape[1] // 20 * 20].reshape(gain.shape[0] // 20, 20, -1, 20).sum((1, 3))
    top, left = (int(np.clip(20 * i - 30, 0, side - 92)) for i, side in
                 zip(np.unravel_index(blocks.argmax(), blocks.shape), gain.shape, strict=True))
    part = np.s_[top:top + 76, left:left + 92]
    tiles = [(word, y[part]) for word, y in (("woven", woven.y[t // 2]), ("bwdif", bwdif.y[t]), ("ours, fine", ours.y[t]),
                                             ("truth", clip.y[t]))]
    sheet(bench.pictures / f"fill_{family}.png", tiles, zoom=2)
