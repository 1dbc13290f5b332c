"""Repeats and missing pictures, beside FFmpeg's mpdecimate and an oracle that knows the true pictures."""

import subprocess

import cv2
import numpy as np

from cleanbench.common import Bench, Row, mean, sheet
from cleanbench.harm import without_repeats
from data_tools import degrade, film
from data_tools.film import Clip
from data_tools.measure import f1
from data_tools.repair import timing

FAMILIES = ("synth", "bbb", "bikes", "car", "city")


def mpdecimate(clip: Clip) -> np.ndarray | None:
    """Which pictures FFmpeg's mpdecimate leaves out, bool [f], by the binary of imageio_ffmpeg; None where it is not installed."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        return None
    f, h, w = clip.y.shape
    command = [get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{w}x{h}", "-r", "25", "-i", "-",
               "-vf", "format=yuv420p,mpdecimate", "-fps_mode", "passthrough", "-f", "framecrc", "-"]
    out = subprocess.run(command, input=clip.y.tobytes(), stdout=subprocess.PIPE, check=True).stdout.decode()
    kept = [int(line.split(",")[2]) for line in out.splitlines() if line and not line.startswith("#")]
    missing = np.ones(f, bool)
    missing[kept] = False
    return missing


def oracle(bad: Clip, clip: Clip, shown: np.ndarray) -> np.ndarray:
    """Which pictures lie less than half a step beyond the one before, for one who knows the true film, bool [f].

    Where a codec made the repeats of quiet passages to motion there is nothing left to find."""
    def soft(y: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(y.astype(np.float32), (0, 0), 1.5)

    places = []
    for y, number in zip(bad.y, shown, strict=True):
        true = {i: soft(clip.y[i]) for i in range(max(0, number - 2), min(len(clip.y), number + 3))}
        far = {i: cv2.norm(soft(y), plane, cv2.NORM_L2SQR) for i, plane in true.items()}
        ways = []
        for i in list(true)[:-1]:
            whole = cv2.norm(true[i], true[i + 1], cv2.NORM_L2SQR) + 1e-3
            share = np.clip((far[i] + whole - far[i + 1]) / (2 * whole), 0, 1)
            ways.append(((1 - share) * far[i] + share * far[i + 1] - share * (1 - share) * whole, i + share))
        places.append(min(ways)[1])
    return np.append(False, np.diff(places) < 0.5)


def slow_pan() -> Clip:
    """A still scene that moves down by 0.15 pixels a picture."""
    scene = degrade.synth(9100, 1, 380, 640)
    planes = [degrade.rescaled(scene, 1, offset=0.15 * i) for i in range(60)]
    return Clip(*(np.concatenate([clip[k] for clip in planes]) for k in range(3)), np.arange(60) / 25)


def moves(clip: Clip, shown: np.ndarray) -> np.ndarray:
    """Where the true film moves into the picture that is shown, bool [f]: by a quarter of a level and of what it does around.

    Elsewhere a picture that does not differ from the one before is a repeat in effect, whatever the truth is.
    """
    change = np.abs(np.diff(clip.y[:, ::2, ::2].astype(np.int16), axis=0)).mean((1, 2))
    change = np.array([np.inf] + [change[i - 1] if i else np.inf for i in shown[1:]])
    usual = np.array([np.median(change[max(0, j - 6):j + 7]) for j in range(len(change))])
    return (change > 0.25) & (change > 0.3 * usual)


def clips(bench: Bench, family: str) -> list[Clip]:
    if family == "slow pan":
        return [slow_pan()]
    return [without_repeats(clip) for _, _, clip in bench.clips((family,), 120, 3)]


def score(bench: Bench) -> list[Row]:
    rows = []
    for crf in (0, 23, 32):
        quality = f"crf {crf}" if crf else "exact"
        for family in (*FAMILIES, "slow pan"):
            found, peer, best, true, counted, jumps, drops, count = [], [], [], [], [], [], [], 0
            for number, clip in enumerate(clips(bench, family)):
                count += 1
                bad, shown = degrade.mistimed(clip, 1000 + number, drops=0.0)
                bad = degrade.coded(bad, crf) if crf else bad
                found.append(timing.analyse(film.from_clip(bad)).duplicate)
                other = mpdecimate(bad)
                peer.append(other if other is not None else np.zeros(len(bad.y), bool))
                best.append(oracle(bad, clip, shown))
                true.append(np.append(False, np.diff(shown) == 0))
                counted.append(moves(clip, shown))
                if bench.pictures and family == "bbb" and crf == 23 and number == 0:
                    _sheet(bench, bad, found[-1], true[-1])
                bad, shown = degrade.mistimed(clip, 2000 + number, repeats=0.0)
                bad = degrade.coded(bad, crf) if crf else bad
                got = timing.analyse(film.from_clip(bad))
                places = np.isin(np.arange(len(shown)), [jump.number for jump in got.jumps])
                near = moves(clip, shown)
                jumps.append(places[near])
                drops.append(np.append(False, np.diff(shown) > 1)[near])
            if not count:
                continue
            parts = (found, peer, best, true, counted, jumps, drops)
            found, peer, best, true, counted, jumps, drops = (np.concatenate(part) for part in parts)
            rows.append(Row("repeats", f"{family}, {quality}", "F1", f1(found[counted], true[counted]), ">= 0.95",
                            {"mpdecimate": f1(peer[counted], true[counted]), "oracle": f1(best[counted], true[counted])}, count))
            if family != "slow pan":
                hits = (jumps & drops).sum()
                for metric, value, goal in (("F1", f1(jumps, drops), ">= 0.9"), ("precision", hits / max(1, jumps.sum()), ""),
                                            ("recall", hits / max(1, drops.sum()), "")):
                    rows.append(Row("jumps", f"{family}, {quality}", metric, float(value), goal, None, count))
    still, seen = [], 0
    for family in FAMILIES:
        for clip in clips(bench, family):
            for crf in (0, 23):
                shown = degrade.coded(clip, crf) if crf else clip
                got = timing.analyse(film.from_clip(shown))
                counted = moves(clip, np.arange(len(clip.y)))
                still.append([(got.duplicate & counted).mean(), len(got.jumps) / len(clip.y)])
                seen += 1
    for k, name in enumerate(("repeats", "jumps")):
        rows.append(Row(name, "untouched clips", "false alarms a picture", mean(np.array(still)[:, k]), "<= 0.001", None, seen))
    return rows


def _sheet(bench: Bench, bad: Clip, found: np.ndarray, true: np.ndarray) -> None:
    """A strip of pictures around a repeat, with what was found of each and what is so."""
    at = int(np.flatnonzero(true)[0])
    tiles = [(f"{'repeat' if found[i] else 'new'} / {'repeat' if true[i] else 'new'}", bad.y[i][40:160:1, 200:360])
             for i in range(max(0, at - 2), at + 2)]
    sheet(bench.pictures / "repeats.png", tiles)
