"""Trains the two heads and the network of data_tools/repair/baked.py on damage of our own making.

    python -m data_tools.repair.train_baked heads --out data_tools/repair/weights/baked.json
    python -m data_tools.repair.train_baked network --out data_tools/repair/weights/baked.safetensors

A sample is a short clip with a known answer: woven from twice as many pictures, rescaled and coded, or one of the things that are
mistaken for it: the same scene unwoven at the same scale, noise, fine textures, text, repeated, blended, averaged and trailed
pictures, fields on lines of their own. Scenes are procedural (`degrade.synth`), objects and cameras that move over photographs
(train_fill.fetch) and other still pictures, and real footage; no film and no seed of the bench is used.
Heads: 500 samples, 4 minutes on a core; prints what cross-validation reaches. Network: 20 minutes; gains 4.3 dB on strips held out.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from scipy.optimize import minimize
from torch import nn
from tqdm import tqdm

from data_tools import degrade, film
from data_tools.film import Clip
from data_tools.measure import auc, recall_at
from data_tools.repair.baked import (
    KERNELS,
    LEAST_UP,
    Look,
    Splitter,
    Way,
    amplitude,
    candidates,
    carrier,
    chosen,
    envelope,
    moments,
    native,
    spread,
)
from data_tools.repair.train_fill import PHOTOGRAPHS
from latte import keyed

FOOTAGE = (("city.mpg", 190), ("carphone_pristine.mp4", 120))  # files and how many pictures of them have no cut
SCALES = (0.5, 2 / 3, 0.75, 0.8, 5 / 6, 0.9, 1.125, 1.25, 4 / 3, 1.5, 1.875, 2.0)  # the usual ones; half of the samples draw others
LEAST_LEFT = 0.05  # share of a comb's strength: where kernel and codec left less, a sample is neither a comb nor clean
PASSING = 0.01  # share of clean clips that the head may take for combs; the gate and LEAST_SLOPE refuse half of them


@dataclass(frozen=True)
class Sample:
    """A clip and what was done to it; scale is of the woven picture, and 1 when it was not rescaled."""

    clip: Clip | None
    lines: int  # of the clip
    baked: bool
    kind: str
    scale: float
    how: str
    crf: int  # 0: not coded
    left: float  # share of the comb's strength that kernel and codec left; 0 where none was woven

    @property
    def erased(self) -> bool:
        return self.baked and self.left < LEAST_LEFT


@cache
def footage(folder: Path) -> list[Clip]:
    """Real clips to draw from; what is absent is left out."""
    return [film.to_clip(film.read(folder / name), last) for name, last in FOOTAGE if (folder / name).exists()]


@cache
def photographs(folder: Path) -> list[Path]:
    """Photographs to draw from, as train_fill.fetch gets them; none where it was not run."""
    return sorted(path for pattern in PHOTOGRAPHS for path in (folder / "photographs").glob(pattern))


def photograph(path: Path) -> Clip:
    """A clip of one picture of at most 960 columns."""
    image = cv2.imread(str(path))
    shrink = min(1.0, 960 / image.shape[1])
    h, w = (int(side * shrink) // 4 * 4 for side in image.shape[:2])
    planes = cv2.cvtColor(cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2YUV_I420)
    u, v = planes[h:].reshape(2, h // 2, w // 2)
    return Clip(planes[None, :h], u[None], v[None], np.zeros(1))


def source(seed: int, frames: int, height: int, width: int, folder: Path) -> Clip:
    """Pictures of a scene at the rate of fields, about height x width: procedural, real, or a real still and a moving camera."""
    rng = keyed.rng(seed, "source")
    real, kind = footage(folder), rng.random()
    if kind < 0.35 or not real:
        return degrade.synth(int(rng.integers(8000)), frames, height, width, 50)
    if kind < 0.6 and photographs(folder):
        return over_still(photograph(photographs(folder)[int(rng.integers(len(photographs(folder))))]), rng, frames, height, width)
    clip = real[int(rng.integers(len(real)))]
    if kind < 0.85:
        first = int(rng.integers(0, max(1, len(clip.y) - frames)))
        return cropped(clip.take(slice(first, first + frames)).timed(50), rng, height, width)
    return over_still(clip.take([int(rng.integers(len(clip.y)))]), rng, frames, height, width)


def cropped(clip: Clip, rng: np.random.Generator, height: int, width: int) -> Clip:
    """A part of every picture, at a place with even numbers; the whole where a side is shorter."""
    f, h, w = clip.y.shape
    height, width = min(height, h // 2 * 2), min(width, w // 2 * 2)
    top, left = (int(rng.integers(0, (side - part) // 2 + 1)) * 2 for side, part in ((h, height), (w, width)))
    half = np.s_[:, top // 2:(top + height) // 2, left // 2:(left + width) // 2]
    return Clip(clip.y[:, top:top + height, left:left + width], clip.u[half], clip.v[half], clip.at_s)


def over_still(still: Clip, rng: np.random.Generator, frames: int, height: int, width: int) -> Clip:
    """A camera that pans, zooms and rolls over one picture, or stands, while up to three pieces of the picture move across it."""
    speed, zoom, roll = rng.normal(0, 2.5, 2) * (rng.random() < 0.7), rng.normal(0, 0.002), rng.normal(0, 0.002)
    pieces = [(rng.uniform(0.1, 0.9, 2), rng.normal(0, 4, 2), rng.uniform(0.08, 0.3, 2), rng.uniform(0, 0.6, 2))
              for _ in range(int(rng.integers(0, 4)))]
    place, grow = rng.uniform(0, 1, 2), rng.uniform(1.0, 1.6)

    def shown(plane, by):
        h, w = height // by, width // by
        fit = max(h / plane.shape[0], w / plane.shape[1]) * grow
        big = cv2.resize(plane, (round(plane.shape[1] * fit) + 1, round(plane.shape[0] * fit) + 1), interpolation=cv2.INTER_CUBIC)
        room = np.array([big.shape[1] - w, big.shape[0] - h], float)
        out = np.empty((frames, h, w), np.uint8)
        for i in range(frames):
            t = i - frames / 2
            cos, sin = (1 + zoom * t) * np.cos(roll * t), (1 + zoom * t) * np.sin(roll * t)
            centre = room * place + speed * t / by + np.array([w, h]) / 2
            turn = np.float32([[cos, -sin, centre[0] - cos * w / 2 + sin * h / 2],
                               [sin, cos, centre[1] - sin * w / 2 - cos * h / 2]])
            flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
            out[i] = cv2.warpAffine(big, turn, (w, h), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
            for at, v, size, origin in pieces:
                ph, pw = max(2, int(size[1] * h)), max(2, int(size[0] * w))
                y0, x0 = int(origin[1] * (big.shape[0] - ph)), int(origin[0] * (big.shape[1] - pw))
                move = np.float32([[1, 0, at[0] * w + v[0] * t / by], [0, 1, at[1] * h + v[1] * t / by]])
                cv2.warpAffine(big[y0:y0 + ph, x0:x0 + pw], move, (w, h), out[i], cv2.INTER_LINEAR, cv2.BORDER_TRANSPARENT)
        return out

    return Clip(*(shown(planes[0], by) for planes, by in zip(still[:3], (1, 2, 2), strict=True)), np.arange(frames) / 50)


def noisy(clip: Clip, rng: np.random.Generator, strength: float) -> Clip:
    """Gaussian noise of `strength` levels on luma."""
    grain = rng.standard_normal(clip.y.shape, np.float32) * np.float32(strength)
    return clip._replace(y=np.clip(np.rint(clip.y + grain), 0, 255).astype(np.uint8))


def striped(clip: Clip, rng: np.random.Generator) -> Clip:
    """A fine texture of lines in a part of the picture, which drifts down or aside: what a comb is not."""
    f, h, w = clip.y.shape
    period, drift, slope, strength = rng.uniform(2.0, 5.0), rng.normal(0, 0.7), rng.normal(0, 0.1), rng.uniform(10, 40)
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32)
    inside = (xx > rng.uniform(0, 0.5) * w) & (xx < rng.uniform(0.6, 1) * w)
    y = clip.y.copy()
    for i in range(f):
        lines = strength * np.sin(2 * np.pi * (yy + slope * xx + drift * i) / period)
        y[i] = np.where(inside, np.clip(y[i] + lines, 0, 255), y[i])
    return clip._replace(y=y)


MISTAKEN = {"plain": 2, "rescaled": 5, "striped": 1, "text": 1, "repeated": 1, "blended": 1, "averaged": 1, "trailed": 1,
            "woven": 2}  # and how often


def sample(seed: int, folder: Path) -> Sample:
    """The sample of a seed; those of even seeds are baked combs."""
    rng = keyed.rng(seed, "baked")
    height, width = int(rng.integers(120, 202)) * 2, int(rng.integers(160, 321)) * 2
    frames = int(rng.integers(16, 31)) * 2
    kinds = [kind for kind, often in MISTAKEN.items() for _ in range(often)]
    kind = "baked" if seed % 2 == 0 else kinds[int(rng.integers(len(kinds)))]
    clip = source(seed, frames, height, width, folder)
    if rng.random() < 0.3:
        clip = noisy(clip, rng, rng.uniform(1, 8))
    if kind == "text" or rng.random() < 0.15:
        clip, _ = degrade.captioned(clip, "lines of text to read", top=rng.uniform(0.1, 0.8), size=rng.uniform(0.5, 1.2))
    if kind in ("baked", "woven"):
        clip, other = woven(clip, rng)
    else:
        clip = (averaged if kind == "averaged" else unwoven)(clip, rng)
    before = clip
    if kind == "striped":
        clip = striped(clip, rng)
    elif kind == "repeated":
        clip, _ = degrade.mistimed(clip, seed)
    elif kind == "blended":
        clip, _ = degrade.blended(clip, clip.rate * 1.2)
    elif kind == "trailed":
        clip = degrade.ghosted(clip, rng.uniform(0.2, 0.7))
    scale = SCALES[int(rng.integers(len(SCALES)))] if rng.random() < 0.5 else float(2 ** rng.uniform(-1, 1))
    scale = 0.9 if abs(scale - 1) < 0.03 else scale
    how = KERNELS[int(rng.integers(4))]
    offset = 0.0 if rng.random() < 0.6 else float(rng.uniform(-0.3, 0.3))
    crf = 0 if rng.random() < 0.15 else int(rng.integers(18, 33))
    if kind in ("plain", "woven"):
        scale = 1.0
    else:
        clip = degrade.rescaled(clip, scale, how, offset)
    seen = degrade.coded(clip, crf) if crf else clip
    left = 0.0
    if kind == "baked":
        left = comb(seen.y, clip.y, degrade.rescaled(other, scale, how, offset).y) / (comb(before.y, before.y, other.y) + 0.01)
    return Sample(seen, seen.y.shape[1], kind == "baked", kind, scale, how, crf, left)


def woven(clip: Clip, rng: np.random.Generator) -> tuple[Clip, Clip]:
    """Woven in either order, after either filter of a camera; and the same fields the other way round."""
    order, lowpass = int(rng.integers(2)), ("none", "121", "soft")[int(rng.integers(3))]
    clip = degrade.lowpassed(clip, lowpass)
    return degrade.weave(clip, degrade.ORDERS[order]), degrade.weave(clip, degrade.ORDERS[1 - order])


def comb(seen: np.ndarray, one: np.ndarray, other: np.ndarray) -> float:
    """Levels, root mean square, of the comb in `seen` [f h w]: what is in it of half of `one` less the other way round, `other`."""
    half = (one.astype(np.float32) - other) / 2
    return float(np.vdot(seen - (one.astype(np.float32) + other) / 2, half) / np.sqrt(np.vdot(half, half) * half.size + 1e-6))


def unwoven(clip: Clip, rng: np.random.Generator) -> Clip:
    """Every second picture."""
    return clip.take(slice(0, len(clip.y) // 2 * 2, 2))


def averaged(clip: Clip, rng: np.random.Generator) -> Clip:
    """Means of pairs of pictures, as half-scale conversions make them of fields."""
    mean = clip.each(lambda planes: ((planes[0:-1:2].astype(np.uint16) + planes[1::2] + 1) >> 1).astype(np.uint8))
    return mean._replace(at_s=clip.at_s[0:-1:2])


def taught(samples: int, folder: Path) -> dict[str, dict]:
    """The two heads, with what cross-validation over samples reaches printed for the first."""
    rows = []  # of each sample: what it is, the evidence at places looked at, which of them hold its carrier, `spread`
    for seed in tqdm(range(samples), desc="samples", disable=None):
        one = sample(seed, folder)
        kept = moments(film.from_clip(one.clip))
        looks = [Look.of(moment) for moment in kept]
        found = candidates(looks)
        true = 0.5 / one.scale
        hits = [one.baked and abs(evidence.place - min(true, 1 - true)) < 1.2 / one.lines for evidence in found]
        traits = None
        if any(hits) and found[hits.index(True)].place >= LEAST_UP:
            near = found[hits.index(True)].place
            place, first = carrier(envelope(looks, near), near)
            traits = spread(kept, place, amplitude(kept, place, first))
        rows.append((replace(one, clip=None), found, hits, traits))
    scores = np.full(len(rows), -20.0)
    for fold in range(5):
        head = comb_head([row for i, row in enumerate(rows) if i // 2 % 5 != fold])
        for i, (one, found, *_) in enumerate(rows):
            if i // 2 % 5 == fold:
                scores[i] = chosen(found, one.lines, head)[1]
    report([row[0] for row in rows], scores)
    head = comb_head(rows)
    head["bias"] -= tail(scores[[not row[0].baked for row in rows]], PASSING)
    enlarged = [(traits, one.scale > 1) for one, *_, traits in rows if traits is not None]
    return {"comb": head, "upscaled": logistic(*(np.array(part) for part in zip(*enlarged, strict=True)))}


def tail(values: np.ndarray, share: float, upper: float = 0.1) -> float:
    """What a `share` of such values exceeds: what exceeds the quantile of `upper` falls off exponentially (Pickands 1975).

    Far steadier than the quantile itself, which hangs on the one or two highest of some hundred values.
    """
    start = float(np.quantile(values, 1 - upper))
    return start + float((values[values > start] - start).mean()) * math.log(upper / share)


def comb_head(rows: list) -> dict:
    """The head that tells combs from all else, of places that are one or the other for certain."""
    features, true = [], []
    for one, found, hits, _ in rows:
        if one.erased:
            continue
        for evidence, hit in zip(found, hits, strict=True):
            if hit or not (one.baked or native(evidence.place, one.lines)):
                features.append(evidence.features())
                true.append(hit)
    return logistic(np.array(features), np.array(true))


def logistic(features: np.ndarray, true: np.ndarray, decay: float = 1e-3) -> dict:
    """Logistic regression of features [n d], scaled to mean 0 and spread 1, with a penalty on the squares of its weights."""
    mean, spread_ = features.mean(0), features.std(0) + 1e-6
    table, true = np.concatenate([(features - mean) / spread_, np.ones((len(features), 1))], 1), true.astype(float)

    def loss(weights):
        odds = table @ weights
        slope = table.T @ (1 / (1 + np.exp(-odds)) - true) / len(true)
        inner = np.append(weights[:-1], 0)
        return (np.logaddexp(0, odds) - true * odds).mean() + decay * (inner**2).sum(), slope + 2 * decay * inner

    weights = minimize(loss, np.zeros(table.shape[1]), jac=True, method="L-BFGS-B").x
    return {"mean": mean.tolist(), "spread": spread_.tolist(), "weights": weights[:-1].tolist(), "bias": float(weights[-1])}


def report(samples: list[Sample], scores: np.ndarray) -> None:
    """Prints AUC and recall at 1 % false alarms by scale, for crf <= 28, of combs that were not erased."""
    baked = np.array([one.baked for one in samples])
    print(f"{sum(one.erased for one in samples)} of {baked.sum()} combs were erased")
    for low, high in ((0.5, 2.1), (0.5, 0.58), (0.58, 0.7), (0.7, 0.8), (0.8, 1), (1, 1.4), (1.4, 2.1)):
        among = np.array([not one.baked or (low <= one.scale < high and one.crf <= 28 and not one.erased) for one in samples])
        if (among & baked).any() and (among & ~baked).any():
            print(f"scale {low:.2f} to {high:.2f}: {(among & baked).sum()} clips, AUC {auc(scores[among], baked[among]):.3f}, "
                  f"recall {recall_at(scores[among], baked[among]):.3f}")


# The network

@dataclass(frozen=True)
class Strip:
    """Some columns of a picture between its neighbours, with the truth; lines as the repair sees them."""

    seen: np.ndarray  # float16 [6 m w]: fields of three estimated woven pictures, as the network takes them
    resize: torch.Tensor  # [h H]
    missing: np.ndarray  # float32 [h w]: what the picture lacks of the truth, in 64 levels
    passed: float


def strips(seed: int, folder: Path, width: int = 40) -> list[Strip]:
    """Strips of a clip that was woven, top field first, rescaled and coded."""
    rng = keyed.rng(seed, "strips")
    height, wide = int(rng.integers(80, 130)) * 2, int(rng.integers(100, 160)) * 2
    clip = source(seed + 100_000, 14, height, wide, folder)
    clip = noisy(clip, rng, rng.uniform(0.5, 4)) if rng.random() < 0.25 else clip
    clip = degrade.lowpassed(clip, "121" if rng.random() < 0.25 else "none")
    drawn = rng.random()
    scale = rng.choice(SCALES[1:6]) if drawn < 0.4 else rng.uniform(0.6, 1) if drawn < 0.88 else rng.uniform(1, 2)
    how, guess = rng.choice(KERNELS, p=(0.35, 0.1, 0.4, 0.15)), rng.choice(KERNELS)
    damaged, true = (degrade.rescaled(part, float(scale), how) for part in (degrade.weave(clip), clip.take(slice(0, None, 2))))
    crf = 0 if rng.random() < 0.3 else int(rng.integers(16, 29))
    damaged = degrade.coded(damaged, crf) if crf else damaged
    lines, height = damaged.y.shape[1], clip.y.shape[1]
    way = Way.of(str(how), height, lines, 0.0, True)
    back = Way.of(str(guess), height, lines, 0.0, True) if rng.random() < 0.12 else way  # a kernel that was taken for another
    out = []
    for i in range(1, len(damaged.y) - 1):
        lively = (np.abs(np.diff(damaged.y[i - 1:i + 2].astype(np.int16), axis=0)) > 8).mean((0, 1))
        for left in rng.choice(max(1, (damaged.y.shape[2] - width) // 4), 2) * 4:
            columns = np.s_[:, left:left + width]
            if lively[left:left + width].mean() < 0.02 and rng.random() < 0.8:
                continue
            seen = np.concatenate([way.fields(back.undo @ plane[columns].astype(np.float32)) for plane in damaged.y[i - 1:i + 2]])
            missing = (true.y[i][columns].astype(np.float32) - damaged.y[i][columns]) / 64
            out.append(Strip((seen / 64 - 2).astype(np.float16), torch.from_numpy(way.resize), missing, back.passed))
    return out


def trained(clips: int, folder: Path, minutes: float) -> Splitter:
    """The network, by Adam for a time on strips of `clips` clips; prints its gain on every 25th strip, which it is not shown."""
    pool = [strip for seed in tqdm(range(clips), desc="clips", disable=None) for strip in strips(seed, folder)]
    held, taught_ = pool[::25], [strip for i, strip in enumerate(pool) if i % 25]
    torch.manual_seed(0)
    network = Splitter()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    rng, started, step = keyed.rng(0, "batches"), time.monotonic(), 0
    while (done := (time.monotonic() - started) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 50) * (0.5 + 0.5 * np.cos(np.pi * done)) + 1e-5
        errors = left_over(network, [taught_[i] for i in rng.choice(len(taught_), 12)])
        loss = sum((error + 1e-4).sqrt() for error, _ in errors) / len(errors)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            with torch.no_grad():
                shares = [float(error) / max(before, 1e-6) for i in range(0, len(held), 24)
                          for error, before in left_over(network, held[i:i + 24])]
            print(f"step {step}: {-10 * np.log10(shares).mean():.2f} dB on strips held out", flush=True)
    return network


def left_over(network: Splitter, batch: list[Strip]) -> list[tuple[torch.Tensor, float]]:
    """Mean squared error of each strip after the repair and before it."""
    lines, width = max(strip.seen.shape[1] for strip in batch), batch[0].seen.shape[2]
    table = np.zeros((len(batch), 7, lines, width), np.float32)
    for row, strip in zip(table, batch, strict=True):
        row[:6, :strip.seen.shape[1]], row[6, :strip.seen.shape[1]] = strip.seen, strip.passed
    out = []
    for change, strip in zip(network(torch.from_numpy(table)), batch, strict=True):
        woven_ = change[:, :strip.seen.shape[1]].permute(1, 0, 2).reshape(-1, width)[:strip.resize.shape[1]]
        missing = torch.from_numpy(strip.missing)
        out.append((torch.square(strip.resize @ woven_ - missing).mean(), float(missing.square().mean())))
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("heads", "network"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=500, help="of heads: clips to make")
    parser.add_argument("--minutes", type=float, default=20, help="of network: how long to train")
    parser.add_argument("--footage", type=Path, default=Path("out/footage"), help="folder of real clips; see benchmarks/cleanbench")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.part == "heads":
        options.out.write_text(json.dumps(taught(options.samples, options.footage), indent=1) + "\n")
    else:
        save_file(trained(450, options.footage, options.minutes).state_dict(), options.out)


if __name__ == "__main__":
    main()
