"""The manifest: a Parquet file with a row a clip, what every stage of data preparation reads and writes.

    python -m data_tools.manifest FOLDER OUT.parquet     lists a folder of videos with captions (latte.clips, layout `captions`)

No row ever vanishes: a clip that cannot be used keeps its row, with the reason in `dropped`. Then train with data.source=manifest
data.path=OUT.parquet.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import pyarrow as pa  # of the extra [data]
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError("manifests need pyarrow, which is not installed: pip install pyarrow") from error
from tqdm import tqdm

from latte import clips, video
from latte.command import command

ROWS = 8192  # that are held at a time
ABOUT = b"latte"  # the key of the file's metadata
TEXT = pa.string()
SCHEMA = pa.schema([
    pa.field("id", TEXT, nullable=False),  # hash of the bytes and the span of the file that was listed first; edits keep it
    pa.field("source", TEXT),  # the collection it is from
    pa.field("source_id", TEXT),  # its name there
    pa.field("video", TEXT),  # the name there of the whole video that the clip is a span of
    pa.field("from_s", pa.float64()),  # that span, in seconds of the whole video
    pa.field("to_s", pa.float64()),
    pa.field("url", TEXT),  # of the whole video
    pa.field("path", TEXT),  # from the manifest's folder; null only where the clip is dropped for want of a file
    pa.field("start_s", pa.float64()),  # from the file's first frame
    pa.field("end_s", pa.float64()),
    pa.field("width", pa.int32()),  # upright, in square pixels
    pa.field("height", pa.int32()),
    pa.field("fps", pa.float64()),  # average
    pa.field("frames", pa.int64()),
    # The source file's span that `path` was made from by cleaning and joining, in seconds from its first frame; null = path itself
    pa.field("origin", pa.struct([("path", TEXT), ("sha256", TEXT), ("start_s", pa.float64()), ("end_s", pa.float64())])),
    # The listed clips that this one was joined from, in order, with their spans of the whole video; null = it was listed itself
    pa.field("parts", pa.list_(pa.struct([("id", TEXT), ("from_s", pa.float64()), ("to_s", pa.float64()), ("caption", TEXT)]))),
    # Cuts, dissolves, fades ... that data_tools.shots found, in seconds from the file's first frame; null = not looked for
    pa.field("transitions", pa.list_(pa.struct([("kind", TEXT), ("from_s", pa.float64()), ("to_s", pa.float64()),
                                                ("confidence", pa.float64())]))),
    pa.field("picked", pa.list_(pa.float64())),  # times of the frames chosen for training, in seconds from the file's first frame
    pa.field("field_order", TEXT),  # what data_tools.deinterlace found in the source: progressive, tff, ...; null = not looked at
    pa.field("caption", TEXT),  # the one to train on
    pa.field("caption_source", TEXT),  # file, or the captioner
    pa.field("captions", pa.struct([(name, TEXT) for name in ("short", "dense", "camera", "subjects", "style", "events")])),
    pa.field("scores", pa.map_(TEXT, pa.float64())),
    pa.field("tags", pa.map_(TEXT, TEXT)),  # what else the source says: language, category, the words of its times, ...
    # What was done to the pixels, in order; settings are JSON, the confidence is 0 to 1, the version that of data_tools.stage
    pa.field("edits", pa.list_(pa.struct([("step", TEXT), ("settings", TEXT), ("confidence", pa.float64()), ("version", TEXT)]))),
    pa.field("dropped", TEXT),  # the reason, or null
    pa.field("licence", TEXT),
    pa.field("sha256", TEXT),  # of the file
    pa.field("shard", TEXT),  # where a copy of the file lies: SHARD.tar/NAME.mp4
])
Row = dict[str, Any]


class Job(NamedTuple):
    """What a stage's `work` is told besides its rows."""

    out: Path  # the run's folder, where its manifests are: rows' paths start here, and files are made below it
    settings: Any  # the stage's own dataclass
    number: int = 0  # of this batch of rows among the stage's batches


def read(path: str | Path) -> list[Row]:
    """The rows of a manifest. Raises ValueError naming the file when it is missing, damaged or of another schema."""
    return [row for rows in batches(path) for row in rows]


def batches(path: str | Path, size: int = ROWS) -> Iterator[list[Row]]:
    """The rows of a manifest that may be too long for memory, so many at a time. Errors as in `read`."""
    return (table.to_pylist(maps_as_pydicts="strict") for table in _tables(path, size))


def live(path: str | Path) -> pa.Table:
    """All rows that are not dropped, as Arrow holds them: a tenth of what they take as `Row`. Errors as in `read`."""
    return pa.concat_tables([table.filter(table["dropped"].is_null()) for table in _tables(path, ROWS)] or [SCHEMA.empty_table()])


def _tables(path: str | Path, size: int) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path) as file:
            if set(file.schema_arrow.names) != set(SCHEMA.names):
                wrong = sorted(set(file.schema_arrow.names) ^ set(SCHEMA.names))
                raise ValueError(f"{path}: not a manifest of this version; columns missing or unknown: {', '.join(wrong)}")
            for group in file.iter_batches(size, columns=SCHEMA.names):
                yield pa.Table.from_batches([group]).select(SCHEMA.names).cast(SCHEMA)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such manifest") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a manifest ({error})") from None


def about(path: str | Path) -> dict[str, Any]:
    """What `write` was told about the making of a manifest: {} if nothing. Errors as in `read`."""
    try:
        return json.loads((pq.read_schema(path).metadata or {}).get(ABOUT, b"{}"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such manifest") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a manifest ({error})") from None


def write(path: str | Path, rows: Iterable[Row], about: dict[str, Any] | None = None) -> int:
    """Writes rows beside `path`, then renames; gives their number. A column that a row lacks is null.

    about: how the rows were made, JSON; kept in the file. Only some rows are held at a time. Raises ValueError naming the row's
    unknown column or wrong value, OSError with the path when it cannot be written.
    """
    path, count, rows = Path(path), 0, iter(rows)
    schema = SCHEMA.with_metadata({ABOUT: json.dumps(about, sort_keys=True)}) if about else SCHEMA
    try:
        with video.renamed_when_whole(path) as part:
            with pq.ParquetWriter(part, schema) as file:
                while group := list(itertools.islice(rows, ROWS)):
                    file.write_table(_table(path, group, schema))
                    count += len(group)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error})") from error
    return count


def _table(path: Path, rows: list[Row], schema: pa.Schema) -> pa.Table:
    for row in rows:
        unknown = sorted(set(row) - set(SCHEMA.names))
        if unknown or not row.get("id") or not (row.get("path") or row.get("dropped")):
            raise ValueError(f"{path}: a row needs id and path (or dropped) and knows no {', '.join(unknown) or 'others'}: {row}")
    try:
        return pa.Table.from_pylist(rows, schema)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{path}: a value does not fit the manifest's schema ({error})") from None


def placed(rows: Iterable[Row], folder: Path, out: Path) -> Iterator[Row]:
    """Rows whose paths start at `folder`, with paths that start at `out`."""
    for row in rows:
        path = row.get("path") and Path(os.path.relpath((folder / row["path"]).resolve(), out.resolve())).as_posix()
        yield row | {"path": path}


def row(path: Path, caption: str, folder: Path, out: Path) -> Row:
    """The row of a whole video file of `folder`, for a manifest `out`."""
    name = Path(os.path.relpath(path, folder)).as_posix()
    found = {"id": "", "source": folder.resolve().name, "source_id": name,
             "path": Path(os.path.relpath(path.resolve(), out.resolve().parent)).as_posix(),
             "caption": caption.strip() or None, "caption_source": "file" if caption.strip() else None, "edits": [], "scores": {}}
    try:
        found["sha256"] = sha256_of(path)
        info = video.probe(path)
        video.read_at(path, [0.0])  # the header may promise what cannot be decoded
        found |= {"start_s": 0.0, "end_s": info.frames / info.fps, "width": info.shown_width, "height": info.shown_height,
                  "fps": info.fps, "frames": info.frames}
        if not caption.strip():
            found["dropped"] = "no caption"
    except (ValueError, OSError, ZeroDivisionError) as error:
        found["dropped"] = f"unreadable ({str(error).removeprefix(f'{path}: ')})"
    about = f"{found.get('sha256') or name} {found.get('start_s')} {found.get('end_s')}"
    return found | {"id": hashlib.sha256(about.encode()).hexdigest()}


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.manifest", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="videos anywhere below, name.txt beside name.mp4, or captions.csv")
    parser.add_argument("out", type=Path, help="the manifest, .parquet")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: is not a folder")
    listed = list(clips._captioned(args.folder))
    if not listed:
        raise ValueError(f"{args.folder}: holds no video ({', '.join(clips.VIDEO_SUFFIXES)})")
    rows = [row(path, caption, args.folder, args.out) for path, caption, _ in tqdm(listed, unit=" clips")]
    write(args.out, rows)
    dropped = [found for found in rows if found.get("dropped")]
    for found in dropped:
        print(f"dropped {found['source_id']}: {found['dropped']}")
    print(f"{args.out}: {len(rows)} clips, {len(dropped)} of them dropped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
