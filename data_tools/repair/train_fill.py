"""Trains the network that fills the missing lines of interlaced pictures (data_tools/repair/fill.py, grade fine).

    python -m data_tools.repair.train_fill [--out FILE.safetensors] [--width 32] [--depth 3] [--steps N] [--clips N]

Half an hour on one CPU core; to reach: a loss of 0.30, and in the bench (benchmarks/cleanbench/fill.py) 4 to 6 dB above bwdif.
A larger network for a GPU is a matter of --width and --depth.

Truth is known because the clips are woven here: procedural scenes, photographs in several layers that pan, zoom and turn by
fractions of a pixel, with and without motion blur, text over them, and real films. Photographs and films come out of public Debian
packages into --footage and are not passed on. A third of the way the network makes drafts of neighbouring fields for further clips,
as it does when it is used, and learns from both kinds. The same settings give the same weights on the same machine; clips and state
are kept in --work, and the same command goes on from there after an interruption.
"""

import argparse
import gzip
import math
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from data_tools import degrade, film
from data_tools.film import Clip
from data_tools.repair import fill
from latte import keyed
from latte.video import renamed_when_whole

PACKAGES = ("ukui-wallpapers", "mate-backgrounds", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "opencv-doc")
PHOTOGRAPHS = ("usr/share/backgrounds/**/*.jpg", "usr/share/doc/opencv-doc/examples/data/*.jpg",
               "usr/share/doc/opencv-doc/opencv4/html/0?.jpg")
FILMS = ("usr/share/doc/opencv-doc/examples/data/vtest.avi", "usr/share/doc/opencv-doc/examples/data/tree.avi", "box.mp4",
         "cup.mp4", "../city.mpg", "../carphone_pristine.mp4")  # those that are there
FRAMES, HEIGHT, WIDTH = 14, 128, 192  # of a clip
FIELDS = range(4, 10)  # of a clip that are learned from: all that their evidence needs is there
PATCH = 96  # columns of a sample, of all its lines
EASY = 0.3  # squared levels added to a clip's error, so that the easiest do not count most
LR = 1.5e-3


def fetch(folder: Path) -> None:
    """Unpacks the packages into `folder`/photographs. Raises ValueError when one cannot be had."""
    folder = folder / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not list(folder.glob(f"{package}_*.deb")):
            done = subprocess.run(["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"the photographs of the Debian package {package} cannot be had: {done.stderr.strip()}")
            subprocess.run(["dpkg-deb", "-x", next(folder.glob(f"{package}_*.deb")).name, "."], cwd=folder, check=True)
    for name in ("box.mp4", "cup.mp4"):
        packed = folder / f"usr/share/doc/opencv-doc/opencv4/html/{name}.gz"
        if packed.exists() and not (folder / name).exists():
            with gzip.open(packed) as source, open(folder / name, "wb") as target:
                shutil.copyfileobj(source, target)


class Stock:
    """Photographs and films to make clips of."""

    def __init__(self, footage: Path):
        folder = footage / "photographs"
        self.photographs = sorted(path for pattern in PHOTOGRAPHS for path in folder.glob(pattern))
        self.films = [path for path in (folder / name for name in FILMS) if path.exists()]
        if not self.photographs or not self.films:
            raise ValueError(f"{folder} holds no photographs or films; fetch them first")

    def __str__(self) -> str:
        return f"{len(self.photographs)} photographs, films {', '.join(path.name for path in self.films)}"

    def photograph(self, rng: np.random.Generator) -> np.ndarray:
        """Luma, uint8 [h w], at a scale at which its finest detail shows or does not."""
        image = _image(self.photographs[rng.integers(len(self.photographs))])
        lowest = max(3 * HEIGHT / image.shape[0], 3 * WIDTH / image.shape[1])
        scale = max(lowest, float(np.exp(rng.uniform(np.log(0.12), np.log(1.2)))) * 1600 / image.shape[1])
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        return cv2.resize(image, None, fx=scale, fy=scale, interpolation=how)

    def clip(self, seed: int) -> Clip:
        """FRAMES pictures of one kind or another, y alone of use: [f h w]."""
        rng = keyed.rng(seed, "kind")
        kind = rng.choice(["layers", "synth", "film"], p=[0.6, 0.2, 0.2])
        if kind == "layers":
            return layers(self, seed)
        if kind == "synth":
            clip = degrade.synth(int(rng.integers(8900)), FRAMES, 2 * HEIGHT, 2 * WIDTH)
        else:
            clip = _film(self.films[rng.integers(len(self.films))])
            if clip.y.shape[1] > 3 * HEIGHT and rng.random() < 0.5:
                half = [cv2.resize(y, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for y in clip.y]
                clip = clip._replace(y=np.stack(half))
            start = int(rng.integers(len(clip.y) - FRAMES + 1))
            clip = clip._replace(y=clip.y[start:start + FRAMES])
        return _cut(rng, clip.y)


def _cut(rng, y: np.ndarray) -> Clip:
    """A part of the picture, perhaps mirrored or played backwards."""
    top, left = (int(rng.integers(max(have - want, 0) + 1)) for have, want in zip(y.shape[1:], (HEIGHT, WIDTH), strict=True))
    y = y[:, top:top + HEIGHT, left:left + WIDTH]
    y = np.pad(y, [(0, 0), (0, HEIGHT - y.shape[1]), (0, WIDTH - y.shape[2])], "symmetric")
    y = y[::rng.choice((1, -1)), :, ::rng.choice((1, -1))]
    return _gray(np.ascontiguousarray(y))


def _gray(y: np.ndarray) -> Clip:
    chroma = np.full((len(y), HEIGHT // 2, WIDTH // 2), 128, np.uint8)
    return Clip(y, chroma, chroma, np.arange(len(y)) / 50)


@cache
def _image(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    scale = 1600 / image.shape[1]
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image


@cache
def _film(path: Path) -> Clip:
    return film.to_clip(film.read(path), 250)


def layers(stock: Stock, seed: int) -> Clip:
    """A photograph as background, up to three cut out of others before it, and often text; each moves by its own law.

    Drawn at twice the size and averaged down, as a sensor's pixels do; shutter: the share of a field's time that smears motion.
    """
    rng = keyed.rng(seed, "layers")
    h, w = 2 * HEIGHT, 2 * WIDTH
    pace = float(np.exp(rng.uniform(np.log(0.15), np.log(8))))  # pixels a field
    sheets = []
    for i in range(1 + int(rng.integers(4)) + (rng.random() < 0.35)):
        image = stock.photograph(rng)
        if i == 0:
            mask = None
        elif rng.random() < 0.3:
            mask = _text_mask(rng, image.shape)
            image = np.full_like(image, rng.integers(16, 236))
        else:
            mask = _shape_mask(rng, image.shape)
        sheets.append((image, mask, Motion(rng, pace * (1 if i == 0 else 1.5), image.shape)))
    shutter, times = rng.choice([0.0, 0.25, 0.5, 1.0], p=[0.45, 0.2, 0.25, 0.1]), 1
    times = max(1, min(5, round(shutter * pace * 1.5)))
    levels = (rng.uniform(0.75, 1.0), rng.uniform(0, 25))
    out = np.empty((FRAMES, HEIGHT, WIDTH), np.uint8)
    for f in range(FRAMES):
        total = np.zeros((h, w), np.float32)
        for s in range(times):
            t = f + shutter * s / times
            picture = None
            for image, mask, motion in sheets:
                move = motion.at(t, h, w)
                shown = cv2.warpAffine(image, move, (w, h), borderMode=cv2.BORDER_REFLECT_101).astype(np.float32)
                if mask is None:
                    picture = shown
                else:
                    share = cv2.warpAffine(mask, move, (w, h)).astype(np.float32) / 255
                    picture += share * (shown - picture)
            total += picture
        small = cv2.resize(total / times, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        out[f] = np.clip(np.rint(small * levels[0] + levels[1]), 0, 255)
    return _gray(out)


class Motion:
    """Shift, zoom and turn of a sheet about its middle as a smooth function of time; many shift along a line or column only."""

    def __init__(self, rng, pace: float, shape: tuple[int, int]):
        angle = rng.choice([0, np.pi / 2, rng.uniform(0, 2 * np.pi)], p=[0.25, 0.2, 0.55])
        size = 0 if rng.random() < 0.12 else 2 * pace * rng.uniform(0.2, 1)  # in drawn pixels, of which two make one
        self.speed = size * np.array([np.cos(angle), np.sin(angle)])
        self.change = self.speed * rng.normal(0, 0.04) + rng.normal(0, 0.02, 2) * size
        self.turn, self.zoom = (rng.normal(0, s) * (rng.random() < 0.35) * min(pace, 3) for s in (0.006, 0.005))
        self.start = rng.uniform(-0.3, 0.3, 2) * (np.array(shape[::-1]) - 2 * np.array([WIDTH, HEIGHT]))
        self.wave = (rng.uniform(0.2, 1.0), rng.uniform(0, 6), size * rng.uniform(0, 1) * (rng.random() < 0.2))
        self.middle = np.array(shape[::-1]) / 2

    def at(self, t: float, h: int, w: int) -> np.ndarray:
        """The affine map [2 3] from the sheet to the drawn picture [h w]."""
        t = t - FRAMES / 2
        angle, scale = self.turn * t, float(np.exp(self.zoom * t))
        place = self.start + self.speed * t + self.change * t * t / 2 + self.wave[2] * np.sin(self.wave[0] * t + self.wave[1])
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return np.float32(np.concatenate([turn, (np.array([w, h]) / 2 + place - turn @ self.middle)[:, None]], 1))


def _shape_mask(rng, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [h w]: a polygon, an ellipse, or bars, about the middle, with hard or soft rims."""
    mask = np.zeros(shape, np.uint8)
    middle, radius = np.array(shape[::-1]) / 2, float(rng.uniform(0.1, 0.6)) * HEIGHT * 2
    kind = rng.random()
    if kind < 0.4:
        n = int(rng.integers(3, 9))
        angles = np.sort(rng.uniform(0, 2 * np.pi, n))
        points = middle + radius * rng.uniform(0.4, 1, (n, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        cv2.fillPoly(mask, [np.int32(points)], 255, cv2.LINE_AA)
    elif kind < 0.8:
        axes = tuple(int(radius * rng.uniform(0.3, 1)) for _ in range(2))
        cv2.ellipse(mask, tuple(int(c) for c in middle), axes, float(rng.uniform(0, 180)), 0, 360, 255, -1, cv2.LINE_AA)
    else:
        step, thick = int(rng.integers(6, 60)), int(rng.integers(2, 12))
        for at in range(-step * 20, step * 20, step):
            tilt = rng.uniform(-0.02, 0.02)
            a, b = middle + np.array([at, -radius]), middle + np.array([at + tilt * radius, radius])
            cv2.line(mask, tuple(int(c) for c in a), tuple(int(c) for c in b), 255, thick, cv2.LINE_AA)
        if rng.random() < 0.5:
            mask = cv2.resize(np.ascontiguousarray(mask.T), shape[::-1])
    return cv2.GaussianBlur(mask, (0, 0), float(rng.uniform(1, 6))) if rng.random() < 0.4 else mask


def _text_mask(rng, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for line in range(-3, 4):
        words = "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789    "), 60))
        at = (int(shape[1] / 2 - WIDTH * rng.uniform(0.5, 2)), int(shape[0] / 2 + line * HEIGHT * 0.5))
        font = int(rng.choice([cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_DUPLEX]))
        cv2.putText(mask, words, at, font, float(rng.uniform(0.8, 3)), 255, int(rng.integers(1, 6)), cv2.LINE_AA)
    return mask


def samples(stock: Stock, seed: int, network: fill.Fill | None) -> tuple[fill.Evidence, np.ndarray, float]:
    """One clip, woven: the evidence of each of FIELDS, all stacked, the truth uint8 [f m w], and bwdif's squared error.

    network: makes drafts of the fields before and after, as for its second run; else they are bwdif's pictures.
    """
    rng = keyed.rng(seed, "weave")
    clip = stock.clip(seed)
    if rng.random() < 0.05:
        cut = int(rng.integers(4, FRAMES - 3))
        clip = _gray(np.concatenate([clip.y[:cut], stock.clip(-seed - 1).y[cut:]]))
    if rng.random() < 0.15:
        grain = rng.normal(0, rng.uniform(0.5, 4), clip.y.shape)
        clip = clip._replace(y=np.clip(np.rint(clip.y + grain), 0, 255).astype(np.uint8))
    clip = degrade.lowpassed(clip, rng.choice(["none", "121", "soft"], p=[0.68, 0.24, 0.08]))
    order = str(rng.choice(degrade.ORDERS))
    woven = degrade.weave(clip, order)
    if rng.random() < 0.12:
        woven = degrade.coded(woven, int(rng.integers(14, 27)), interlaced=order)
    bobs = [picture.y for picture in fill.deinterlace(iter(film.from_clip(woven)), order, "field")]
    found, truth = [], []
    for t in FIELDS:
        top = (t % 2 == 0) == (order == "tff")
        near = bobs[t - 2:t + 3]
        if network is not None:
            near[1], near[3] = (fill.draft(bobs[i - 2:i + 3], not top, network) for i in (t - 1, t + 1))
        found.append(fill.evidence(near, fill.flows(near), top))
        truth.append(clip.y[t][1::2] if top else clip.y[t][-2::-2])
    stacked = fill.Evidence(*(np.stack(part) for part in zip(*found, strict=True)))
    truth = np.stack(truth)
    return stacked, truth, float(np.square(truth.astype(np.float32) - stacked.base).mean())


class Woven(NamedTuple):
    """A set of samples: arrays [clips f ...] of the parts of Evidence and of the truth, and bwdif's squared errors [clips]."""

    parts: list[np.ndarray]
    errors: np.ndarray


def prepare(stock: Stock, clips: int, seed: int, folder: Path,
            network: fill.Fill | None = None) -> Woven:
    """The samples of the clips of `clips` seeds from `seed` on, kept in `folder`; what is there already is not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*fill.Evidence._fields, "truth"]
    files = [folder / f"{name}.npy" for name in names]
    done = folder / "errors.npy"
    if not done.exists() or len(np.load(done)) != clips:
        errors, maps = np.zeros(clips, np.float32), []
        for i in tqdm(range(clips), desc="clips", disable=None):
            found, truth, errors[i] = samples(stock, seed + i, network)
            parts = [*found, truth]
            maps = maps or [np.lib.format.open_memmap(file, "w+", part.dtype, (clips, *part.shape))
                            for file, part in zip(files, parts, strict=True)]
            for target, part in zip(maps, parts, strict=True):
                target[i] = part
        for target in maps:
            target.flush()
        np.save(done, errors)
    return Woven([np.load(file, mmap_mode="r") for file in files], np.load(done))


def batch(sets: list[Woven], seed: int, step: int, size: int) -> tuple[torch.Tensor, ...]:
    """Inputs [b k m w], what to add to bwdif's lines [b m w] and weights [b] of one step; every set is drawn from as often."""
    rng = keyed.rng(seed, "batch", step)
    inputs, wanted, weights = [], [], []
    for _ in range(size):
        woven = sets[rng.integers(len(sets))]
        i, f = int(rng.integers(len(woven.errors))), int(rng.integers(len(FIELDS)))
        left, mirrored = int(rng.integers(0, WIDTH - PATCH + 1)), rng.random() < 0.5
        cut = [part[i, f][..., left:left + PATCH][..., ::-1 if mirrored else 1] for part in woven.parts]
        evidence = fill.Evidence(*cut[:-1])
        inputs.append(evidence.inputs())
        wanted.append((cut[-1].astype(np.float32) - evidence.base) / np.float32(fill.SCALE))
        weights.append(fill.SCALE**2 / (woven.errors[i] + EASY))
    return torch.stack(inputs), torch.from_numpy(np.stack(wanted)), torch.tensor(weights)


def train(net: fill.Fill, sets: list[Woven], until: int, steps: int, seed: int, state: Path, size: int = 16) -> fill.Fill:
    """The moving average of the weights after `until` of `steps` steps of Adam; goes on from `state` where that was left.

    The loss of a sample is log(1 + its squared error in units of bwdif's in that clip): squares because PSNR counts them, units
    and logarithm because a clip's gain in dB should not depend on how hard the clip is, and because the worst one of a thousand
    would else undo what the others teach. Raises ValueError at a loss that is not finite.
    """
    ema = fill.Fill(**net.size).requires_grad_(False)
    ema.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=LR, betas=(0.9, 0.99))
    start, curve = 0, []
    if state.exists():
        held = torch.load(state, weights_only=True)
        net.load_state_dict(held["net"])
        ema.load_state_dict(held["ema"])
        optimizer.load_state_dict(held["optimizer"])
        start, curve = held["step"], held["curve"]
    bar = tqdm(range(start, until), initial=start, total=steps, desc="steps", disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + LR / 500
        x, wanted, weights = batch(sets, seed, step, size)
        loss = ((net(x) - wanted).square().mean((1, 2)) * weights).log1p().mean()
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of step {step} is {loss.item()}; a lower rate would be right")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        for average, now in zip(ema.parameters(), net.parameters(), strict=True):
            average.lerp_(now.detach(), 1 - decay)
        curve.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == until:
            bar.set_postfix_str(f"loss {np.mean(curve[-100:]):.3f}")
            part = state.with_suffix(".part")
            torch.save({"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                        "curve": curve}, part)
            part.replace(state)
    return ema


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=fill.WEIGHTS, help="the weights, .safetensors")
    parser.add_argument("--work", type=Path, default=Path("out/train_fill"), help="clips (2 GB) and state of this run")
    parser.add_argument("--footage", type=Path, default=Path("out/footage"), help="folder of photographs and films")
    parser.add_argument("--width", type=int, default=32, help="channels of the network; 32 makes it one for a CPU")
    parser.add_argument("--depth", type=int, default=3, help="layers of 3x3 before the last one")
    parser.add_argument("--clips", type=int, default=1000, help="to weave for the first third of the steps; then half as many")
    parser.add_argument("--steps", type=int, default=2700, help="of 16 samples each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        fetch(args.footage)
        stock = Stock(args.footage)
        print(stock)
        first = prepare(stock, args.clips, args.seed, args.work / "first")
        torch.manual_seed(args.seed)
        net = fill.Fill(args.width, args.depth).to(memory_format=torch.channels_last)
        print(f"{sum(weight.numel() for weight in net.parameters()):,} weights")
        state = args.work / "state.pt"
        middle = train(net, [first], args.steps // 3, args.steps, args.seed, state)
        second = prepare(stock, args.clips // 2, args.seed + args.clips, args.work / "second", middle)
        net = train(net, [first, second], args.steps, args.steps, args.seed, state)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_whole(args.out) as part:
        save_file({name: weight.contiguous() for name, weight in net.state_dict().items()}, part)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
