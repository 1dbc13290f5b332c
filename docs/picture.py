"""Draws docs/shapes.webp, the README's picture: clips of a checkpoint side by side, each over its prompt.

    python docs/picture.py [CHECKPOINT] [OUT]
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latte import pipeline, video

ROOT = Path(__file__).parent.parent
PROMPTS = ["a small red circle moves to the left", "a large blue star moves upwards",
           "a medium green ring moves to the right", "a big yellow cross moves to the right",
           "a little white triangle moves downwards", "a large purple square moves up and to the left",
           "a medium orange star moves to the left", "a large cyan circle moves straight down"]
SIDE, TEXT = 128, 40  # pixels of a clip and of the prompt's lines under it


def labelled(clip: np.ndarray, prompt: str) -> np.ndarray:
    """uint8 [f h w 3], enlarged, with the prompt below."""
    canvas = Image.new("RGB", (SIDE, TEXT), "white")
    ImageDraw.Draw(canvas).text((4, 4), "\n".join(textwrap.wrap(prompt, 24)), "black", ImageFont.load_default(10))
    scale = SIDE // clip.shape[1]
    big = clip.repeat(scale, axis=1).repeat(scale, axis=2)
    return np.concatenate([big, np.broadcast_to(np.asarray(canvas), (len(big), TEXT, SIDE, 3))], axis=1)


def main() -> None:
    pipe = pipeline.load(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "shapes-cpu" / "checkpoint")
    stage = pipe.cfg.stages[-1]
    clips = [labelled(pipe([prompt], [seed], 128, stage.height, stage.width)[0], prompt) for seed, prompt in enumerate(PROMPTS)]
    rows = [np.concatenate(clips[i:i + 4], axis=2) for i in range(0, len(clips), 4)]
    video.animate(sys.argv[2] if len(sys.argv) > 2 else ROOT / "docs" / "shapes.webp", np.concatenate(rows, axis=1), 8.0)


if __name__ == "__main__":
    main()
