"""Every score against known change: clips as they are beside the same clips with a pan, a shake, a blur, a comb ... planted.

    python benchmarks/scores.py [--quick]

Procedural scenes (their scrolling text is why text is judged on real clips alone), the real clips of `benchmarks/clean.py --fetch`
and, where out/footage/film.mp4 is there, spans of Big Buck Bunny. All go through H.264 at crf 20. AUC is the chance that a clip
with the planted change scores above one without it. Writes benchmarks/results/scores.json; no footage is kept.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from cleanbench import common  # noqa: E402
from peer import facts, table, write  # noqa: E402

from data_tools import degrade, film, filter, measure, score  # noqa: E402
from data_tools.film import Clip  # noqa: E402
from data_tools.manifest import Job  # noqa: E402
from latte import keyed  # noqa: E402

FRAMES = 48
WORDS = "a man woman dog cat walks runs in the park street red blue car city at night with people sitting table close up of"
FILM = common.FOOTAGE / "film.mp4"  # Big Buck Bunny
TOLD = tuple(name for name in score.OF_TRACE if name != "phash")


def clips(quick: bool) -> Iterator[tuple[str, str, Clip]]:
    """(family, name, clip), each within one shot."""
    for family, name, clip in common.Bench(quick).clips(("synth", "bbb", "bikes", "car", "city"), FRAMES, 4):
        yield family, name, clip
    if FILM.exists():
        for at in range(40, 480, 110 if quick else 70):
            clip = film.to_clip(film.read(FILM, at, at + FRAMES / 24), FRAMES)
            change = np.abs(np.diff(clip.y[:, ::8, ::8].astype(np.int16), axis=0)).mean((1, 2))
            if change.max() < 6 * np.median(change) + 2:  # no cut
                yield "film", f"film{at}", degrade.rescaled(clip, 0.5, "area")


# Planted changes

def moved(clip: Clip, path: np.ndarray) -> Clip:
    """Pictures moved by path [f 2] pixels, enlarged a little so that no edge shows."""
    f, h, w = clip.y.shape
    grow = 1.12

    def warped(planes):
        scale = planes.shape[2] / w
        out = []
        for plane, (dx, dy) in zip(planes, path * scale, strict=True):
            around = np.float32([[grow, 0, dx - (grow - 1) * plane.shape[1] / 2], [0, grow, dy - (grow - 1) * plane.shape[0] / 2]])
            out.append(cv2.warpAffine(plane, around, plane.shape[::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE))
        return np.stack(out)

    return clip.each(warped)


def shaken(clip: Clip, seed: int, pixels: float, hertz: float | None = None) -> Clip:
    """Moved by noise from picture to picture, or to and fro, by `pixels` rms."""
    rng, t = keyed.rng(seed, "shake"), np.arange(len(clip.y)) / 25.0
    if hertz is None:
        return moved(clip, rng.normal(0, pixels / np.sqrt(2), (len(t), 2)))
    return moved(clip, np.stack([np.sin(2 * np.pi * (hertz * t + rng.random())) for _ in range(2)], 1) * pixels)


def panned(clip: Clip, speed: tuple[float, float], frames: int = FRAMES) -> Clip:
    """A pan of `speed` pixels a picture over the middle of an enlarged first picture."""
    y, u, v = (np.stack([plane[0]] * frames) for plane in clip[:3])
    t = np.arange(frames) - frames / 2

    def warped(planes):
        scale, out = 2.2, []
        for plane, at in zip(planes, t, strict=True):
            h, w = plane.shape
            unit = w / clip.y.shape[2]
            way = np.float32([[scale, 0, -(scale - 1) * w / 2 + speed[0] * at * unit],
                              [0, scale, -(scale - 1) * h / 2 + speed[1] * at * unit]])
            out.append(cv2.warpAffine(plane, way, (w, h), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101))
        return np.stack(out)

    return Clip(y, u, v, np.arange(frames) / 25.0).each(warped)


def blurred(clip: Clip, sigma: float) -> Clip:
    return clip.each(lambda planes: np.stack([cv2.GaussianBlur(plane, (0, 0), sigma) for plane in planes]))


def enlarged(clip: Clip, scale: float) -> Clip:
    """Shrunk and brought back to its size: what an upscaled clip looks like."""
    return clip.each(lambda planes: np.stack([cv2.resize(cv2.resize(
        plane, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), plane.shape[::-1], interpolation=cv2.INTER_CUBIC)
        for plane in planes]))


def lit(clip: Clip, gain: float) -> Clip:
    y = 16 + (clip.y.astype(np.float32) - 16) * gain
    return clip._replace(y=np.clip(np.rint(y), 16, 235).astype(np.uint8))


def branded(clip: Clip, alpha: float) -> Clip:
    """A logo of letters in a ring in the upper right corner."""
    f, h, w = clip.y.shape
    size, mark = h // 6, np.zeros((h, w), np.uint8)
    centre = (w - int(size * 0.8), int(size * 0.7))
    cv2.circle(mark, centre, size // 3, 255, max(size // 16, 1), cv2.LINE_AA)
    cv2.putText(mark, "TV", (centre[0] - size // 5, centre[1] + size // 9), cv2.FONT_HERSHEY_SIMPLEX, size / 130, 255,
                max(size // 30, 1), cv2.LINE_AA)
    share = alpha * mark.astype(np.float32) / 255
    return clip._replace(y=np.rint(clip.y * (1 - share) + 235 * share).astype(np.uint8))


def repeated(clip: Clip, seed: int, share: float) -> Clip:
    """So many of the pictures show the one before again."""
    again = keyed.rng(seed, "repeat").random(len(clip.y)) < share
    again[0] = False
    number = np.maximum.accumulate(np.where(again, 0, np.arange(len(again))))
    return clip.take(number)._replace(at_s=clip.at_s)


def frozen(clip: Clip) -> Clip:
    """The second half stands still."""
    half = len(clip.y) // 2
    return clip.take(np.minimum(np.arange(len(clip.y)), half))._replace(at_s=clip.at_s)


# condition -> (scores, family that it is not for, clip and seed -> clip)
PLANTED = {
    "shake of 1.5 px": (("camera_shake",), "", lambda clip, seed: shaken(clip, seed, 1.5)),
    "shake of 3 px, 4 Hz": (("camera_shake",), "", lambda clip, seed: shaken(clip, seed, 3.0, 4.0)),
    "blur of 1.5 px": (("sharpness",), "", lambda clip, _: blurred(clip, 1.5)),
    "enlarged twice": (("sharpness",), "", lambda clip, _: enlarged(clip, 0.5)),
    "a third of the light": (("exposure",), "", lambda clip, _: lit(clip, 0.33)),
    "60 levels darker": (("clipped_dark",), "", lambda clip, _: clip._replace(y=np.maximum(clip.y, 76) - 60)),
    "twice the light": (("exposure", "clipped_bright"), "", lambda clip, _: lit(clip, 2.0)),
    "flicker of 8 %": (("flicker",), "", lambda clip, seed: degrade.flicker(clip, seed, 0.08)[0]),
    "flicker of 3 %": (("flicker",), "", lambda clip, seed: degrade.flicker(clip, seed, 0.03)[0]),
    "15 % repeated": (("freeze",), "", lambda clip, seed: repeated(clip, seed, 0.15)),
    "half frozen": (("freeze",), "", lambda clip, _: frozen(clip)),
    "caption": (("text_area",), "synth", lambda clip, _: degrade.captioned(clip, "AN UNLUCKY BIRD", size=1.2)[0]),
    "ticker": (("text_area",), "synth", lambda clip, _: degrade.ticker(
        clip, "BREAKING NEWS THE WEATHER STAYS FINE UNTIL TUESDAY", 3.0, clip.y.shape[1] // 10, 8, clip.y.shape[2] / 2)[0]),
    "logo": (("logos",), "", lambda clip, _: branded(clip, 1.0)),
    "half transparent logo": (("logos",), "", lambda clip, _: branded(clip, 0.5)),
    "woven": (("residual_comb",), "", lambda clip, _: degrade.weave(clip)),
    "woven, x0.75": (("residual_comb",), "", lambda clip, _: degrade.rescaled(degrade.weave(clip), 0.75)),
    "woven, x1.5": (("residual_comb",), "", lambda clip, _: degrade.rescaled(degrade.weave(clip), 1.5)),
}


def scored(clip: Clip, names: tuple[str, ...], crf: int = 20, codec: str = "libx264", bit_rate: int = 0) -> dict:
    """What score.py says of a clip in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mkv"
        degrade.encode(clip, str(path), crf, codec, bit_rate=bit_rate)
        return score.of_file(path, 0.0, float(clip.at_s[-1] + 1 / clip.rate), list(names), score.Settings(), {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few clips, nothing written")
    quick = parser.parse_args().quick
    cv2.setNumThreads(1)
    begun, rows = time.process_time(), []

    def row(what: str, change: str, metric: str, value: float, goal: str = "", count: int = 0) -> None:
        rows.append({"score": what, "change": change, "metric": metric, "value": value, "goal": goal, "clips": count})
        print(f"{what:18} {change:26} {metric:34} {value:9.4g} {goal:8} {count}", flush=True)

    plain, planted, hashes, stills = defaultdict(dict), defaultdict(dict), {}, []
    for number, (family, name, clip) in enumerate(clips(quick)):
        names = (*TOLD, "phash", "faces", "nsfw", *(() if family == "synth" else ("text_area",)))
        plain[name] = scored(clip, names) | {"family": family}
        hashes[name] = (plain[name]["phash"], scored(degrade.rescaled(clip, 0.75, "area"), ("phash",), 32)["phash"])
        stills.append(clip.take(slice(0, 1)))
        for change, (which, never, plant) in PLANTED.items():
            if family != never:
                planted[change][name] = scored(plant(clip, number), which)
        print(name, {key: round(value, 4) for key, value in plain[name].items() if key not in ("phash", "family")}, flush=True)

    for change, (which, _, _) in PLANTED.items():
        for what in which:
            pairs = [(planted[change][name][what], plain[name][what]) for name in planted[change]
                     if what in planted[change][name] and what in plain[name]]
            values = np.array([value for pair in zip(*pairs, strict=True) for value in pair])
            true = np.arange(len(values)) < len(pairs)
            down = what == "sharpness" or (what == "exposure" and change.startswith("a third"))
            row(what, change, "AUC", measure.auc(-values if down else values, true), ">= 0.95", len(pairs))
    dark = [abs(planted["a third of the light"][name]["exposure"] - 0.33 * plain[name]["exposure"]) for name in plain]
    row("exposure", "a third of the light", "mean error", float(np.mean(dark)), "<= 0.02", len(dark))
    row("freeze", "half frozen", "mean error of the share", float(np.mean([abs(
        planted["half frozen"][name]["freeze"] - (0.5 + plain[name]["freeze"] / 2)) for name in plain])), "<= 0.05", len(plain))

    motions(row, stills[:2] if quick else stills)
    near = [distance(a, b) for a, b in hashes.values()]
    far = [distance(hashes[a][0], hashes[b][1]) for a in hashes for b in hashes
           if a < b and plain[a]["family"] != plain[b]["family"]]
    row("phash", "x0.75, crf 32", "bits of 64 that differ, most", float(max(near)), "<= 10", len(near))
    row("phash", "other films", "bits of 64 that differ, least", float(min(far)), ">= 16", len(far))
    for what, change, families, goal in (
            ("faces", "a talking head", ("car",), "1"), ("faces", "city, procedural: most", ("city", "synth"), "0"),
            ("nsfw", "real, procedural: most", ("car", "city", "bikes", "synth"), "< 0.1"),
            ("nsfw", "Big Buck Bunny: most", ("bbb", "film"), "< 0.1")):
        values = [found[what] for found in plain.values() if found["family"] in families]
        if values:
            row(what, change, "faces" if what == "faces" else "certainty", max(values), goal, len(values))
    cost(row, quick)
    if not quick:
        write(ROOT / "benchmarks" / "results" / "scores.json",
              facts() | {"process_s": round(time.process_time() - begun), "rows": rows})
    print(table(["score", "change", "figure", "ours", "goal", "clips"],
                [[r["score"], r["change"], r["metric"], f"{r['value']:.4g}", r["goal"], r["clips"]] for r in rows]))
    return 0


def motions(row, stills: list[Clip]) -> None:
    """Pans of known speed, in % of the width a second, by the codec's vectors and, in a codec without them, by flow."""
    for codec, rate, words in (("libx264", 0, "pans, by vectors"), ("ffv1", 0, "pans, by flow")):
        errors, found, truth = [], [], []
        for number, still in enumerate(stills):
            speed = keyed.rng(number, "pan").uniform(-1, 1, 2)
            speed *= (0.3, 0.8, 1.5, 3, 5)[number % 5] / np.hypot(*speed)
            true = float(np.hypot(*speed)) / still.y.shape[2] * 100 * 25
            found.append(scored(panned(still, tuple(speed)), ("motion",), 20, codec, rate)["motion"])
            truth.append(true)
            errors.append(abs(found[-1] / true - 1))
        row("motion", words, "median error, share", float(np.median(errors)), "<= 0.1", len(errors))
        row("motion", words, "correlation", float(np.corrcoef(found, truth)[0, 1]), ">= 0.98", len(errors))


def distance(a: str, b: str) -> float:
    """Mean bits that two hashes of four pictures differ by."""
    return float(np.mean([(int(x, 16) ^ int(y, 16)).bit_count() for x, y in zip(a.split(","), b.split(","), strict=True)]))


def cost(row, quick: bool) -> None:
    """CPU seconds of a clip of 16 s, and of 100,000 rows of which no file is opened."""
    clip = degrade.synth(9_100, 80 if quick else 400)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        degrade.encode(clip, str(path), 23, form="mp4")
        listed = {"id": "0", "path": "clip.mp4", "start_s": 0.0, "end_s": len(clip.y) / 25, "caption": "a wheel turns"}
        score.scored(listed, Path(folder), score.Settings())  # loads the networks
        for words, names in (("all scores", tuple(score.SCORES)),
                             ("without networks", tuple(set(score.SCORES) - set(score.NETWORKS) - {"residual_comb"})),
                             ("decoding alone", ())):
            taken = []
            for _ in range(3):
                before = time.process_time()
                if names:
                    score.scored(listed, Path(folder), score.Settings(names))
                else:
                    sum(1 for _ in film.read(path))
                taken.append(time.process_time() - before)
            row("cost", f"16 s, 640x360: {words}", "CPU seconds, least of 3", min(taken), "<= 1.5" if "all" in words else "")
    words, rng = WORDS.split(), keyed.rng(0, "captions")
    rows = [{"id": f"{i:064x}", "path": "x.mp4", "start_s": 0.0, "end_s": float(rng.uniform(2, 20)), "scores": {}, "tags": {},
             "caption": " ".join(rng.choice(words, 12)), "edits": [], "dropped": None} for i in range(2_000 if quick else 100_000)]
    alone = score.Settings(("length_s", "caption_words", "language", "repaired_share", "repair_confidence"))
    before = time.process_time()
    done = score.work(rows, Job(Path("."), alone))
    row("cost", f"{len(rows)} rows: five scores of the row", "CPU seconds", time.process_time() - before)
    before = time.process_time()
    filter.work(done, Job(Path("."), filter.Settings({"length_s": [4.0, None], "caption_words": [3, 60]}, ["en"])))
    row("cost", f"{len(rows)} rows: filter", "CPU seconds", time.process_time() - before)
    row("cost", "all of this program", "peak MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    sys.exit(main())
