"""Stages for the tests of data_tools.run: small, and as bad as a clip may make them."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from data_tools.manifest import Job, Row
from latte.video import renamed_when_whole

VERSION = "1"


@dataclass(frozen=True)
class Settings:
    clips: int = 24  # that are listed
    wait_s: float = 0.0  # that a clip takes
    least: int = 0

    def __post_init__(self):
        if self.clips < 0:
            raise ValueError(f"clips: must not be negative, got {self.clips}")


def inputs(settings: Settings) -> str:
    return str(settings.clips)


def listed(settings: Settings, out: Path) -> list[Row]:
    kinds = {5: "crash", 11: "hang", 17: "wrong"}
    return [{"id": f"{number:02d}" * 16, "video": f"v{number % 7}", "path": f"films/{number}.mp4", "edits": [],
             "caption": kinds.get(number, "fine"), "scores": {"number": number}} for number in range(settings.clips)]


def group(row: Row) -> str:
    return row["video"]


def work(rows: list[Row], job: Job) -> list[Row]:
    done = []
    for row in rows:
        time.sleep(job.settings.wait_s)
        if row["caption"] == "crash":
            os._exit(3)
        if row["caption"] == "hang":
            time.sleep(1000)
        if row["caption"] == "wrong":
            raise KeyError("no such thing")
        with renamed_when_whole(job.out / "clips" / f"{row['id']}.txt") as part:
            part.write_text(row["id"])
        with open(job.out / "done.txt", "a") as file:
            file.write(row["id"] + "\n")
        done.append(row | {"sha256": row["id"][::-1]})
    return done


def thin(rows: list[Row], job: Job) -> list[Row]:
    return [row | ({"dropped": "too small"} if row["scores"]["number"] < job.settings.least else {}) for row in rows]
