"""Filters: drops clips whose scores lie outside what a set wants. Looks at no picture: scores come from data_tools.score.

    python -m data_tools.filter IN.parquet --out OUT.parquet --keep motion=0.5: nsfw=:0.3 faces=1:4 --languages en

Changing a threshold computes nothing again. The first bound that a clip misses is its reason: "motion too low (0.12)".
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_tools import manifest
from data_tools.manifest import Job, Row
from latte.command import command

VERSION = "1"
MISSING = ("keep", "drop")
# Languages as data sets write them -> their two letters
NAMES = {"english": "en", "chinese": "zh", "spanish": "es", "hindi": "hi", "arabic": "ar", "portuguese": "pt", "russian": "ru",
         "japanese": "ja", "german": "de", "french": "fr", "korean": "ko", "italian": "it", "turkish": "tr", "vietnamese": "vi",
         "polish": "pl", "ukrainian": "uk", "dutch": "nl", "thai": "th", "indonesian": "id", "swedish": "sv"}


@dataclass(frozen=True)
class Settings:
    """What a set wants."""

    keep: dict[str, list[float | None]] = field(default_factory=dict)  # score -> [least or null, most or null]; any score of a row
    languages: list[str] = field(default_factory=list)  # of the captions, two letters; [] takes all
    missing: str = "keep"  # or drop: clips without a score that has bounds, or whose language cannot be told

    def __post_init__(self):
        """Raises ValueError naming the key."""
        if self.missing not in MISSING:
            raise ValueError(f"missing: {self.missing!r} is unknown; it is one of {', '.join(MISSING)}")
        for name, bounds in self.keep.items():
            least, most = bounds if len(bounds) == 2 else (None, None)
            if least is None and most is None:
                raise ValueError(f"keep.{name}: {list(bounds)} bounds nothing; give [least, most], one of which may be null")
            if least is not None and most is not None and least > most:
                raise ValueError(f"keep.{name}: least {least:g} is above most {most:g}")


def work(rows: list[Row], job: Job) -> list[Row]:
    """The rows, those that the settings do not want with their reason in `dropped`; see data_tools.manifest.Job."""
    return [row | {"dropped": why} if (why := reason(row, job.settings)) else row for row in rows]


def reason(row: Row, settings: Settings) -> str | None:
    """Why a row is not wanted, or None."""
    scores = row.get("scores") or {}
    for name, (least, most) in settings.keep.items():
        value = scores.get(name)
        if value is None:
            if settings.missing == "drop":
                return f"{name} not known"
        elif least is not None and value < least:
            return f"{name} too low ({value:.3g})"
        elif most is not None and value > most:
            return f"{name} too high ({value:.3g})"
    if settings.languages:
        found = ((row.get("tags") or {}).get("language") or "und").lower()
        found = NAMES.get(found, found[:2] if found[2:3] in ("-", "_") else found)  # en-GB
        if found == "und":
            return "language not known" if settings.missing == "drop" else None
        if found not in settings.languages:
            return f"language not wanted ({found})"
    return None


def bounds(text: str) -> tuple[str, list[float | None]]:
    """"motion=0.5:9" -> ("motion", [0.5, 9.0]); either number may be left out. Raises ValueError for anything else."""
    name, equals, numbers = text.partition("=")
    least, colon, most = numbers.partition(":")
    try:
        if not (name and equals and colon):
            raise ValueError
        return name, [float(number) if number else None for number in (least, most)]
    except ValueError:
        raise ValueError(f"--keep: {text!r} is not of the form NAME=LEAST:MOST, where one number may be left out") from None


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.filter", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a manifest with scores, .parquet")
    parser.add_argument("--out", type=Path, required=True, help="the manifest to write")
    parser.add_argument("--keep", nargs="+", default=[], metavar="NAME=LEAST:MOST", help="bounds of scores")
    parser.add_argument("--languages", nargs="+", default=[], help="of captions, two letters; all if not given")
    parser.add_argument("--missing", default="keep", help="keep or drop what has not been scored")
    args = parser.parse_args(argv)
    counts: Counter = Counter()

    def rows() -> Iterator[Row]:
        job = Job(args.out.parent, settings)
        for batch in tqdm(manifest.batches(args.source), desc="filter", unit=" batches", disable=None, leave=False):
            live = iter(work([row for row in batch if not row.get("dropped")], job))
            for row in batch:
                row = row if row.get("dropped") else next(live)
                counts[(row.get("dropped") or "kept").partition(" (")[0]] += 1
                yield row

    settings = Settings(dict(bounds(text) for text in args.keep), args.languages, args.missing)
    manifest.write(args.out, rows(), manifest.about(args.source))
    print(f"{args.out}: {counts.total()} clips, " + ", ".join(f"{count} {what}" for what, count in counts.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
