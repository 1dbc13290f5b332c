"""What every cleaning stage shares: what it gives back, the gate's verdict on a repair, and its command line.

    python -m data_tools.STAGE IN.mp4 --out OUT.mp4 --report R.json

A stage is a function (film, **options) -> Outcome. It goes through the film as often as it needs and keeps only numbers of it.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools import film as films
from data_tools.film import Film, Picture
from latte.command import command
from latte.video import renamed_when_whole

VERSION = "2"  # of the repairs: raised when one of them gives other pixels than before


@dataclass
class Edit:
    """Something done to the pixels of a film."""

    step: str  # deinterlace, telecine, deghost, ...
    settings: dict[str, Any]  # all that is needed to do it again, JSON
    confidence: float  # 0 to 1
    version: str = VERSION


@dataclass
class Outcome:
    """What a stage found and made of a film. `film` is the very film it was given when there was nothing to do."""

    film: Film
    verdict: str  # one word of the stage's own list
    confidence: float  # 0 to 1
    edits: list[Edit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was seen and left alone, repairs that the gate refused, and why
    found: dict[str, Any] = field(default_factory=dict)  # measurements: JSON
    dropped: str | None = None  # why the clip cannot be used, if so

    def report(self) -> dict[str, Any]:
        """All but the film, as JSON takes it."""
        return {"verdict": self.verdict, "confidence": round(self.confidence, 4), "edits": [asdict(edit) for edit in self.edits],
                "notes": self.notes, "found": self.found, "dropped": self.dropped}


def watched(film: Film, label: str) -> Film:
    """The same film; each time it is gone through, a progress bar shows it."""
    def shown(pictures: Iterator[Picture]) -> Iterator[Picture]:
        yield from tqdm(pictures, desc=label, unit=" pictures", disable=None, leave=False)

    return film.through(shown)


def finish(source: Path, outcome: Outcome, started: Film, out: Path | None, report: Path | None, crf: int = 14) -> None:
    """Writes what a stage made: the film, or the source's own bytes when nothing was done to it, and the report."""
    if out is not None and outcome.dropped is None:
        if outcome.film is started and source.suffix.lower() == out.suffix.lower():
            with renamed_when_whole(out) as part:
                shutil.copyfile(source, part)
        else:
            films.write(out, outcome.film, crf)
    if report is not None:
        write_json(report, outcome.report())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path`, then renames; numpy's numbers are taken too."""
    with renamed_when_whole(path) as part:
        part.write_text(json.dumps(value, indent=1, default=float) + "\n")


@command
def main(stage: Callable[..., Outcome], parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """The command line of a stage on one file. What `parser` knows already goes to the stage as options."""
    parser.add_argument("source", type=Path, help="a video file")
    parser.add_argument("--out", type=Path, help="the repaired film, .mp4; the source's own bytes when there is nothing to do")
    parser.add_argument("--report", type=Path, help="what was found and done, .json; printed if not given")
    parser.add_argument("--crf", type=int, default=14, help="quality of the written film: 0 is lossless, 14 close to it")
    options = vars(parser.parse_args(argv))
    source, out, report, crf = (options.pop(name) for name in ("source", "out", "report", "crf"))
    films.check_crf(crf)
    film = watched(films.read(source), f"{stage.__name__} {source.name}")
    outcome = stage(film, **options)
    finish(source, outcome, film, out, report, crf)
    if report is None:
        print(json.dumps(outcome.report(), indent=1, default=float))
    return 0
