"""What is drawn over the picture: bars beside FFmpeg's cropdetect, tickers beside bwdif, burned text beside delogo."""

import re
import subprocess
from collections.abc import Iterator

import cv2
import numpy as np

from cleanbench.common import Bench, Row, mean, sheet, through_filters
from data_tools import bars, degrade, overlay, ticker
from data_tools.film import Clip, Film, from_clip, to_clip
from data_tools.measure import f1, psnr
from latte import keyed

FAMILIES = ("synth", "bbb", "bikes", "car", "city")
NEWS = "BREAKING NEWS 1234 THE QUICK BROWN FOX 56"
TICKER_HEIGHT, TICKER_BOTTOM = 36, 8


def score(bench: Bench) -> list[Row]:
    return _bars(bench) + _tickers(bench) + _texts(bench) + _untouched(bench)


# Bars

def _dark(clip: Clip) -> Clip:
    dim = (16 + (clip.y.astype(np.float32) - 16) * 0.25).astype(np.uint8)
    return clip._replace(y=dim)


def _noisy(clip: Clip) -> Clip:
    noise = keyed.rng(1, "bars").normal(0, 6, clip.y.shape)
    return clip._replace(y=np.clip(clip.y + noise, 0, 255).astype(np.uint8))


def _signed(clip: Clip, top: int) -> Clip:
    y, size = clip.y.copy(), top / 60
    for plane in y:
        cv2.putText(plane, "TV 1", (plane.shape[1] * 3 // 4, top * 3 // 4), cv2.FONT_HERSHEY_SIMPLEX, size, 235, 1)
    return clip._replace(y=y)


def _barred(clip: Clip, kind: str) -> Iterator[tuple[str, Clip, tuple[int, int, int, int]]]:
    h, w = clip.y.shape[1:]
    top, left = h // 16 * 2, w // 20 * 2
    for t, l in ((top, 0), (0, left), (top, left)):
        yield "plain", *degrade.barred(clip, kind, t, l)
    for t, l in ((top, 0), (0, left)):
        given, box = degrade.barred(_dark(clip), kind, t, l)
        yield "dark", given, box
        given, box = degrade.barred(clip, kind, t, l)
        yield "noise 6", _noisy(given), box
        for crf in (18, 28):
            yield f"crf {crf}", degrade.coded(given, crf), box
    given, box = degrade.barred(clip, kind, top, 0)
    yield "logo", _signed(given, top), box


def _ffmpeg(clip: Clip, filters: str, form: str) -> subprocess.CompletedProcess:
    """What imageio-ffmpeg's binary gives for raw pictures through a filter; some filters are not in PyAV."""
    import imageio_ffmpeg
    f, h, w = clip.y.shape
    raw = b"".join(y.tobytes() + u.tobytes() + v.tobytes() for y, u, v in zip(clip.y, clip.u, clip.v, strict=True))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{w}x{h}", "-i", "-",
               "-vf", filters, "-f", form, "-pix_fmt", "yuv420p", "-"]
    return subprocess.run(command, input=raw, capture_output=True, check=True)


def _cropdetect(clip: Clip) -> tuple[int, int, int, int]:
    """The box (top, left, bottom, right) that FFmpeg's cropdetect ends at."""
    f, h, w = clip.y.shape
    told = _ffmpeg(clip, "cropdetect=round=2", "null").stderr.decode()
    found = re.findall(r"crop=(\d+):(\d+):(\d+):(\d+)", told)
    if not found:
        return 0, 0, h, w
    width, height, left, top = (int(number) for number in found[-1])
    return top, left, top + height, left + width


def _bars(bench: Bench) -> list[Row]:
    right: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    for _, name, clip in bench.clips(FAMILIES, frames=30, count=2):
        if clip.y.shape[1] % 2:
            continue
        for kind in degrade.BARS:
            for setting, given, box in _barred(clip, kind):
                ours, whole = bars.find(from_clip(given)), (0, 0, *clip.y.shape[1:])
                found = ours[:4] if ours else whole
                peer = _cropdetect(given)
                near = [max(abs(a - b) for a, b in zip(one, box, strict=True)) <= 4 for one in (found, peer)]
                right.setdefault((kind, setting), []).append(tuple(near))
                if bench.pictures and kind == "blurred" and setting == "plain" and name in ("synth0", "bbb0") and box[0]:
                    top, left, bottom, right_ = found
                    peer_box = given.y[0][peer[0]:peer[2], peer[1]:peer[3]]
                    tiles = [("before", given.y[0]), ("cropdetect", _framed(peer_box, given.y[0].shape)),
                             ("ours", _framed(given.y[0][top:bottom, left:right_], given.y[0].shape)),
                             ("truth", _framed(clip.y[0][box[0]:box[2], box[1]:box[3]], given.y[0].shape))]
                    sheet(bench.pictures / "bars.png", [(word, cv2.resize(y, None, fx=0.4, fy=0.4, interpolation=cv2.INTER_AREA))
                                                        for word, y in tiles])
    rows = []
    for kind in degrade.BARS:
        every = [pair for (k, _), pairs in right.items() if k == kind for pair in pairs]
        hard = [pair for (k, setting), pairs in right.items() if k == kind and setting != "plain" for pair in pairs]
        for setting, pairs in (("all", every), ("dark, noise, logo, coded", hard)):
            ours, peer = (mean(side) for side in zip(*pairs, strict=True))
            peers = {"cropdetect": peer}
            rows.append(Row("bars", f"{kind}, {setting}", "share right within 4 px", ours, ">= 0.98", peers, len(pairs)))
    return rows


def _framed(y: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A cropped picture in the middle of white."""
    out = np.full(shape, 255, np.uint8)
    top, left = (shape[0] - y.shape[0]) // 2, (shape[1] - y.shape[1]) // 2
    out[top:top + y.shape[0], left:left + y.shape[1]] = y
    return out


# Tickers

def _tickers(bench: Bench) -> list[Row]:
    gains: dict[str, list[tuple[float, ...]]] = {}
    for _, name, scene in bench.clips(("synth", "bbb", "car", "city"), frames=120, count=2):
        h, w = scene.y.shape[1:]
        if len(scene.y) < 100 or w < 400:
            continue
        n, scene = len(scene.y), scene.timed(24)
        for speed in (6.0, 4.3):
            source, _ = degrade.ticker(scene, NEWS, speed, TICKER_HEIGHT, TICKER_BOTTOM, x0=w * 0.5)
            given, _ = degrade.blended(source, 30, 24)
            truth, _ = degrade.ticker(scene.take(np.minimum(np.arange(len(given.y)), n - 1)).timed(30), NEWS, speed * 0.8,
                                      TICKER_HEIGHT, TICKER_BOTTOM, x0=w * 0.5)
            woven, plain = degrade.weave(source), source.take(slice(0, n // 2 * 2, 2))
            for setting, damaged, wanted, step in (("24 -> 30 blend", given, truth, speed * 0.8),
                                                   ("weave", woven, plain, speed * 2)):
                for coded in ("", ", crf 23"):
                    seen = degrade.coded(damaged, 23) if coded else damaged
                    outcome = ticker.ticker(from_clip(seen))
                    ours = to_clip(outcome.film)
                    peer = through_filters(seen, "bwdif=mode=send_frame:parity=tff") if setting == "weave" else seen
                    gains.setdefault(setting + coded, []).append(
                        tuple(_strip_psnr(clip, wanted) for clip in (seen, ours, peer))
                        + tuple(_character_errors(clip, w * 0.5, step) for clip in (seen, ours, peer)))
                    if bench.pictures and coded and name == "synth0" and speed == 6.0:
                        cut = np.s_[42, -TICKER_HEIGHT - TICKER_BOTTOM:-TICKER_BOTTOM, :300]
                        tiles = {"before": seen} | ({"bwdif": peer} if setting == "weave" else {}) | {"ours": ours, "truth": wanted}
                        sheet(bench.pictures / f"ticker_{setting.split()[-1]}.png", [(word, c.y[cut]) for word, c in tiles.items()])
    rows = []
    for setting, values in gains.items():
        before, ours, peer, errors_before, errors, errors_peer = (mean(part) for part in zip(*values, strict=True))
        peers = {"input": before} | ({"bwdif": peer} if "weave" in setting else {})
        rows.append(Row("ticker", setting, "strip PSNR, dB", ours, f">= {before + 8:.1f}", peers, len(values)))
        peers = {"input": errors_before} | ({"bwdif": errors_peer} if "weave" in setting else {})
        rows.append(Row("ticker", setting, "character error rate", errors, "<= 0.01", peers, len(values)))
    return rows


def _strip_psnr(clip: Clip, truth: Clip) -> float:
    n = min(len(clip.y), len(truth.y))
    band = np.s_[:n, -TICKER_HEIGHT - TICKER_BOTTOM:-TICKER_BOTTOM]
    return psnr(clip.y[band], truth.y[band], cap=60.0)


def _character_errors(clip: Clip, start: float, step: float) -> float:
    """Edit distance between what OCR reads and the text, over its length; the strip is laid together from single pictures."""
    f, h, w = clip.y.shape
    band = clip.y[:, h - TICKER_HEIGHT - TICKER_BOTTOM:h - TICKER_BOTTOM]
    (length, _), _ = cv2.getTextSize(NEWS, cv2.FONT_HERSHEY_SIMPLEX, 1.0, 2)
    strip = np.full((TICKER_HEIGHT, length + 16), 40, np.uint8)
    seen, i = 0, 0
    while seen < strip.shape[1] and i < f:  # the picture before the next column would leave the middle
        at = start - step * i  # where the strip begins in picture i
        if round(at) + seen <= w // 4 or i == f - 1:
            last = min(strip.shape[1], int(w * 0.95 - at))
            columns = np.arange(seen, max(last, seen))
            inside = columns[(columns + round(at) >= 0) & (columns + round(at) < w)]
            strip[:, inside] = band[i][:, inside + round(at)]
            seen = max(last, seen)
        i += 1
    text, _ = overlay._read(np.pad(cv2.resize(strip, None, fx=2, fy=2), 8, constant_values=40))
    a, b = NEWS.replace(" ", ""), text.replace(" ", "").upper()
    row = list(range(len(b) + 1))
    for x, letter in enumerate(a, 1):
        row, before = [x], row
        for y, other in enumerate(b, 1):
            row.append(min(before[y] + 1, row[-1] + 1, before[y - 1] + (letter != other)))
    return row[-1] / len(a)


# Burned text

def _texts(bench: Bench) -> list[Row]:
    boxes, cuts, fills, whole = [], [], {"text": [], "logo": []}, {"text": [], "logo": []}
    for _, name, clip in bench.clips(FAMILIES, frames=60, count=3):
        if len(clip.y) < 40:
            continue
        low, box = degrade.captioned(clip, "The quick fox runs", 0, 40, top=0.85)
        film = from_clip(degrade.coded(low, 23))
        boxes.append(_hit(film, box))
        middle, box = degrade.captioned(clip, "In the middle now", top=0.45)
        boxes.append(_hit(from_clip(degrade.coded(middle, 23)), box))
        outcome = overlay.overlay(from_clip(low))
        if outcome.verdict == "cropped":
            out = to_clip(outcome.film).y
            cuts.append(psnr(out, clip.y[:, :out.shape[1], :out.shape[2]]))
        logo, corner = degrade.captioned(clip, "CHANNEL 7", top=0.3, size=0.7, alpha=0.6)
        for kind, given, where in (("text", middle, box), ("logo", logo, corner)):
            changed = np.abs(given.y.astype(np.int16) - clip.y) > 8
            outcome = overlay.overlay(from_clip(given))
            if outcome.verdict == "left":
                whole[kind].append((psnr(given.y, clip.y),) * 2)
            if outcome.verdict != "filled":
                continue
            ours, peer = to_clip(outcome.film).y, _delogo(given, where)
            whole[kind].append((psnr(ours, clip.y), psnr(given.y, clip.y)))
            fills[kind].append(tuple(psnr(y, clip.y, changed) for y in (ours, given.y, peer)))
            if bench.pictures and kind == "text" and name in ("synth0", "bbb0"):
                cut = np.s_[20, max(where[0] - 30, 0):where[2] + 30, max(where[1] - 10, 0):where[3] + 10]
                tiles = (("before", given.y), ("delogo", peer), ("ours", ours), ("truth", clip.y))
                sheet(bench.pictures / "text.png", [(word, y[cut]) for word, y in tiles])
    hits, extra = (np.array(side) for side in zip(*boxes, strict=True))
    found = np.concatenate([hits, np.ones(extra.sum(), bool)])
    true = np.concatenate([np.ones(len(hits), bool), np.zeros(extra.sum(), bool)])
    rows = [Row("burned text", "crf 23, IoU >= 0.5", "box F1", f1(found, true), "", None, len(boxes)),
            Row("burned text", "subtitle, cut off", "PSNR of what is left, dB", mean(cuts), "", None, len(cuts))]
    for kind, values in fills.items():
        if values:
            ours, given, peer = (mean(side) for side in zip(*values, strict=True))
            peers = {"input": given, "delogo": peer}
            rows.append(Row("burned text", f"{kind} filled", "PSNR in mask, dB", ours, "", peers, len(values)))
    for kind, values in whole.items():
        if values:
            ours, given = (np.array(side) for side in zip(*values, strict=True))
            name, count = f"{kind}, {np.mean(ours != given):.0%} filled, the others left", len(values)
            rows += [Row("burned text", name, "PSNR of the picture, dB", mean(ours), ">= input", {"input": mean(given)}, count),
                     Row("burned text", name, "share no worse than before", np.mean(ours >= given), ">= 0.98", None, count)]
    return rows


def _hit(film: Film, box: tuple[int, int, int, int]) -> tuple[bool, int]:
    """Whether the box is among what is found, and how many others are."""
    shared = [track.box.shared(overlay.Box(*box)) >= 0.5 for track in overlay.find(film)[0]]
    return any(shared), len(shared) - sum(shared)


def _delogo(clip: Clip, box: tuple[int, int, int, int]) -> np.ndarray:
    """Luma [f h w] through FFmpeg's delogo, told the place."""
    f, h, w = clip.y.shape
    top, left, bottom, right = max(box[0], 1), max(box[1], 1), min(box[2], h - 1), min(box[3], w - 1)
    raw = _ffmpeg(clip, f"delogo=x={left}:y={top}:w={right - left - 1}:h={bottom - top - 1}", "rawvideo").stdout
    return np.frombuffer(raw, np.uint8).reshape(f, h * 3 // 2, w)[:, :h]


# Do no harm

def _untouched(bench: Bench) -> list[Row]:
    kept = {"bars": [], "ticker": [], "burned text": []}
    for _, _, clip in bench.clips(FAMILIES, frames=60, count=5):
        for setting in (clip, _dark(clip), degrade.coded(clip, 28)):
            film = from_clip(setting)
            for item, stage in (("bars", bars.bars), ("ticker", ticker.ticker), ("burned text", overlay.overlay)):
                kept[item].append(stage(film).film is film)
    return [Row(item, "clean, dark and crf 28 clips", "share left untouched", mean(values), ">= 0.99", None, len(values))
            for item, values in kept.items()]
