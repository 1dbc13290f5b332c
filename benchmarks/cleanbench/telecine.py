"""Inverse telecine and mixed pictures, beside FFmpeg's fieldmatch, decimate and pullup, and an oracle that knows the fields."""

import subprocess

import numpy as np

from cleanbench.common import Bench, Row, mean, sheet, through_filters
from data_tools import degrade, film
from data_tools.film import Clip
from data_tools.measure import matched, psnr
from data_tools.repair import blend, telecine

CUTS = ((61, 1), (140, 2), (221, 3))  # fields left out after the pulldown
ALIKE_DB = 40.0  # true pictures closer than this cannot be told apart once coded


def quality(out: Clip, truth: Clip, count: int) -> tuple[float, float, float]:
    """5th percentile of PSNR of the best `count` pictures, share of true pictures present, share of repeats.

    count: how many pictures have both fields; one of a single field has to be filled. A drawn film's own repeats do not count."""
    path, values = _shown(out, truth)
    alike = np.array([False] + [psnr(a, b) > ALIKE_DB for a, b in zip(truth.y, truth.y[1:], strict=False)])
    group = np.cumsum(~alike)  # pictures of one number show the same
    shown = group[path]
    spare = {number: int((group == number).sum()) for number in set(group)}
    repeats = sum(max(0, int((shown == number).sum()) - spare[number]) for number in set(shown))
    return float(np.percentile(sorted(values)[-count:], 5)), len(set(shown)) / len(spare), repeats / len(out.y)


def _shown(out: Clip, truth: Clip) -> tuple[np.ndarray, list[float]]:
    """The number of the true picture that each shows, and its PSNR: of neighbours, small pictures tell only whole ones apart."""
    path, values = [], []
    for picture, place in zip(out.y, matched(out.y, truth.y), strict=True):
        near = {i: psnr(picture, truth.y[i]) for i in range(max(0, place - 1), min(len(truth.y), place + 2))}
        path.append(max(near, key=near.get))
        values.append(near[path[-1]])
    return np.array(path), values


def oracle(pulled: Clip, pairs: list[tuple[int, int]], truth: Clip) -> list[float]:
    """PSNR of the pictures woven of the first two fields of each, top field first."""
    numbers = [number for pair in pairs for number in pair]
    values = []
    for k in range(len(numbers) - 1):
        if numbers[k] == numbers[k + 1] and (k == 0 or numbers[k - 1] != numbers[k]):
            picture = truth.y[numbers[k]].copy()
            for j in (k, k + 1):
                picture[j % 2::2] = pulled.y[j // 2][j % 2::2]
            values.append(psnr(picture, truth.y[numbers[k]]))
    return values


def pullup(clip: Clip) -> Clip | None:
    """FFmpeg's pullup, and fps to the film's rate, by the binary of imageio_ffmpeg; None where it is not installed."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        return None
    f, h, w = clip.y.shape
    raw = b"".join(np.concatenate([y.ravel(), u.ravel(), v.ravel()]).tobytes() for y, u, v, _ in zip(*clip, strict=True))
    command = [get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{w}x{h}", "-r", "30", "-i", "-",
               "-vf", "pullup,fps=24", "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    out = np.frombuffer(subprocess.run(command, input=raw, stdout=subprocess.PIPE, check=True).stdout, np.uint8)
    y = out.reshape(-1, h, w)
    return Clip(y, y[:, ::2, ::2], y[:, ::2, ::2], np.arange(len(y)) / 24)


def pulldowns(bench: Bench) -> list[Row]:
    rows = []
    for label, cuts, crf, families in (("2:3, clean", (), 0, ("synth", "bbb", "bikes")),
                                       ("2:3 with 3 breaks, crf 23", CUTS, 23, ("synth",)),
                                       ("2:3 with 3 breaks, crf 23", CUTS, 23, ("bbb",)),
                                       ("2:3 with a break, crf 23", CUTS[:1], 23, ("bikes", "car", "city"))):
        got: dict[str, list] = {name: [] for name in ("ours", "fieldmatch", "pullup")}
        best, combed = [], 0
        for _, name, clip in bench.clips(families, 120, 2):
            clip = clip.timed(24)
            if len(clip.y) < 45:
                continue
            pulled = degrade.telecine(clip, "2:3", cuts=cuts)
            bad = degrade.coded(pulled.clip, crf) if crf else pulled.clip
            ideal = oracle(bad, pulled.pairs, clip)
            best.append(float(np.percentile(ideal, 5)))
            ours = film.to_clip(telecine.inverse(film.from_clip(bad), "tff"))
            peer = through_filters(bad, "fps=25,fieldmatch=order=tff:combmatch=full,decimate")
            for key, out in (("ours", ours), ("fieldmatch", peer), ("pullup", pullup(bad))):
                if out is not None:
                    got[key].append(quality(out, clip, len(ideal)))
            path = matched(ours.y, clip.y)
            combed += sum(_teeth(a) > 2 * _teeth(clip.y[i]) + 20 for a, i in zip(ours.y, path, strict=True))
            if bench.pictures and crf and name == "bbb0":
                _sheet(bench, bad, peer, ours, clip)
        if not got["ours"]:
            continue
        setting = f"{label}, {', '.join(families)}"
        for k, (metric, goal) in enumerate((("p5 PSNR dB", "oracle - 0.1"), ("cover", ">= 0.97"), ("repeats", "<= 0.002"))):
            peers = {key: mean(values[k] for values in got[key]) for key in ("fieldmatch", "pullup") if got[key]}
            peers |= {"oracle": mean(best)} if k == 0 else {}
            rows.append(Row("telecine", setting, metric, mean(values[k] for values in got["ours"]), goal, peers, len(best)))
        rows.append(Row("telecine", setting, "combed pictures left", combed, "0", None, len(best)))
    return rows


def _teeth(y: np.ndarray) -> float:
    return float(telecine._combs(y[0::2], y[1::2]).max())


def _sheet(bench: Bench, bad: Clip, peer: Clip, ours: Clip, truth: Clip) -> None:
    at = next(i for i in range(12, len(bad.y)) if _teeth(bad.y[i]) > 40)
    target = truth.y[matched(bad.y, truth.y)[at]]
    near = [clip.y[int(np.argmin([np.square(y.astype(float) - target).mean() for y in clip.y]))] for clip in (peer, ours)]
    crop = np.s_[60:220, 200:420]
    sheet(bench.pictures / "telecine.png", list(zip(("before", "fieldmatch", "ours", "truth"),
                                                    (y[crop] for y in (bad.y[at], *near, target)), strict=True)))


def mixes(bench: Bench) -> list[Row]:
    rows = []
    untouched, seen = 0, 0
    for source, rate in ((24, 30), (24, 25), (25, 30)):
        for crf in (0, 23):
            before, after, found_all, count = [], [], 0, 0
            for _, name, clip in bench.clips(("synth", "bbb", "bikes"), 76, 2):
                clip = clip.timed(source)
                if len(clip.y) < 40:
                    continue
                bad, law = degrade.blended(clip, rate)
                bad = degrade.coded(bad, crf) if crf else bad
                shown = film.from_clip(bad)
                count += 1
                found = blend.analyse(shown)
                before.append(mean(psnr(y, clip.y[round(place)]) for y, place in zip(bad.y, law.sum(1), strict=True)))
                if found is None:
                    after.append(before[-1])
                    continue
                found_all += 1
                out = film.to_clip(blend.repair(shown, found))
                after.append(mean(psnr(y, clip.y[i]) for y, i in zip(out.y, matched(out.y, clip.y), strict=True)))
                if bench.pictures and not crf and name == "bbb0" and rate == 30:
                    at = int(np.abs(law[:, 1] - 0.5).argmin())
                    crop = np.s_[60:220, 200:420]
                    tiles = (bad.y[at], bad.y[at], out.y[int(law[at, 0])], clip.y[int(law[at, 0])])
                    sheet(bench.pictures / "blend.png", list(zip(("before", "no peer", "ours", "truth"), (y[crop] for y in tiles),
                                                                 strict=True)))
            setting = f"{source} -> {rate}, {f'crf {crf}' if crf else 'clean'}"
            rows.append(Row("blend", setting, "found", found_all / max(count, 1), ">= 0.99", None, count))
            rows.append(Row("blend", setting, "gain over the mixed pictures, dB", mean(np.subtract(after, before)),
                            ">= +2" if crf else ">= +6", {"in": mean(before), "out": mean(after)}, count))
    for _, _, clip in bench.clips(("synth", "bbb", "bikes", "car", "city"), 76, 4):
        for shown in (clip, degrade.coded(clip, 23), degrade.ghosted(clip, 0.5), clip.take(np.arange(len(clip.y)) * 4 // 5)):
            seen += 1
            untouched += blend.analyse(film.from_clip(shown)) is None
    rows.append(Row("blend", "clean, coded, ghosted, repeated", "left alone", untouched / max(seen, 1), ">= 0.99", None, seen))
    return rows


def score(bench: Bench) -> list[Row]:
    return pulldowns(bench) + mixes(bench)
