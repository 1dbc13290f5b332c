"""Samples videos from a checkpoint:  python sample.py CHECKPOINT --prompt "..." [--out clip.mp4] [--frames 128] [--seed 0]

CHECKPOINT is a checkpoint folder, a training run's folder, or published Latte weights: a folder of diffusers, its hub id
(maxin-cn/Latte-1), a .pt file. Writes for every prompt an H.264 mp4, a contact sheet beside it (.png) and a JSON with all that
reproduces it (.json). The model's config comes from the checkpoint. Of a model of classes, a prompt is a class's name or number.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from latte import checkpoint, pipeline, video
from latte.command import command
from latte.world.caption import parse
from latte.world.judge import judge

FRAMES = 128  # 16 seconds


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts asked for, from --prompt or the lines of --prompts. Raises ValueError when there is none or one is empty."""
    if args.prompts:
        if not Path(args.prompts).is_file():
            raise ValueError(f"--prompts: no such file: {args.prompts}")
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        prompts = [args.prompt.strip()]
    if not prompts or not all(prompts):
        raise ValueError('the prompt is empty; say what to show, such as --prompt "a small red circle moves to the left"')
    return prompts


def run(args: argparse.Namespace) -> int:
    prompts = prompts_of(args)
    for name in ("frames", "fps", "scale"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name}: must be above 0, got {getattr(args, name)}")
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {args.device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    own = checkpoint.is_checkpoint(args.checkpoint)
    cfg, dtype = pipeline.configure(args.checkpoint, args.set), getattr(torch, args.dtype)
    stage = cfg.stages[-1]
    frames = args.frames or (FRAMES if own else stage.frames)
    height, width = args.height or stage.height, args.width or stage.width
    changed = {name: getattr(args, name) for name in ("steps", "guidance") if getattr(args, name) is not None}
    settings = dataclasses.replace(cfg.sampler, **changed, **({"name": args.sampler} if args.sampler else {}))
    if args.dry_run:
        peaks = pipeline.plan(cfg, frames, height, width, settings.guidance, dtype, device)
        print(f"{frames} frames of {height}x{width} in {args.dtype}, most memory in each phase, beside a GPU's libraries:")
        print("\n".join(f"{phase:10s} {size / 1e9:6.2f} GB" for phase, size in peaks.items()))
        return 0
    pipe = pipeline.load(args.checkpoint, device, dtype, args.adapters, args.adapter_scale, args.set)
    source = {"checkpoint": str(args.checkpoint), "adapters": args.adapters, "settings": args.set, "dtype": args.dtype}
    if own:
        found = checkpoint.read(args.checkpoint)
        source |= {"checkpoint_step": found.step, "ema_sha256": found.files["ema.safetensors"]}
    for prompt in prompts:
        pipe.condition([prompt])
    if pipe.text is not None:
        pipe.text.release()  # all prompts are encoded: its memory goes to the frames

    for index, prompt in enumerate(prompts):
        out = Path(args.out) if len(prompts) == 1 else Path(args.out).with_name(f"{Path(args.out).stem}-{index:04d}.mp4")
        out.parent.mkdir(parents=True, exist_ok=True)
        seed = args.seed + index
        with tqdm(total=settings.steps, desc=f"sampling {frames} frames", unit="step") as bar:
            clip = pipe([prompt], [seed], frames, height, width, args.fps, settings,
                        progress=lambda done, _steps, bar=bar: bar.update(done - bar.n))[0]
        record = {"prompt": prompt, "seed": seed, "frames": frames, "fps": args.fps, "height": height, "width": width,
                  "scale": args.scale, "sampler": dataclasses.asdict(settings), **source, "versions": checkpoint.versions()}
        print(f"prompt:  {prompt}")
        if cfg.data.source == "world":
            record["judge"] = verdict = _verdict(clip, prompt, args.fps)
            print(f"judge:   {_in_words(verdict)}")
        shown = clip.repeat(args.scale, axis=1).repeat(args.scale, axis=2)
        video.write(out, shown, args.fps)
        video.contact_sheet(shown, out.with_suffix(".png"))
        out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"video:   {out} ({frames} frames, {args.fps:g} fps, {frames / args.fps:.1f} s)")
        print(f"beside:  {out.with_suffix('.png').name} (contact sheet), {out.with_suffix('.json').name} (how to repeat it)")
    return 0


def _verdict(clip: np.ndarray, prompt: str, fps: float) -> dict:
    """What the embedded world's judge says of a clip, or why it cannot judge this prompt."""
    try:
        return judge(clip, parse(prompt), fps).to_json()
    except ValueError as error:
        return {"not judged": str(error)}


def _in_words(verdict: dict) -> str:
    if "not judged" in verdict:
        return f"not judged: {verdict['not judged']}"
    scores = ", ".join(f"{name} {value:.2f}" for name, value in verdict["scores"].items())
    return f"{'PASS' if verdict['joint'] else 'FAIL'} ({scores})"


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint or run folder, or published weights")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt")
    what.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    parser.add_argument("--out", default="out/sample.mp4", help="with several prompts: -0000, -0001, ... before the suffix")
    parser.add_argument("--frames", type=int, help=f"default: {FRAMES}, and of published weights what they were made for")
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--height", type=int, help="pixels; default: as trained last")
    parser.add_argument("--width", type=int)
    parser.add_argument("--scale", type=int, default=1, help="enlarge the written video this many times, for viewing")
    parser.add_argument("--sampler", choices=["euler", "heun", "ddim", "ddpm", "dpmpp_2m"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count on")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of all weights")
    parser.add_argument("--adapters", default="", metavar="FOLDER", help="low-rank adapters to add, as peft writes them")
    parser.add_argument("--adapter-scale", type=float, default=1.0)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value",
                        help="change a setting of the config, such as text.quantize=4bit; may be given again")
    parser.add_argument("--dry-run", action="store_true", help="print the memory that each phase will take, then exit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
