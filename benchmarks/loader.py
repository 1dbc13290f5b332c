"""What the training loop costs beside its arithmetic: the loader on cached latents, deterministic mode, checkpoints.

    python benchmarks/loader.py [--rounds 5] [--updates 2] [--out FILE.json] [section.key=value ...]

The model of configs/shapes_pixels.yaml on cached latents of clips of 16 and of 128 frames, made here by a small random VAE, with
the text states of MiniLM. All ways of doing an update take turns in one process and are compared as ratios, the median of the
rounds:

loader         batches read from the cache against one batch that stays in memory, tokens a second, and the share of its time
               that the training process itself waits for a batch
deterministic  gradients in units of so many clips, summed in a fixed order, against whole batches, time
checkpoints    time that updates wait for checkpoints, of a run that saves every so many updates
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from data_tools import cache
from latte import checkpoint, config, parallel, pipeline
from latte.data import make_loader, open_clips
from latte.guard import Guard
from latte.health import Window
from latte.optim import EMA, make_optimizer

ROOT = Path(__file__).parent.parent
MODEL = ["model.in_channels=4", "model.out_channels=4", "model.patch_size=2", "model.sample_size=8", "data.wordings=0",
         "train.refuse_misfit=false"]
SHAPES = {16: "{steps: 100000, frames: 16, height: 64, width: 64, batch_size: 8}",
          128: "{steps: 100000, frames: 128, height: 64, width: 64, batch_size: 2}"}


def make_vae(folder: Path) -> list[str]:
    """An image VAE with random weights, eight pixels a latent, and the settings that use it."""
    torch.manual_seed(0)
    AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4,
                  block_out_channels=[8, 8, 16, 16], norm_num_groups=8, layers_per_block=1).save_pretrained(folder)
    return ["codec.kind=autoencoder", f"codec.path={folder}"]


class Arm:
    """One way of doing updates."""

    def __init__(self, cfg: config.Config, resident: bool):
        self.cfg, self.resident, self.waited = cfg, resident, 0.0
        accelerator = Accelerator(mixed_precision="bf16")
        torch.manual_seed(0)
        raw, _ = pipeline.build(cfg)
        optimizer = make_optimizer(raw, cfg.optim)
        self.clips = open_clips(cfg.data, cfg.seed, cfg.stages)
        text, codec = train._components(cfg, self.clips, accelerator.device)
        self.run = train._Run(cfg, accelerator, raw, raw, optimizer, EMA(raw, 0.999), text, codec, Guard(cfg.guard))
        self.window = Window(accelerator.device, 1.0)
        self.batches = make_loader(self.clips, cfg.data, cfg.stages, cfg.seed)
        self.batch = next(self.batches)

    def seconds(self, updates: int) -> float:
        started = time.perf_counter()
        for _ in range(updates):
            asked = time.perf_counter()
            batch = self.batch if self.resident else next(self.batches)
            self.waited += time.perf_counter() - asked
            self.run.update(batch, False, self.window)
        return time.perf_counter() - started


def compare(arms: dict[str, Arm], rounds: int, updates: int) -> dict[str, list[float]]:
    """Seconds of every arm in each round; the arms take turns, in both directions."""
    for arm in arms.values():
        arm.seconds(2)
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[::1 if number % 2 else -1]:
            taken[name].append(arms[name].seconds(updates))
    return taken


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    values = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": round(statistics.median(values), 4), "lowest": round(min(values), 4), "highest": round(max(values), 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "loader.json"))
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    result: dict = {"loader": {}, "deterministic": {}}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        codec = make_vae(place / "vae")
        for frames, stage in SHAPES.items():
            def load(*changes, stage=stage, frames=frames):
                return config.load(ROOT / "configs" / "shapes_pixels.yaml", [
                    *MODEL, *codec, f"data.clips={args.clips}", "data.variants=1", f"stages=[{stage}]", f"run={place / 'run'}",
                    *args.overrides, *changes])

            cache.build(load(), place / f"cache{frames}")
            cached = ["data.source=cache", f"data.path={place / f'cache{frames}'}", "data.clips=0"]
            # resident twice: what the two differ by is the noise of this measurement
            arms = {"resident": Arm(load(*cached), True), "again": Arm(load(*cached), True), "workers 0": Arm(load(*cached), False),
                    "workers 1": Arm(load(*cached, "data.workers=1"), False)}
            taken = compare(arms, args.rounds, args.updates)
            result["loader"][f"{frames} frames"] = {
                name: {**ratio(taken["resident"], taken[name]), "share_of_time_waited": round(arm.waited / sum(taken[name]), 5)}
                for name, arm in arms.items() if name != "resident"}
            sizes = {16: (1, 2, 4), 128: (1,)}[frames]
            arms = {"whole": Arm(load(*cached), True)}
            parallel.make_deterministic(torch.device("cpu"))
            for size in sizes:
                arms[f"units of {size}"] = Arm(load(*cached, "train.deterministic=true", f"train.unit_clips={size}"), True)
            taken = compare(arms, args.rounds, args.updates)
            torch.use_deterministic_algorithms(False)
            batch = load().stages[0].batch_size
            result["deterministic"][f"{frames} frames, batch {batch}"] = {
                name: ratio(taken[name], taken["whole"]) for name in arms if name != "whole"}
        every = 25
        stage = SHAPES[16].replace("100000", str(4 * every))
        cfg = load(f"stages=[{stage}]", "data.source=cache", f"data.path={place / 'cache16'}", "data.clips=0",
                   f"train.save_every_steps={every}", f"train.log_every_steps={every}")
        train.train(cfg)
        rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        result["checkpoints"] = {"every_updates": every, "seconds_an_update": round(rows[-1]["seconds"], 3), "share_of_time_waited":
        [
            round(row["checkpoint_wait"], 5) for row in rows[2:]]}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {"command": " ".join(["python", "benchmarks/loader.py", *sys.argv[1:]]), "commit": commit,
              "versions": checkpoint.versions(), **result}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
