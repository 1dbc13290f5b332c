"""Puts a set's clips into tar shards that any WebDataset reader takes, and writes the set's card and sums.

    python -m data_tools.shard MANIFEST.parquet --out FOLDER [--clips 256] [--name NAME] [--allow SOURCE ...]

FOLDER/shards/shard-000000.tar, ... hold ID.mp4, ID.json (its row) and ID.txt (its caption) of every clip, in the order of the ids,
which are hashes, so that a shard is a fair sample. Bytes depend on the rows and files alone: no time, owner or machine is in them.
FOLDER/manifest.parquet has all rows, also dropped ones, CARD.md says what the set is, SHA256SUMS is for `sha256sum -c`.
data_tools.verify checks all of it. The same command again makes no shard twice.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools import licence, manifest
from data_tools.manifest import Job, Row
from data_tools.stage import write_json
from latte.command import command
from latte.video import renamed_when_whole

VERSION = "1"  # raised when shards have other bytes than before
HERE = ("path", "shard", "dropped")  # columns that say where a clip lies in this folder: not in its JSON
FORMS = ("joined", "cut", "stitch")  # reasons of rows that live on in others, and edits that repair nothing


@dataclass(frozen=True)
class Settings:
    """How clips are packed, and whose."""

    clips: int = 256  # a shard; the last one has what is left
    name: str = ""  # of the set, on its card; empty: the folder's
    allow: tuple[str, ...] = ()  # sources or licences whose clips may go in although data_tools.licence refuses them

    def __post_init__(self):
        """Raises ValueError naming what is out of range."""
        if self.clips < 1:
            raise ValueError(f"clips: {self.clips} clips make no shard; give 1 or more")


def work(rows: list[Row], job: Job) -> list[Row]:
    """All live rows of a set with `shard` and `sha256` filled; their files are in job.out/shards then.

    A clip without its file, with other bytes than its row says, or that is but a span of its file is dropped with the reason. It is
    a stage over the whole set: one call with all rows. Raises ValueError for licences that data_tools.licence refuses.
    """
    settings: Settings = job.settings
    licence.check(licence.found(rows), settings.allow, "shard.allow")
    index = job.out / "shards" / "index.json"
    index.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(index.read_text())["shards"] if index.is_file() else {}
    done: dict[str, dict] = {}
    made = [row | {"dropped": _unfit(row, job.out)} for row in rows]
    fit = sorted((row for row in made if not row["dropped"]), key=lambda row: row["id"])
    with tqdm(total=len(fit), desc="shard", unit=" clips", disable=None) as bar:
        for number, start in enumerate(range(0, len(fit), settings.clips)):
            name, packed = f"shard-{number:06d}.tar", fit[start:start + settings.clips]
            for row in packed:
                row["sha256"] = row.get("sha256") or manifest.sha256_of(job.out / row["path"])
            key = hashlib.sha256(json.dumps([VERSION, [text(row) for row in packed]]).encode()).hexdigest()
            if not _whole(index.parent / name, held.get(name, {}), key):
                held[name] = {"key": key} | _pack(index.parent / name, packed, job.out)
                write_json(index, {"shards": held})
            done[name] = held[name]
            for row in packed:
                row["dropped"] = done[name]["left_out"].get(row["id"])
                row["shard"] = None if row["dropped"] else f"shards/{name}/{row['id']}.mp4"
            bar.update(len(packed))
    for old in index.parent.glob("shard-*.tar"):
        if old.name not in done:  # of an earlier, longer set
            old.unlink()
    write_json(index, {"shards": done})
    return made


def ask(listed: Path, settings: Settings) -> None:
    """Asks for the licences of a manifest's live rows before a run spends hours on them. Errors as in `work`."""
    clips: Counter = Counter()
    with manifest.pq.ParquetFile(listed) as file:
        for part in file.iter_batches(columns=["source", "licence", "dropped"]):
            clips += licence.found([row for row in part.to_pylist() if not row["dropped"]])
    licence.check(clips, settings.allow, "shard.allow")


def _unfit(row: Row, out: Path) -> str | None:
    path = out / row["path"]
    if not path.is_file():
        return "its file is gone"
    length = row["frames"] / row["fps"] if row.get("frames") and row.get("fps") else None
    if row.get("start_s") or (length and row.get("end_s") is not None and row["end_s"] < 0.999 * length):
        return "a span of a longer file, which the stage cut has not cut"
    return None


def _whole(path: Path, held: dict[str, Any], key: str) -> bool:
    return held.get("key") == key and path.is_file() and path.stat().st_size == held["bytes"]


def text(row: Row) -> str:
    """A clip's JSON: its row but for where it lies here, without empty columns."""
    return json.dumps({key: value for key, value in row.items() if key not in HERE and value is not None}, sort_keys=True,
                      ensure_ascii=False)


def _pack(path: Path, rows: list[Row], out: Path) -> dict[str, Any]:
    """Writes a shard; gives its hash, size, number of clips, and ids that were left out with the reason."""
    left_out = {}
    with renamed_when_whole(path) as part:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                pixels = (out / row["path"]).read_bytes()
                if hashlib.sha256(pixels).hexdigest() != row["sha256"]:
                    left_out[row["id"]] = "its file is not the one that was made"
                    continue
                for suffix, data in (("json", text(row).encode()), ("mp4", pixels), ("txt", (row.get("caption") or "").encode())):
                    about = tarfile.TarInfo(f"{row['id']}.{suffix}")  # time 0, nobody's
                    about.size = len(data)
                    tar.addfile(about, io.BytesIO(data))
        size = part.stat().st_size
        digest = manifest.sha256_of(part)
    return {"sha256": digest, "bytes": size, "clips": len(rows) - len(left_out), "left_out": left_out}


@dataclass
class _Tally:
    """What the card tells, counted as rows pass."""

    rows: int = 0
    clips: int = 0
    seconds: float = 0.0
    captions: int = 0
    repaired: int = 0
    licences: Counter = field(default_factory=Counter)  # (source, licence) -> clips
    sizes: Counter = field(default_factory=Counter)  # "640x360, 128 frames at 8 fps" -> clips
    reasons: Counter = field(default_factory=Counter)
    lost_s: Counter = field(default_factory=Counter)  # reason -> seconds

    def add(self, row: Row) -> None:
        spans = ((row["start_s"], row["end_s"]), (row["from_s"], row["to_s"]))
        length = next((end - start for start, end in spans if None not in (start, end)), 0.0)
        self.rows += 1
        if row["dropped"]:
            reason = row["dropped"].partition(" (")[0]
            reason = reason.partition(":")[0] if reason.startswith(FORMS) else reason
            self.reasons[reason] += 1
            self.lost_s[reason] += length
            return
        self.clips += 1
        self.seconds += length
        self.captions += bool(row["caption"])
        self.repaired += any(edit["step"] not in FORMS for edit in row["edits"] or ())
        self.licences[row["source"] or "", row["licence"] or ""] += 1
        self.sizes[f"{row['width']}x{row['height']}, {row['frames']} frames at {row['fps'] or 0:g} fps"] += 1


def publish(out: Path) -> None:
    """Writes CARD.md and SHA256SUMS of a folder that holds a manifest and shards. Raises ValueError as manifest.read does."""
    tally, about = _Tally(), manifest.about(out / "manifest.parquet")
    for rows in manifest.batches(out / "manifest.parquet"):
        for row in rows:
            tally.add(row)
    shards = json.loads((out / "shards" / "index.json").read_text())["shards"]
    with renamed_when_whole(out / "CARD.md") as part:
        part.write_text(card(tally, about, shards, out.resolve().name))
    sums = {f"shards/{name}": shard["sha256"] for name, shard in shards.items()}
    sums |= {name: manifest.sha256_of(out / name) for name in ("manifest.parquet", "CARD.md")}
    with renamed_when_whole(out / "SHA256SUMS") as part:
        part.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


CARD = """# {name}

Clips: {clips:,}, together {hours:.2f} hours. Shards: {shards:,}, together {mib:,.1f} MiB.
{captions:.0%} of the clips have a caption, {repaired:.0%} were repaired.
`manifest.parquet` also has the rows that became no clip of their own, {others:,}, with the reason.

## Sources and licences

{licences}

A licence is what a source says of itself. Whoever uses the set answers for the use.

## Sizes

{sizes}

## How it was made

{stages}

With {versions}.

## What became of the other rows

Joined and cut rows live on in others; the rest was left out.

{reasons}

## Use

    sha256sum -c SHA256SUMS
    python -m data_tools.verify .
    python -m data_tools.rebuild manifest.parquet --sources SOURCES --out REBUILT
    python -m data_tools.ingest webdataset shards OUT.parquet

Each shard holds ID.mp4, ID.json (the row) and ID.txt (the caption); any WebDataset reader takes it.

## Known limits

- Captions are those of the lists unless `caption_source` names another writer; nobody has read them all.
- People may be in the pictures; nobody has asked them.
- Scores are estimates; what could not be computed is in the rows' tags as `not_computed`.
- Near-duplicates are found by looks: crops of a tenth and more, added bars and the same scene from another start are missed.
"""


def card(tally: _Tally, about: dict[str, Any], shards: dict[str, Any], folder: str) -> str:
    """The set's card, Markdown. about: of its manifest; shards: of index.json."""
    stages = about.get("stages", [])
    versions = ", ".join(f"{package} {version}" for package, version in sorted(about.get("versions", {}).items()))
    named = [settings["name"] for stage, settings, _ in stages if stage.startswith("shard") and settings["name"]]
    of = max(tally.clips, 1)
    return CARD.format(
        name=named[0] if named else folder, clips=tally.clips, others=tally.rows - tally.clips, hours=tally.seconds / 3600,
        shards=len(shards), mib=sum(shard["bytes"] for shard in shards.values()) / 2**20,
        captions=tally.captions / of, repaired=tally.repaired / of,
        licences=licence.table(tally.licences), sizes=_table(("size", "clips"), tally.sizes.most_common(20)),
        stages=_table(("stage", "settings", "version"), [(stage, f"`{json.dumps(settings, sort_keys=True)}`", version)
                                                         for stage, settings, version in stages]),
        versions=versions or "versions that nobody noted",
        reasons=_table(("reason", "rows", "hours"), [(reason, count, f"{tally.lost_s[reason] / 3600:.3f}")
                                                     for reason, count in tally.reasons.most_common()]))


def _table(names: tuple[str, ...], rows: Iterable[tuple]) -> str:
    """Markdown."""
    shown = [[f"{value:,}" if isinstance(value, int) else str(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *shown))


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.shard", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a manifest whose clips lie in files of their own")
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, manifest, card and sums")
    parser.add_argument("--clips", type=int, default=Settings.clips, help="a shard")
    parser.add_argument("--name", default=Settings.name, help="of the set, on its card")
    parser.add_argument("--allow", nargs="*", default=[], metavar="SOURCE", help="sources or licences that you have cleared")
    args = parser.parse_args(argv)
    settings = Settings(args.clips, args.name, tuple(args.allow))
    rows = list(manifest.placed(manifest.read(args.source), args.source.parent, args.out))
    live = [i for i, row in enumerate(rows) if not row["dropped"]]
    for i, row in zip(live, work([rows[i] for i in live], Job(args.out, settings)), strict=True):
        rows[i] = row
    about = manifest.about(args.source)
    stages = [stage for stage in about.get("stages", []) if stage[0] != "shard"] + [["shard", asdict(settings), VERSION]]
    manifest.write(args.out / "manifest.parquet", rows, about | {"stages": stages})
    publish(args.out)
    dropped = Counter(rows[i]["dropped"] for i in live if rows[i]["dropped"])
    print(f"{args.out}: {len(live) - dropped.total()} clips in shards", *(f"{n} dropped: {why}" for why, n in dropped.items()),
          sep=", ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
