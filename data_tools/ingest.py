"""Reads the lists of open video sets into the one manifest: a clip a row, times exact, nothing vanishes.

    python -m data_tools.ingest internvid InternVid-10M-flt.jsonl out/flt.parquet --files VIDEOS
    python -m data_tools.ingest folder VIDEOS out/own.parquet
    python -m data_tools.ingest webdataset SHARDS out/shards.parquet

A reader is a small function from the list's path to clips, one for each layout in READERS. Scores are taken where they are given.
Lines that cannot be read are counted and shown, never fatal. Files are found below --files by their names, whole videos and cut
clips alike; a clip without one keeps its row, dropped as "no file". Videos that a list holds itself, in tars or columns of bytes,
are copied to sources/ID.mp4 beside the manifest, once.
"""

import argparse
import ast
import csv
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools import licence, manifest
from latte.clips import VIDEO_SUFFIXES
from latte.command import command
from latte.video import renamed_when_whole

VERSION = "1"  # raised when a list gives other rows than before
csv.field_size_limit(2**31 - 1)  # a row of Panda-70M holds all clips of its video


@dataclass
class Listed:
    """A clip as a list tells of it: a span of a video, in seconds."""

    video: str  # the whole video's id; may hold _ and -
    from_s: float | None = None  # None: the clip is the whole video
    to_s: float | None = None
    caption: str = ""
    name: str = ""  # the clip's id in the list, where it has one
    file: str = ""  # the file's name, where the list tells it
    url: str = ""
    scores: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, Any] = field(default_factory=dict)  # of the manifest's kinds
    facts: dict[str, Any] = field(default_factory=dict)  # columns of the row that the list knows better: width, height, fps, ...
    held: Callable[[], bytes] | None = None  # gives the file's bytes, where they lie in the list itself
    size: int = 0  # of these bytes


class Bad(ValueError):
    """A line or an entry that cannot be read; the reader goes on with the next."""


Entry = Listed | Bad
Reader = Callable[[Path], Iterator[Entry]]


def seconds(text: str | float) -> float:
    """"00:02:33.133", "2:33.133", "PT00H02M33S" or a number of seconds -> 153.133. Raises Bad naming anything else."""
    if isinstance(text, int | float):
        return float(text)
    spans = re.fullmatch(r"PT(?:(\d+)H)?(?:(\d+)M)?(?:([\d.]+)S)?", text.strip()) if text.strip().startswith("PT") else None
    parts = [part or "0" for part in spans.groups()] if spans else text.strip().replace(",", ".").split(":")
    try:
        value = 0.0
        for part in parts[:-1]:
            value = value * 60 + int(part)
        # The digits after the point are added last, so that the result is the double nearest to what is written.
        return round(value * 60 + float(parts[-1]), 6)
    except ValueError:
        raise Bad(f"not a time: {text!r}") from None


def internvid(path: Path) -> Iterator[Entry]:
    """InternVid, JSON lines: 10M-FLT, DIV, 18M-AES, FLT-INFO and Full, which differ in scores and tags."""
    def clip(entry: dict[str, Any]) -> Listed:
        times = {"start": entry["Start_timestamp"], "end": entry["End_timestamp"]}
        return Listed(entry["YoutubeID"], seconds(times["start"]), seconds(times["end"]), entry.get("Caption") or "",
                      url=f"https://www.youtube.com/watch?v={entry['YoutubeID']}",
                      scores={key: entry.get(key) for key in ("UMT_Score", "Aesthetic_Score", "CLIP_Score")},
                      tags=times | {"video_language": entry.get("Language"), "category": entry.get("Category")})

    for entry in _lines(path):
        yield entry if isinstance(entry, Bad) else _attempt(lambda entry=entry: clip(entry))


def panda(path: Path) -> Iterator[Entry]:
    """Panda-70M, CSV with a row a video, whose columns hold Python lists with an item a clip."""
    def clips(row: dict[str, str]) -> list[Listed]:
        times = ast.literal_eval(row["timestamp"])
        columns = {key: ast.literal_eval(row[key]) if row.get(key) else [None] * len(times)
                   for key in ("caption", "matching_score", "desirable_filtering", "shot_boundary_detection")}
        if any(len(values) != len(times) for values in columns.values()):
            raise Bad(f"{row['videoID']}: lists of different lengths")
        return [Listed(row["videoID"], seconds(start), seconds(end), columns["caption"][i] or "", f"{row['videoID']}_{i}",
                       url=row.get("url", ""), scores={"matching_score": columns["matching_score"][i]},
                       tags={"start": start, "end": end, "desirable": columns["desirable_filtering"][i],
                             "shots": columns["shot_boundary_detection"][i]})
                for i, (start, end) in enumerate(times)]

    for row in _table(path):
        yield from _many(lambda row=row: clips(row))


def openvid(path: Path) -> Iterator[Entry]:
    """OpenVid-1M, CSV; the hosted files are the clips, named {id}_{clip}_{first}to{last}.mp4 by frames."""
    def clip(row: dict[str, str]) -> Listed:
        name = re.fullmatch(r"(?P<id>.+?)(?:_(?P<clip>\d+)_(?P<first>\d+)to(?P<last>\d+))?\.mp4", row["video"])
        if not name:
            raise Bad(f"not a clip's name: {row['video']!r}")
        fps = float(row["fps"])
        spans = (int(name["first"]) / fps, int(name["last"]) / fps) if name["first"] else (None, None)
        scores = {key.replace(" ", "_"): row.get(key) for key in ("aesthetic score", "motion score", "temporal consistency score")}
        return Listed(name["id"], *spans, row["caption"], row["video"].removesuffix(".mp4"), row["video"], scores=scores,
                      captions={"camera": row.get("camera motion")}, facts={"fps": fps, "frames": int(float(row["frame"]))})

    return _rows(path, clip)


def koala(path: Path) -> Iterator[Entry]:
    """Koala-36M, CSV; videoID is {id of the video}_{number}."""
    def clip(row: dict[str, str]) -> Listed:
        start, end = ast.literal_eval(row["timestamp"])
        scores = {key: row.get(key) for key in (f"{name}_score" for name in (
            "clarity", "aesthetic", "motion", "video_training_suitability"))}
        return Listed(row["videoID"].rpartition("_")[0] or row["videoID"], seconds(start), seconds(end), row["caption"],
                      row["videoID"], url=row.get("url", ""), scores=scores, tags={"start": start, "end": end})

    return _rows(path, clip)


def webvid(path: Path) -> Iterator[Entry]:
    """WebVid, CSV; a row a whole video, in page_dir/videoid.mp4."""
    return _rows(path, lambda row: Listed(
        row["videoid"], 0.0, seconds(row["duration"]), row["name"], row["videoid"],
        f"{row['page_dir']}/{row['videoid']}.mp4" if row.get("page_dir") else f"{row['videoid']}.mp4", row.get("contentUrl", "")))


def vript(path: Path) -> Iterator[Entry]:
    """Vript, a JSON file a video, or a folder of them; times from NAME_cut_meta.json beside it, where it is there."""
    def clips(file: Path) -> list[Listed]:
        held = _json(file)
        cuts = file.with_name(f"{file.stem.removesuffix('_caption')}_cut_meta.json")
        spans = _json(cuts) if cuts.is_file() else {}
        found = []
        for name, scene in held["data"].items():
            caption, span = scene["caption"], spans.get(name, {})
            start, end = (seconds(span[key]) if key in span else None for key in ("start", "end"))
            words = caption if isinstance(caption, dict) else {"content": caption}
            found.append(Listed(scene["video_id"], start, end, words.get("content") or "", name, f"{name}.mp4",
                                captions={"camera": words.get("camera_movement"), "dense": words.get("content"),
                                          "short": words.get("scene_title")},
                                tags={"title": scene.get("video_title"), "shot_type": words.get("shot_type"),
                                      "voiceover": " ".join(scene.get("voiceover") or []) or None}))
        return found

    files = sorted(file for file in path.rglob("*.json") if not file.stem.endswith("_cut_meta")) if path.is_dir() else [path]
    for file in files:
        yield from _many(lambda file=file: clips(file))


def mira0(path: Path) -> Iterator[Entry]:
    """MiraData v0, CSV with frames of a video and their rate."""
    return _rows(path, lambda row: Listed(
        row["video_id"], int(row["start_frame"]) / float(row["fps"]), int(row["end_frame"]) / float(row["fps"]), _mira_caption(row),
        f"{row['video_id']}_{row['index']}", captions=_mira_captions(row), facts={"fps": float(row["fps"])},
        tags={"start_frame": row["start_frame"], "end_frame": row["end_frame"]}))


def mira1(path: Path) -> Iterator[Entry]:
    """MiraData v1, CSV with timestamps."""
    def clip(row: dict[str, str]) -> Listed:
        start, end = ast.literal_eval(row["timestamp"])
        facts = {"fps": float(row["fps"]), **{name: int(row[key]) for name, key in
                                              (("frames", "frame_number"), ("width", "width"), ("height", "height"))}}
        return Listed(row["video_id"], seconds(start), seconds(end), _mira_caption(row), row["clip_id"],
                      Path(row.get("file_path") or "").name, row.get("video_url", ""), captions=_mira_captions(row), facts=facts,
                      tags={"site": row.get("source"), "start": start, "end": end})

    return _rows(path, clip)


def hdvg(path: Path) -> Iterator[Entry]:
    """HD-VG-130M, JSON: {video: {clip: {"{id}.{n}.mp4": {span, fps, scene_split: [{clip_id, scene_cut, caption}]}}}}."""
    def scenes(video: str, url: str, name: str, clip: dict) -> list[Listed]:
        start, end = (seconds(time) for time in clip["span"])
        found = []
        for scene in clip["scene_split"]:
            first, last = scene["scene_cut"]  # in frames of the clip; -1 is its end
            span = (start + first / clip["fps"], end if last == -1 else start + last / clip["fps"])
            found.append(Listed(video, *span, scene.get("caption") or "", scene["clip_id"], url=url,
                                facts={"fps": float(clip["fps"])},
                                tags={"clip": name, "first_frame": first, "last_frame": last}))
        return found

    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        for held in _many(lambda file=file: list(_json(file).items())):
            if isinstance(held, Bad):
                yield held
                continue
            video, entry = held
            for clip in _many(lambda entry=entry: [(entry.get("url") or "", *item) for item in (entry.get("clip") or {}).items()]):
                yield from [clip] if isinstance(clip, Bad) else _many(lambda video=video, clip=clip: scenes(video, *clip))


def video2dataset(path: Path) -> Iterator[Entry]:
    """The input of video2dataset, CSV or Parquet: url, caption, and clips, a list of [start, end]."""
    def clips(row: dict[str, Any]) -> list[Listed]:
        url = row.get("url") or row.get("contentUrl") or row["videoURL"]
        video = row.get("videoID") or _tube(url) or url
        spans = row.get("clips") or [(None, None)]
        spans = ast.literal_eval(spans) if isinstance(spans, str) else spans
        return [Listed(video, *(None if time is None else seconds(time) for time in span), row.get("caption") or "", url=url)
                for span in spans]

    rows = _parquet(path) if path.suffix == ".parquet" else _table(path)
    for row in rows:
        yield from _many(lambda row=row: clips(row))


def table(path: Path) -> Iterator[Entry]:
    """CSV, JSON, Parquet or Arrow with a row a clip, or a folder of them: also a data set of a hub, saved to disk or exported.

    Columns: the video (file, path, video, ...: a name, or bytes), caption or text; start and end in seconds of the file, url, id,
    licence and numbers, which become scores, are taken if they are there.
    """
    for file in _tables(path):
        rows = {".parquet": _parquet, ".arrow": _arrow, ".csv": _table}.get(file.suffix, _lines)(file)
        below = file.parent.relative_to(path) if path.is_dir() else Path()
        try:
            for row in rows:
                yield row if isinstance(row, Bad) else _attempt(lambda row=row, below=below: _tabled(row, below))
        except (manifest.pa.ArrowException, csv.Error, OSError) as error:
            yield Bad(f"{file}: {error}")


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():  # splits, saved to disk
        return [file for split in _json(path / "dataset_dict.json")["splits"] for file in _tables(path / split)]
    if (path / "state.json").is_file():
        return [path / file["filename"] for file in _json(path / "state.json")["_data_files"]]
    return sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".arrow", ".jsonl", ".csv"))


def _tabled(row: dict[str, Any], below: Path) -> Listed:
    """The clip of a table's row. Raises Bad where it names no video."""
    cell = next((row[key] for key in FILE_COLUMNS if row.get(key)), None)
    cell = cell[0] if isinstance(cell, list) else cell
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None) if (
        isinstance(cell, bytes)) else (None, cell)
    if not data and not isinstance(name, str):
        raise Bad(f"no video in a column {', '.join(FILE_COLUMNS)}")
    digest = hashlib.sha256(data).hexdigest() if data else ""
    name = below / (name or f"{digest}.mp4")
    clip = _told(row, name.with_suffix("").as_posix())
    clip.file, clip.name = name.as_posix(), clip.name or digest  # in many sets all files have one name
    clip.facts |= {"start_s": clip.from_s, "end_s": clip.to_s}
    if data:
        clip.held, clip.size = lambda: data, len(data)
    return clip


FILE_COLUMNS = ("file", "path", "video", "file_name", "video_path", "mp4", "videos", "clip")
FACT_COLUMNS = {"width": "width", "height": "height", "fps": "fps", "frames": "frames", "num_frames": "frames"}
OTHER_COLUMNS = ("caption", "text", "url", "id", "key", "licence", "license", "start", "end")


def _told(about: dict[str, Any], stem: str) -> Listed:
    """What a table's row or the JSON beside a video tells of it: see `table`. JSON of data_tools.shard is a whole row."""
    if {"id", "sha256", "start_s", "end_s"} <= set(about) <= set(manifest.SCHEMA.names):
        return _ours(about)
    url, told = about.get("url") or "", about.get("licence") or about.get("license")
    spans = about.get("clips") or [[about.get("start"), about.get("end")]]  # of video2dataset: the one span that was cut
    times = [None if time in (None, "") else seconds(time) for time in spans[0]] if len(spans) == 1 else [None, None]
    numbers = {key: number for key, value in about.items() if (number := _number(value)) is not None}
    facts = {ours: numbers[theirs] if ours == "fps" else int(numbers[theirs])
             for theirs, ours in FACT_COLUMNS.items() if numbers.get(theirs)}
    scores = {key: numbers[key] for key in numbers if key not in (*FILE_COLUMNS, *FACT_COLUMNS, *OTHER_COLUMNS)}
    return Listed(str(about.get("videoID") or _tube(url) or stem), *times, about.get("caption") or about.get("text") or "",
                  str(about.get("id") or about.get("key") or ""), url=url, scores=scores,
                  facts=facts | ({"licence": str(told)} if told else {}))


def _ours(about: dict[str, Any]) -> Listed:
    """The clip whose row data_tools.shard wrote. Raises ValueError or TypeError for values that no row can have."""
    if not re.fullmatch(r"\w{1,64}", about["id"]):
        raise Bad(f"not an id of ours: {about['id']!r}")
    columns = manifest.pa.schema([manifest.SCHEMA.field(key) for key in about])
    manifest.pa.RecordBatch.from_pylist([about], columns)
    facts = {key: about.get(key) for key in manifest.SCHEMA.names if key not in ("path", "shard", "dropped")}
    return Listed(facts["video"] or facts["id"], facts["from_s"], facts["to_s"], facts["caption"] or "", facts["id"], facts=facts)


def webdataset(path: Path) -> Iterator[Entry]:
    """Tar shards of NAME.mp4 with NAME.txt and NAME.json beside it, a file or all below a folder; our own give their rows back."""
    for shard in sorted(path.rglob("*.tar")) if path.is_dir() else [path]:
        try:
            with tarfile.open(shard, "r:") as tar:
                files = (member for member in tar if member.isfile())
                for key, members in itertools.groupby(files, lambda member: member.name.rpartition(".")[0]):
                    parts = {member.name.removeprefix(f"{key}.").lower(): member for member in members}
                    yield _attempt(lambda tar=tar, key=key, parts=parts, shard=shard: _sharded(tar, f"{shard.stem}/{key}", parts))
        except (tarfile.TarError, OSError) as error:
            yield Bad(f"{shard}: {error}; a shard is a plain tar")


def _sharded(tar: tarfile.TarFile, name: str, parts: dict[str, tarfile.TarInfo]) -> Listed:
    suffix = next((suffix for suffix in parts if f".{suffix}" in VIDEO_SUFFIXES), None)
    if suffix is None:
        raise Bad(f"{name}: no video of that name")

    def content(suffix: str) -> bytes:
        return tar.extractfile(parts[suffix]).read() if suffix in parts else b""

    clip = _told(json.loads(content("json") or b"{}"), name)
    clip.caption = clip.caption or content("txt").decode(errors="replace")
    clip.name = clip.name or name.partition("/")[2]
    clip.file = f"{name}.{suffix}"
    clip.held, clip.size = lambda: content(suffix), parts[suffix].size
    return clip


def folder(path: Path) -> Iterator[Entry]:
    """Videos anywhere below a folder; see `videos` for captions. The one reader that looks into every file, as data_tools.manifest
    does: broken ones are known at once, and a file is known by its bytes."""
    seen: set[str] = set()
    for name, about in videos(path):
        clip = about if isinstance(about, Bad) else _attempt(lambda name=name, about=about: _own(path, name, about))
        if isinstance(clip, Listed):
            if clip.facts["id"] in seen:  # a copy of another file: a row of its own
                clip.facts["id"] = hashlib.sha256(f"{clip.facts['id']} {name}".encode()).hexdigest()
            seen.add(clip.facts["id"])
        yield clip


def videos(path: Path) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """The names of all videos below a folder, and what is told of each: its row of captions.csv or metadata.csv, with the columns
    file (or file_name) and caption (or text), or else NAME.json, NAME.txt (the caption) beside NAME.mp4."""
    table = next((path / name for name in ("captions.csv", "metadata.csv") if (path / name).is_file()), None)
    rows = _table(table) if table else ()
    told = {name: row for row in rows if (name := next((row[key] for key in FILE_COLUMNS if row.get(key)), None))}
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES}
    for name in sorted(there | set(told)):
        yield name, told.get(name) or _attempt(lambda name=name: _beside(path / name))


def _beside(file: Path) -> dict[str, Any]:
    text, held = file.with_suffix(".txt"), file.with_suffix(".json")
    caption = {"caption": text.read_text(encoding="utf-8", errors="replace")} if text.is_file() else {}
    return (_json(held) if held.is_file() else {}) | caption


def _own(path: Path, name: str, about: dict[str, Any]) -> Listed:
    clip = _told(about, name)
    clip.name = clip.file = name
    clip.from_s = clip.to_s = None  # the whole file; for spans there is `table`
    seen = manifest.row(path / name, clip.caption, path, path / "manifest.parquet")
    clip.facts |= {key: seen[key] for key in seen if key not in ("path", "caption", "caption_source", "scores", "edits")}
    if clip.facts.get("dropped") == "no caption":  # here `List.captioned` says whether that matters
        del clip.facts["dropped"]
    return clip


READERS: dict[str, Reader] = {
    "internvid": internvid, "panda": panda, "openvid": openvid, "koala": koala, "webvid": webvid, "vript": vript, "mira0": mira0,
    "mira1": mira1, "hdvg": hdvg, "video2dataset": video2dataset, "webdataset": webdataset, "huggingface": table, "table": table,
    "folder": folder}


@dataclass(frozen=True)
class List:
    """A list of clips, and where its videos are."""

    kind: str  # one of READERS
    list: str  # the file, or the folder
    files: str = ""  # folder of the videos or clips; empty: the list itself where it is a folder
    source: str = ""  # name of the collection; empty: the kind, or the folder's name
    licence: str = ""  # of the clips, if it is not what the list says of itself
    limit: int = 0  # entries that are read; 0: all
    captioned: bool = True  # drop clips without a caption; false where a captioner comes later

    def __post_init__(self):
        """Raises ValueError naming a kind that there is not, or a limit below 0."""
        if self.kind not in READERS:
            raise ValueError(f"kind: {self.kind}: no such kind of list; there are {', '.join(READERS)}")
        if self.limit < 0:
            raise ValueError(f"limit: {self.limit} entries cannot be read; 0 reads all")


@dataclass(frozen=True)
class Settings:
    """The lists that make one manifest."""

    lists: list[List] = field(default_factory=list)

    def __post_init__(self):
        """Raises ValueError where there is none."""
        if not self.lists:
            raise ValueError("lists: name at least one, such as [{kind: folder, list: videos}]")


class Files:
    """Video files below a folder, found by the habits of downloaders: a whole video ID.mp4, or a clip ID_START_END.mp4 with the
    times' colons as they are, left out, or replaced by - or _."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES) if folder else []
        self._by_stem = {path.stem: path for path in reversed(paths)}
        self._by_name = {path.relative_to(folder).as_posix(): path for path in paths}

    def find(self, clip: Listed) -> tuple[Path | None, bool]:
        """The clip's file, and whether it is the whole video, in which the clip's times hold, not the clip alone."""
        if clip.file in self._by_name:
            return self._by_name[clip.file], clip.from_s is None
        start, end = (str(clip.tags.get(key) or "") for key in ("start", "end"))
        spelt = [f"{clip.video}_{start}_{end}".replace(":", by) for by in (":", "", "-", "_")]
        for stem in [clip.name, Path(clip.file).stem, *spelt]:
            if stem and stem in self._by_stem and stem != clip.video:
                return self._by_stem[stem], False
        return self._by_stem.get(clip.video), True


def inputs(settings: Settings) -> list[list]:
    """What the rows depend on beside the settings: names, sizes and times of the lists and the videos."""
    places = [Path(place) for part in settings.lists for place in (part.list, part.files) if place]
    files = (file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place]) if file.is_file())
    return [[file.as_posix(), (about := file.stat()).st_size, about.st_mtime_ns] for file in files]


def listed(settings: Settings, out: Path, counts: Counter | None = None) -> Iterator[dict[str, Any]]:
    """The rows of all lists, for a manifest in the folder `out`; one that an earlier list had is not repeated.

    counts gets how many there are, lack a file or a caption, or are bad lines. Rows come as they are read, so a list may be longer
    than memory. Raises ValueError naming a list or folder that is not there.
    """
    seen: set[str] = set()
    for part in settings.lists:
        for key, place in (("list", part.list), ("files", part.files)):
            if place and not Path(place).exists():
                raise ValueError(f"{place}: no such {key}")
    for part in settings.lists:
        here: Counter = Counter()
        yield from _rows_of(part, out, here, seen)
        if counts is not None:
            counts.update(here)
        print(f"ingest {part.list}: " + ", ".join(f"{count} {name}" for name, count in here.items()), file=sys.stderr)


def ingest(kind: str, path: Path, out: Path, files: Path | None = None, **more: Any) -> Counter:
    """Reads a list of one of READERS into the manifest `out`; gives how many clips it has, lack a file or a caption, or are bad
    lines. more: the other fields of List. Raises ValueError naming a list that is not there or of an unknown kind."""
    counts: Counter = Counter()
    part = List(kind, str(path), str(files or ""), **more)
    manifest.write(out, listed(Settings([part]), out.parent, counts))
    return counts


def _rows_of(part: List, out: Path, counts: Counter, seen: set[str]) -> Iterator[dict[str, Any]]:
    path, out = Path(part.list), out.resolve()
    files = Files(Path(part.files).resolve() if part.files else path.resolve() if path.is_dir() else None)
    entries = itertools.islice(READERS[part.kind](path), part.limit or None)
    for entry in tqdm(entries, desc=f"ingest {path.name}", unit=" clips", disable=None):
        row = entry if isinstance(entry, Bad) else _attempt(lambda entry=entry: _row(entry, part))
        if isinstance(row, Bad):
            counts["bad lines"] += 1
            if counts["bad lines"] <= 5:
                print(f"passed over: {row}", file=sys.stderr)
            continue
        if row["id"][:20] in seen:
            counts["repeated"] += 1
            continue
        seen.add(row["id"][:20])
        file, whole = _unpacked(entry, row["id"], out) if entry.held else files.find(entry)
        if "start_s" not in entry.facts:
            row["start_s"], row["end_s"] = (entry.from_s, entry.to_s) if whole else (
                (0.0, None if entry.from_s is None else entry.to_s - entry.from_s))
        row["path"] = file and Path(os.path.relpath(file, out)).as_posix()
        row["dropped"] = "no file" if file is None else row.get("dropped") or (
            "no caption" if part.captioned and not row["caption"] else None)
        counts["clips"] += 1
        counts[(row["dropped"] or "usable").partition(" (")[0]] += 1
        yield row


def _row(entry: Listed, part: List) -> dict[str, Any]:
    """The row of a clip, but for where its file is. Raises Bad for values that no row can have."""
    span = entry.from_s, entry.to_s
    if span != (None, None) and (None in span or not 0 <= entry.from_s < entry.to_s < math.inf):
        raise Bad(f"{entry.name or entry.video}: from {entry.from_s} to {entry.to_s} s is no span")
    about = f"{part.kind} {entry.video} {entry.from_s} {entry.to_s} {entry.name}"
    caption = " ".join((_text(entry.caption) or "").split())
    source = part.source or part.kind
    told = {"licence": part.licence} if part.licence else {}
    return {"id": hashlib.sha256(about.encode(errors="replace")).hexdigest(), "source": source,
            "source_id": _text(entry.name) or f"{_text(entry.video)}_{entry.from_s}_{entry.to_s}",
            "video": _text(entry.video), "from_s": entry.from_s, "to_s": entry.to_s, "url": _text(entry.url),
            "caption": caption or None, "caption_source": source if caption else None,
            "captions": {name: _text(value) for name, value in entry.captions.items()},
            "scores": {name: value for name, raw in entry.scores.items() if (value := _number(raw)) is not None},
            "tags": {name: _text(str(value)) for name, value in entry.tags.items() if value not in (None, "")},
            "edits": [], "licence": licence.OF_LISTS.get(part.kind),
            **{name: value for name, value in entry.facts.items() if not isinstance(value, int | float) or abs(value) < 2**31},
            **told, **({"source": part.source} if part.source else {})}


def _text(value: Any) -> str | None:
    """Text as a file can hold it; None for nothing. Raises Bad for lists and the like."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise Bad(f"not a text: {str(value)[:100]}")
    text = str(value)
    return text if text.isascii() else text.encode(errors="replace").decode()


def _unpacked(entry: Listed, key: str, out: Path) -> tuple[Path, bool]:
    """The file that a list's own bytes were copied to, now or by an earlier run; it is the clip alone, as in Files.find."""
    suffix = Path(entry.file).suffix.lower()
    path = out / "sources" / f"{key}{suffix if suffix in VIDEO_SUFFIXES else '.mp4'}"
    if not path.is_file() or path.stat().st_size != entry.size:
        with renamed_when_whole(path) as part:
            part.write_bytes(entry.held())
    return path, False


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Bad as error:
        return error
    except (LookupError, ValueError, TypeError, SyntaxError, AttributeError, OSError, ArithmeticError, RecursionError) as error:
        return Bad(f"{type(error).__name__}: {str(error)[:200]}")


def _many(read: Callable[[], list]) -> Iterator[Any]:
    """What `read` gives, one by one, or the Bad that it comes to."""
    found = _attempt(read)
    yield from [found] if isinstance(found, Bad) else found


def _rows(path: Path, clip: Callable[[dict[str, str]], Listed]) -> Iterator[Entry]:
    for row in _table(path):
        yield _attempt(lambda row=row: clip(row))


def _table(path: Path) -> Iterator[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        yield from csv.DictReader(file)


def _lines(path: Path) -> Iterator[Any]:
    """The objects of JSON lines, or of one JSON list."""
    with open(path, encoding="utf-8", errors="replace") as file:
        if file.read(1) == "[":
            yield from _many(lambda: _json(path))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    yield Bad(f"line {number}: not JSON")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8", errors="replace"))


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    with manifest.pq.ParquetFile(path) as file:
        heavy = any(manifest.pa.types.is_nested(kind) or manifest.pa.types.is_binary(kind) for kind in file.schema_arrow.types)
        for group in file.iter_batches(16 if heavy else manifest.ROWS):
            yield from group.to_pylist()


def _arrow(path: Path) -> Iterator[dict[str, Any]]:
    with manifest.pa.memory_map(str(path)) as file:
        for group in manifest.pa.ipc.open_stream(file):
            for i in range(len(group)):  # a row may hold a whole video
                yield from group.slice(i, 1).to_pylist()


def _tube(url: str) -> str | None:
    found = re.search(r"(?:v=|youtu\.be/)([\w-]{11})", url)
    return found and found[1]


def _number(value: Any) -> float | None:
    try:
        number = None if value in (None, "") or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


def _mira_caption(row: dict[str, str]) -> str:
    return row.get("dense_caption") or row.get("short_caption") or ""


def _mira_captions(row: dict[str, str]) -> dict[str, str | None]:
    return {ours: row.get(f"{theirs}_caption") for ours, theirs in
            (("short", "short"), ("dense", "dense"), ("camera", "camera"), ("subjects", "main_object"), ("style", "style"))}


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.ingest", description=__doc__.splitlines()[0])
    parser.add_argument("kind", help=f"of the list: {', '.join(READERS)}")
    parser.add_argument("list", type=Path, help="the file, or the folder")
    parser.add_argument("out", type=Path, help="the manifest, .parquet")
    parser.add_argument("--files", type=Path, help="folder of the videos or clips")
    parser.add_argument("--source", default="", help="name of the collection, if it is not the kind")
    parser.add_argument("--licence", default="", help="of the clips, if it is not the list's own")
    parser.add_argument("--limit", type=int, default=0, help="read so many entries only; 0: all")
    parser.add_argument("--uncaptioned", dest="captioned", action="store_false", help="keep clips without a caption")
    args = parser.parse_args(argv)
    counts = ingest(args.kind, args.list, args.out, args.files, source=args.source, licence=args.licence, limit=args.limit,
                    captioned=args.captioned)
    print(f"{args.out}: {counts['clips']} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())
