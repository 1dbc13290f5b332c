"""The whole chain of cleaning: on a file, on a folder, on a manifest; interrupted, killed, and with clips that break it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_tools import clean, degrade, film, manifest, measure
from data_tools.film import Clip

ROOT = Path(__file__).parent.parent
FAST = clean.Settings(overlays=False)


def broken(row: dict, *others: object) -> None:
    """A worker's job that a decoder's crash or an endless loop may end."""
    if row["source_id"] == "still.mp4":
        os._exit(7)
    if row["source_id"] == "woven.mp4":
        time.sleep(600)
    clean.clean_row(row, *others)


def noted(row: dict, folder: Path, out: Path, settings: clean.Settings, key: str) -> None:
    """A worker's job that only says when it was a row's turn."""
    with open(out / "turns", "a") as file:
        file.write(row["id"])
    clean._finish(row, out, key, {})


@pytest.fixture(scope="module")
def clips():
    """Clips of 160x120: one as it is, one woven, one still."""
    return {"plain": degrade.synth(11, 40, 120, 160), "woven": degrade.weave(degrade.synth(12, 80, 120, 160, rate=50)),
            "still": degrade.synth(13, 20, 120, 160, still=True)}


@pytest.fixture
def folder(clips, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, clip in clips.items():
        film.write(videos / f"{name}.mp4", film.from_clip(clip), crf=18)
    (videos / "plain.txt").write_text("a wheel turns over a moving pattern\n")
    (videos / "text.mp4").write_text("no film")
    return videos


def state(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "data_tools.clean", *map(str, words)]


def test_a_clean_file_keeps_its_bytes(folder, tmp_path):
    out, report = tmp_path / "out.mp4", tmp_path / "r.json"
    assert clean.main([str(folder / "plain.mp4"), "--out", str(out), "--report", str(report)]) == 0
    assert out.read_bytes() == (folder / "plain.mp4").read_bytes()
    said = json.loads(report.read_text())
    assert (said["verdict"], said["edits"]) == ("progressive", [])
    assert "nothing to do" in said["notes"]


def test_a_woven_file_comes_out_mended_and_says_how(folder, clips, tmp_path):
    out, report = tmp_path / "out.mp4", tmp_path / "r.json"
    assert clean.main([str(folder / "woven.mp4"), "--out", str(out), "--report", str(report), "--no-overlays"]) == 0
    said = json.loads(report.read_text())
    assert said["verdict"] == "tff"
    assert said["confidence"] > 0.9
    assert [edit["step"] for edit in said["edits"]] == ["deinterlace"]
    assert set(said["edits"][0]) == {"step", "settings", "confidence", "version"}
    truth, back = degrade.synth(12, 80, 120, 160, rate=50).take(slice(0, None, 2)), film.to_clip(film.read(out))
    assert len(back.y) == 40
    assert measure.psnr(back.y, truth.y) > measure.psnr(clips["woven"].y, truth.y) + 4


def test_a_folder_becomes_a_manifest_in_which_no_file_is_missing(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert clean.main([str(folder), "--out", str(out), "--no-overlays", "--workers", "2"]) == 0
    rows = {row["source_id"]: row for row in manifest.read(out / "manifest.parquet")}
    assert sorted(rows) == ["plain.mp4", "still.mp4", "text.mp4", "woven.mp4"]
    assert rows["text.mp4"]["dropped"].startswith("cannot be cleaned (cannot be opened as a video")
    assert (out / rows["plain.mp4"]["path"]).resolve() == folder / "plain.mp4"
    assert rows["plain.mp4"]["caption"] == "a wheel turns over a moving pattern"
    woven = rows["woven.mp4"]
    assert (woven["field_order"], woven["frames"], woven["width"]) == ("tff", 40, 160)
    assert json.loads(woven["edits"][0]["settings"])
    assert len(film.to_clip(film.read(out / woven["path"])).y) == 40
    assert "4 clips, 1 dropped, 1 repaired" in capsys.readouterr().out
    # Its manifest can be cleaned again: now nothing is to be done, and what was done stays on record.
    assert clean.main([str(out / "manifest.parquet"), "--out", str(tmp_path / "again"), "--no-overlays"]) == 0
    again = {row["source_id"]: row for row in manifest.read(tmp_path / "again" / "manifest.parquet")}
    assert again["woven.mp4"]["edits"] == woven["edits"]
    assert (tmp_path / "again" / again["woven.mp4"]["path"]).resolve() == (out / woven["path"]).resolve()


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(folder, tmp_path):
    for i in range(3):
        film.write(folder / f"more{i}.mp4", film.from_clip(degrade.weave(degrade.synth(20 + i, 40, 96, 128, rate=50))), crf=18)
    words = (folder, "--no-overlays")
    subprocess.run(command(*words, "--out", tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    out = tmp_path / "out"
    killed = 0
    for wait in (1, 2, 4):  # rows to wait for before the kill
        process = subprocess.Popen(command(*words, "--out", out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        while process.poll() is None and len(list(out.glob("rows/*.json"))) < wait:
            time.sleep(0.05)
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert killed
    subprocess.run(command(*words, "--out", out), cwd=ROOT, check=True, capture_output=True)
    left = {name: content for name, content in state(out).items() if not name.endswith(".part")}
    assert left == state(tmp_path / "whole")


def test_a_clip_that_breaks_a_worker_costs_no_other(folder, tmp_path):
    done = clean.clean_rows(clean.listed(folder), folder, tmp_path / "out", FAST, workers=2, timeout_s=15, job=broken)
    said = {row["source_id"]: row.get("dropped") for row in done}
    assert said["plain.mp4"] is None
    assert said["still.mp4"] == "cleaning ended its process (code 7)"
    assert said["woven.mp4"] == "cleaning took longer than 15 s"
    assert "cannot be opened" in said["text.mp4"]
    for timeout, left in ((15, "cleaning took longer than 15 s"), (60, None)):  # only more time is a reason to try again
        again = clean.clean_rows(clean.listed(folder), folder, tmp_path / "out", FAST, workers=2, timeout_s=timeout)
        assert {row["source_id"]: row.get("dropped") for row in again} == said | {"woven.mp4": left}


def test_long_clips_come_first(tmp_path):
    (tmp_path / "long").write_bytes(bytes(1000))
    lengths = {"a": 1.0, "b": 9.0, "c": 4.0}
    rows = [{"id": name, "path": "film.mp4", "start_s": 2.0, "end_s": 2.0 + length} for name, length in lengths.items()]
    rows += [{"id": "d", "path": "long"}, {"id": "e", "path": "missing"}]
    done = clean.clean_rows(rows, tmp_path, tmp_path, FAST, job=noted)
    assert (tmp_path / "turns").read_text() == "dbcae"
    assert [row["id"] for row in done] == list("abcde")


def test_a_mistake_of_ours_is_named_and_traced(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "clean", lambda *rest: {}["nothing"])
    row, out = {"id": "a", "path": "plain.mp4"}, tmp_path / "out"
    (out / "rows").mkdir(parents=True)
    clean.clean_row(row, folder, out, FAST, "key")
    held = json.loads((out / "rows" / "a.json").read_text())
    assert held["row"]["dropped"] == "cleaning failed (KeyError: 'nothing')"
    assert "Traceback" in held["report"]["trace"][0]


def test_a_span_of_a_file_is_cleaned_alone(clips, tmp_path):
    both = Clip(*(np.concatenate([a, b]) for a, b in zip(clips["plain"][:3], clips["woven"][:3], strict=True)), np.arange(80) / 25)
    film.write(tmp_path / "both.mp4", film.from_clip(both), crf=18)
    row = {"id": "f" * 64, "path": "both.mp4", "frames": 80, "fps": 25.0}
    spans = [row | {"id": f"{i}", "start_s": start, "end_s": end} for i, (start, end) in enumerate([(0.0, 1.6), (1.6, 3.2)])]
    first, second = clean.clean_rows(spans, tmp_path, tmp_path / "out", FAST)
    assert (first["field_order"], first["edits"], first["end_s"]) == ("progressive", [], 1.6)
    assert (second["field_order"], second["frames"], second["start_s"]) == ("tff", 40, 0.0)


@pytest.mark.parametrize(("height", "width", "count"), [(2, 2, 5), (2, 64, 9), (64, 2, 9), (8, 8, 30), (30, 40, 40), (16, 16, 1)])
def test_tiny_films_are_left_alone(height, width, count):
    draw = np.random.default_rng(0)
    y, u, v = (draw.integers(16, 236, (count, -(-height // by), -(-width // by)), dtype=np.uint8) for by in (1, 2, 2))
    given = film.from_clip(Clip(y, u, v, np.arange(count) / 25))
    outcome = clean.clean(given, clean.Settings())
    assert (outcome.film, outcome.edits, outcome.dropped) == (given, [], None)


def test_bad_words_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LATTE_QTGMC_PYTHON", raising=False)
    for words, reason in (((folder,), "--out: name the folder"), ((tmp_path / "none.mp4",), "no such video file"),
                          ((folder / "plain.mp4", "--grade", "finest"), "finest"),
                          ((folder / "plain.mp4", "--rate", "fields"), "fields"),
                          ((folder / "plain.mp4", "--crf", "-5"), "crf: -5"),
                          ((folder, "--out", tmp_path / "out", "--workers", "0"), "workers: 0"),
                          ((folder, "--out", tmp_path / "out", "--grade", "finest"), "finest"),
                          ((folder, "--out", tmp_path / "out", "--grade", "best"), "LATTE_QTGMC_PYTHON is None")):
        assert clean.main([str(word) for word in words]) == 1
        assert reason in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.json"))


def test_dropped_rows_keep_finding_their_files(folder, tmp_path):
    rows = [{"id": "a", "path": "plain.mp4", "dropped": "too dull"}, {"id": "b", "dropped": "no file"}]
    first, second = clean.clean_rows(rows, folder, tmp_path / "out", FAST)
    assert (tmp_path / "out" / first["path"]).resolve() == folder / "plain.mp4"
    assert (first["dropped"], second) == ("too dull", rows[1])


def test_the_chain_takes_a_function_of_the_user(clips):
    outcome = clean.clean(film.from_clip(clips["still"]), clean.Settings(overlays=False, network="numpy:copy"))
    assert [edit.step for edit in outcome.edits] == ["network"]


def test_lines_are_known_to_be_shot_only_where_all_of_a_film_was_woven(clips):
    both = Clip(*(np.concatenate([a, b]) for a, b in zip(clips["plain"][:3], clips["woven"][:3], strict=True)), np.arange(80) / 25)
    for clip, shot in ((clips["woven"], (0, 1)), (both, ()), (clips["plain"], ())):
        assert clean._shot(clean.deinterlace(film.from_clip(clip), rate="field")) == shot
