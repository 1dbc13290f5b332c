"""A published set is made again from its manifest: the same bytes, and what is gone is named."""

import json
import shutil

import cv2
import numpy as np
import pytest

from data_tools import clean, cut, degrade, film, manifest, rebuild, stitch
from data_tools.manifest import Job
from latte import video


def row(key: str, path: str, from_s: float, to_s: float, start_s: float = 0.0, **more) -> manifest.Row:
    return dict.fromkeys(manifest.SCHEMA.names) | {
        "id": key, "source": "set", "video": path[0], "path": path, "from_s": from_s, "to_s": to_s, "start_s": start_s,
        "end_s": start_s + to_s - from_s, "caption": f"Scene {key}.", "edits": [], "scores": {}, "tags": {}} | more


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run's folder: a woven file that is cleaned, two files that are joined, and a whole video, with their published manifest."""
    cv2.setNumThreads(1)
    place = tmp_path_factory.mktemp("set")
    sources, out = place / "sources", place / "run"
    sources.mkdir()
    scene = degrade.synth(31, 150, 96, 128, rate=25)
    woven = degrade.weave(degrade.synth(32, 120, 96, 128, rate=50))
    degrade.encode(woven, str(sources / "woven.mp4"), 16, form="mp4")
    degrade.encode(scene.take(slice(0, 75)), str(sources / "b0.mp4"), 18, form="mp4")
    degrade.encode(scene.take(slice(75, 150)).timed(25), str(sources / "b1.mp4"), 24, form="mp4")
    degrade.encode(degrade.synth(33, 100, 96, 128, rate=24), str(sources / "whole.mp4"), 20, form="mp4")
    rows = [row("w", "../sources/woven.mp4", 0.0, 2.4), row("b0", "../sources/b0.mp4", 0.0, 3.0, video="b"),
            row("b1", "../sources/b1.mp4", 3.0, 6.0, video="b"), row("c", "../sources/whole.mp4", 1.0, 3.5, start_s=1.0)]
    settings = {"clean": clean.Settings(overlays=False), "stitch": stitch.Settings(), "cut": cut.Settings()}
    (out / "rows").mkdir(parents=True)
    rows = clean.work(rows, Job(out, settings["clean"]))
    rows = stitch.work([row | {"transitions": []} for row in rows], Job(out, settings["stitch"]))
    clips, done = [row for row in rows if not row["dropped"]], [row for row in rows if row["dropped"]]
    rows = cut.work(clips, Job(out, settings["cut"])) + done
    about = {"stages": [[name, vars(held), "1"] for name, held in settings.items()], "versions": {"numpy": np.__version__}}
    manifest.write(out / "manifest.parquet", rows, about)
    return out, sources


def live(out) -> list[manifest.Row]:
    return [row for row in manifest.read(out / "manifest.parquet") if not row["dropped"]]


def test_the_set_holds_clips_of_every_kind(published):
    out, _ = published
    steps = sorted([edit["step"] for edit in made["edits"]] for made in live(out))
    assert steps[:3] == [["cut"], ["stitch", "cut"], ["stitch", "cut"]]
    assert len(steps) == 4 and len(steps[3]) == 2  # cleaned, then cut
    for made in live(out):
        info = video.probe(out / made["path"], count=True)
        assert (info.frames, info.fps) == (made["frames"], 8.0)


def test_everything_is_equal_on_the_untouched_sources(published, tmp_path, capsys):
    out, sources = published
    words = [str(out / "manifest.parquet"), "--sources", str(sources), "--out", str(tmp_path / "again")]
    assert rebuild.main(words) == 0
    report = json.loads((tmp_path / "again" / "rebuild.json").read_text())
    assert report["counts"] == {"equal": 4, "different": 0, "gone": 0, "altered": 0, "failed": 0}
    assert "100.00%" in capsys.readouterr().out
    for made in live(out):
        assert (tmp_path / "again" / made["path"]).read_bytes() == (out / made["path"]).read_bytes()
    # The same command again looks at what is there, and makes anew what was cut off.
    first = sorted((tmp_path / "again" / "clips").iterdir())[0]
    first.write_bytes(first.read_bytes()[:-1])
    assert rebuild.main(words) == 0
    assert json.loads((tmp_path / "again" / "rebuild.json").read_text())["counts"]["equal"] == 4


def test_what_is_gone_or_altered_is_listed_and_stops_nothing(published, tmp_path, capsys):
    out, sources = published
    elsewhere = tmp_path / "kept" / "somewhere"
    shutil.copytree(sources, elsewhere)
    (elsewhere / "woven.mp4").unlink()
    film.write(elsewhere / "b1.mp4", film.read(sources / "b1.mp4"), crf=30)
    report = rebuild.rebuild(out / "manifest.parquet", tmp_path / "kept", tmp_path / "out")
    assert report["counts"] == {"equal": 1, "different": 0, "gone": 1, "altered": 2, "failed": 0}
    assert report["sources"] == {"../sources/b1.mp4": "altered", "../sources/woven.mp4": "gone"}
    wanted = {made["id"] for made in live(out) if len(made["edits"]) == 2}
    assert {lost["id"] for lost in report["rows"]} == wanted
    rebuild.show(report)
    assert "gone: ../sources/woven.mp4" in capsys.readouterr().out


def test_other_pixels_are_told(published, tmp_path):
    out, sources = published
    rows = live(out)
    rows[0]["sha256"] = "0" * 64
    manifest.write(tmp_path / "m.parquet", rows, manifest.about(out / "manifest.parquet") | {"versions": {"numpy": "0.1"}})
    report = rebuild.rebuild(tmp_path / "m.parquet", sources, tmp_path / "out")
    assert (report["counts"]["different"], report["rows"][0]["id"]) == (1, rows[0]["id"])
    assert report["versions"] == {"numpy": ["0.1", np.__version__]}


def test_bad_input_is_named(published, tmp_path, capsys):
    out, sources = published
    for words, told in ((["--sources", str(tmp_path / "no"), "--out", str(tmp_path / "o")], "--sources: "),
                        (["--sources", str(sources), "--out", str(out)], "--out: "),
                        (["--sources", str(sources), "--out", str(tmp_path / "o"), "--workers", "0"], "--workers: 0")):
        assert rebuild.main([str(out / "manifest.parquet"), *words]) == 1
        assert told in capsys.readouterr().err
    rows = [row | {"edits": []} for row in live(out)[:1]]
    manifest.write(tmp_path / "m.parquet", rows)
    report = rebuild.rebuild(tmp_path / "m.parquet", sources, tmp_path / "out")
    assert report["rows"][0]["why"].startswith("its row names no picked")


def test_clips_can_be_sized(published, tmp_path):
    out, sources = published
    picked = row("s", "whole.mp4", 0.0, 2.0, picked=[0.0, 0.125, 0.25])
    made = cut.work([picked], Job(sources, cut.Settings(height=64, width=64)))[0]
    back = film.to_clip(film.read(sources / made["path"]))
    shutil.rmtree(sources / "clips")
    assert (back.y.shape, made["width"], made["frames"]) == ((3, 64, 64), 64, 3)
    truth = film.to_clip(film.read(sources / "whole.mp4")).take([0, 3, 6])
    small = cv2.resize(truth.y[1], (round(128 * 64 / 96 / 2) * 2, 64), interpolation=cv2.INTER_AREA)
    left = (small.shape[1] - 64) // 2
    assert np.abs(back.y[1].astype(int) - small[:, left:left + 64]).mean() < 2
    assert cut.work([row("s", "whole.mp4", 0.0, 2.0)], Job(sources, cut.Settings()))[0]["dropped"] == "no frames were picked"
    bad = cut.work([row("s", "whole.mp4", 0.0, 2.0, picked=[0.01])], Job(sources, cut.Settings()))[0]
    assert bad["dropped"].startswith("cannot be cut (no picture of it lies")
    with pytest.raises(ValueError, match="height: give both"):
        cut.Settings(height=64)
