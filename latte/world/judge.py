"""The judge: reads a clip of the embedded world from its frames alone, and scores it against a scene.

    python -m latte.world.judge CLIP.mp4 --prompt "a small red circle moves to the right"    one file, as JSON
    python -m latte.world.judge --selfcheck 1000 --seed 0                                     how far the judge can be trusted
"""

import argparse
import json
import sys

from latte import video
from latte.world.caption import parse
from latte.world.selfcheck import selfcheck
from latte.world.verdict import judge

__all__ = ["judge"]


def main(argv: list[str] | None = None) -> int:
    """Judges a file, or the judge itself; prints JSON. Returns the exit status: 2 for the user's mistakes, told in one line."""
    parser = argparse.ArgumentParser(prog="python -m latte.world.judge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", nargs="?", help="a video file")
    parser.add_argument("--prompt", help="the caption that the clip should show")
    parser.add_argument("--fps", type=float, default=8.0, help="rate at which the clip is read (default: %(default)g)")
    parser.add_argument("--selfcheck", type=int, metavar="N", help="judge N true renders, planted faults and wrong scenes instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="height and width of the self-check's clips (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.selfcheck is not None:
            report = selfcheck(args.selfcheck, args.seed, args.size)
        elif args.clip is None or args.prompt is None:
            raise ValueError("give a video file and --prompt \"...\", or --selfcheck N")
        else:
            frames = round(video.probe(args.clip, count=True).duration_s * args.fps)
            clip = video.read(args.clip, frames=max(frames, 1), fps=args.fps)
            report = judge(clip, parse(args.prompt), args.fps).to_json()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
