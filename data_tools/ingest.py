"""Reads the lists of open video sets into the one manifest: a clip a row, times exact, nothing vanishes.

    python -m data_tools.ingest internvid InternVid-10M-flt.jsonl out/flt.parquet --files VIDEOS

A reader is a small function from the list's path to clips, one for each layout in READERS. Scores are taken where they are given.
Lines that cannot be read are counted and shown, never fatal. Files are found below --files by their names, whole videos and cut
clips alike; a clip without one keeps its row, dropped as "no file".
"""

import argparse
import ast
import csv
import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools import manifest
from latte.clips import VIDEO_SUFFIXES

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
    facts: dict[str, Any] = field(default_factory=dict)  # width, height, fps, frames


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
                      tags=times | {key.lower(): entry.get(key) for key in ("Language", "Category")})

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
        found = _attempt(lambda row=row: clips(row))
        yield from found if isinstance(found, list) else [found]


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
        scores = {key: row.get(f"{key}_score") for key in ("clarity", "aesthetic", "motion", "video_training_suitability")}
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
        found = _attempt(lambda file=file: clips(file))
        yield from found if isinstance(found, list) else [found]


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
    def scenes(video: str, name: str, clip: dict, url: str) -> list[Listed]:
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
        held = _attempt(lambda file=file: _json(file))
        if isinstance(held, Bad):
            yield held
            continue
        for video, entry in held.items():
            for name, clip in (entry.get("clip") or {}).items():
                found = _attempt(lambda v=video, n=name, c=clip, e=entry: scenes(v, n, c, e.get("url") or ""))
                yield from found if isinstance(found, list) else [found]


def video2dataset(path: Path) -> Iterator[Entry]:
    """The input of video2dataset, CSV or Parquet: url, caption, and clips, a list of [start, end]."""
    def clips(row: dict[str, Any]) -> list[Listed]:
        url = row.get("url") or row.get("contentUrl") or row["videoURL"]
        video = row.get("videoID") or (re.search(r"(?:v=|youtu\.be/)([\w-]{11})", url) or [None, url])[1]
        spans = row.get("clips") or [(None, None)]
        spans = ast.literal_eval(spans) if isinstance(spans, str) else spans
        return [Listed(video, *(None if time is None else seconds(time) for time in span), row.get("caption") or "", url=url)
                for span in spans]

    rows = _parquet(path) if path.suffix == ".parquet" else _table(path)
    for row in rows:
        found = _attempt(lambda row=row: clips(row))
        yield from found if isinstance(found, list) else [found]


def table(path: Path) -> Iterator[Entry]:
    """Any CSV, JSON lines or Parquet, as exported from a hub's data set, with the columns file (or path or video) and caption (or
    text); start, end in seconds, url, id and numbers, which become scores, are taken if they are there."""
    rows = _parquet(path) if path.suffix == ".parquet" else _lines(path) if path.suffix in (".jsonl", ".json") else _table(path)

    def clip(row: dict[str, Any]) -> Listed:
        file = next((row[key] for key in ("file", "path", "video", "file_name") if isinstance(row.get(key), str)), None)
        if not file:
            raise Bad("no column file, path or video")
        known = {"file", "path", "video", "file_name", "caption", "text", "start", "end", "url", "id"}
        scores = {key: value for key, value in row.items() if key not in known and _number(value) is not None}
        times = (seconds(row[key]) if row.get(key) not in (None, "") else None for key in ("start", "end"))
        return Listed(Path(file).stem, *times, row.get("caption") or row.get("text") or "", str(row.get("id") or ""), file,
                      row.get("url") or "", scores=scores)

    for row in rows:
        yield row if isinstance(row, Bad) else _attempt(lambda row=row: clip(row))


READERS: dict[str, Reader] = {
    "internvid": internvid, "panda": panda, "openvid": openvid, "koala": koala, "webvid": webvid, "vript": vript, "mira0": mira0,
    "mira1": mira1, "hdvg": hdvg, "video2dataset": video2dataset, "table": table}
LICENCES = {"internvid": "CC-BY-NC-SA-4.0 (annotations)", "panda": "non-commercial research (Panda-70M, HD-VILA)",
            "openvid": "CC-BY-4.0, research", "koala": "non-commercial (Koala-36M)", "webvid": "withdrawn", "vript": "research",
            "mira0": "non-commercial (MiraData)", "mira1": "non-commercial (MiraData)", "hdvg": "academic (HD-VG-130M)"}


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


def ingest(kind: str, path: Path, out: Path, files: Path | None = None, licence: str | None = None,
           limit: int | None = None) -> Counter:
    """Reads a list of one of READERS into a manifest; gives how many clips it has, lack a file or a caption, or are bad lines.

    Rows are written as they come, so the list may be longer than memory. Raises ValueError naming a list that is not there or
    of an unknown kind.
    """
    if kind not in READERS:
        raise ValueError(f"{kind}: no such kind of list; there are {', '.join(READERS)}")
    if not path.exists():
        raise ValueError(f"{path}: no such list")
    counts: Counter = Counter()
    found = Files(files)
    entries = itertools.islice(READERS[kind](path), limit)
    rows = _as_rows(tqdm(entries, desc=f"ingest {path.name}", unit=" clips", disable=None), kind, found, out,
                    licence or LICENCES.get(kind), counts)
    manifest.write(out, rows)
    return counts


def _as_rows(entries: Iterable[Entry], kind: str, files: Files, out: Path, licence: str | None,
             counts: Counter) -> Iterator[dict[str, Any]]:
    here, seen = out.resolve().parent, set()
    for entry in entries:
        if isinstance(entry, Bad):
            counts["bad lines"] += 1
            if counts["bad lines"] <= 5:
                print(f"passed over: {entry}", file=sys.stderr)
            continue
        if entry.from_s is not None and (entry.to_s is None or not 0 <= entry.from_s < entry.to_s):
            counts["bad lines"] += 1
            continue
        about = f"{kind} {entry.video} {entry.from_s} {entry.to_s} {entry.name}"
        key = hashlib.sha256(about.encode(errors="replace")).hexdigest()
        if key[:20] in seen:
            counts["repeated"] += 1
            continue
        seen.add(key[:20])
        path, whole = files.find(entry)
        length = None if entry.from_s is None else entry.to_s - entry.from_s
        times = (entry.from_s, entry.to_s) if whole else (0.0, length)
        caption = " ".join(entry.caption.split())
        dropped = "no file" if path is None else None if caption else "no caption"
        counts["clips"] += 1
        counts[dropped or "usable"] += 1
        yield {"id": key, "source": kind, "source_id": entry.name or f"{entry.video}_{entry.from_s}_{entry.to_s}",
               "video": entry.video, "from_s": entry.from_s, "to_s": entry.to_s, "url": entry.url or None,
               "path": path and Path(os.path.relpath(path.resolve(), here)).as_posix(), "start_s": times[0], "end_s": times[1],
               "caption": caption or None, "caption_source": kind if caption else None,
               "captions": {name: value or None for name, value in entry.captions.items()},
               "scores": {name: value for name, raw in entry.scores.items() if (value := _number(raw)) is not None},
               "tags": {name: str(value) for name, value in entry.tags.items() if value not in (None, "")},
               "edits": [], "dropped": dropped, "licence": licence, **entry.facts}


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Bad as error:
        return error
    except (KeyError, ValueError, TypeError, SyntaxError, AttributeError, IndexError, OSError, ZeroDivisionError) as error:
        return Bad(f"{type(error).__name__}: {str(error)[:200]}")


def _rows(path: Path, clip: Callable[[dict[str, str]], Listed]) -> Iterator[Entry]:
    for row in _table(path):
        yield _attempt(lambda row=row: clip(row))


def _table(path: Path) -> Iterator[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        yield from csv.DictReader(file)


def _lines(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    yield Bad(f"line {number}: not JSON")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8", errors="replace"))


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    for group in manifest.pq.ParquetFile(path).iter_batches(manifest.ROWS):
        yield from group.to_pylist()


def _number(value: Any) -> float | None:
    try:
        return None if value in (None, "") or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _mira_caption(row: dict[str, str]) -> str:
    return row.get("dense_caption") or row.get("short_caption") or ""


def _mira_captions(row: dict[str, str]) -> dict[str, str | None]:
    return {ours: row.get(f"{theirs}_caption") for ours, theirs in
            (("short", "short"), ("dense", "dense"), ("camera", "camera"), ("subjects", "main_object"), ("style", "style"))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.ingest", description=__doc__.splitlines()[0])
    parser.add_argument("kind", help=f"of the list: {', '.join(READERS)}")
    parser.add_argument("list", type=Path, help="the file, or the folder for vript and hdvg")
    parser.add_argument("out", type=Path, help="the manifest, .parquet")
    parser.add_argument("--files", type=Path, help="folder of the videos or clips")
    parser.add_argument("--licence", help="of the clips, if it is not the list's own")
    parser.add_argument("--limit", type=int, help="read so many entries only")
    args = parser.parse_args(argv)
    try:
        counts = ingest(args.kind, args.list, args.out, args.files, args.licence, args.limit)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
