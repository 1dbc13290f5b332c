"""The survival page: counts and hours are right, form is no loss, thresholds are drawn in, nothing outside is needed."""

import itertools
import json
import re

import numpy as np
import pytest

from data_tools import degrade, film, manifest, survival
from latte import keyed


def row(number, seconds=10.0, **more):
    return {"id": f"{number:064x}", "path": "a.mp4", "start_s": 0.0, "end_s": seconds, "caption": f"clip <{number}>", "scores": {},
            "tags": {}, "edits": [], "dropped": None} | more


@pytest.fixture
def run(tmp_path):
    """20 rows of 10 s: 2 have no file, 4 are joined into 2 of 18 s, 5 filtered, one is cut into 2 of 4 s, one is too short."""
    film.write(tmp_path / "a.mp4", film.from_clip(degrade.synth(3, 20, 64, 96)))
    listed = [row(i, **({"path": None, "dropped": "no file"} if i < 2 else {})) for i in range(20)]
    longer = [row(100 + i, 18.0) for i in range(2)]
    joined = [each | {"dropped": f"joined: in a longer clip ({longer[i % 2]['id'][:16]})"} if 2 <= i < 6 else each
              for i, each in enumerate(listed)] + longer
    values = keyed.rng(0, "scores").uniform(0, 10, len(joined))
    scored = [each if each["dropped"] else each | {"scores": {"motion": float(value), "faces": 1.0}}
              for each, value in zip(joined, values, strict=True)]
    live = sorted((each for each in scored if not each["dropped"]), key=lambda each: each["scores"]["motion"])
    bound = live[5]["scores"]["motion"]
    filtered = [each | {"dropped": f"motion too low ({each['scores']['motion']:.3g})"}
                if not each["dropped"] and each["scores"]["motion"] < bound else each for each in scored]
    left = [each["id"] for each in filtered if not each["dropped"]]
    cut = [each | {"dropped": "cut: into 2 clips"} if each["id"] == left[0] else each | {"dropped": "too short (1.2 s)"}
           if each["id"] == left[1] else each for each in filtered] + [row(200, 4.0), row(201, 4.0)]
    keep = {"keep": {"motion": [bound, None]}}
    stages = [["ingest", {}, listed], ["gather", {"gap_s": 0.0}, joined], ["score", {}, scored], ["filter-one", keep, filtered],
              ["stitch", {}, cut]]
    for number, (name, _, rows) in enumerate(stages):
        manifest.write(tmp_path / "stages" / f"{number:02d}-{name}.parquet", rows)
    (tmp_path / "run.json").write_text(json.dumps({"stages": [[name, settings, "1"] for name, settings, _ in stages]}))
    return tmp_path


def test_rows_and_hours_of_every_stage(run):
    steps = survival.passed([survival.Stage(*stage) for stage in survival.of_run(run)])
    assert [step.came[0] for step in steps] == [20, 18, 16, 16, 11] and [step.went[0] for step in steps] == [18, 16, 16, 11, 11]
    assert [step.gone[0] for step in steps] == [2, 0, 0, 5, 1] and [step.new for step in steps] == [0, 2, 0, 0, 2]
    gather, cut = steps[1], steps[4]
    assert gather.formed == {"joined: in a longer clip": (4, 40.0)} and gather.unused == pytest.approx(4.0)
    assert steps[3].lost["motion too low"][0] == 5 and cut.lost["too short"][0] == 1
    assert cut.formed["cut: into N clips"][0] == 1
    for before, after in itertools.pairwise(steps):
        assert before.went == after.came
    assert cut.went[1] == pytest.approx(cut.came[1] - cut.gone[1] - cut.unused)


def test_reasons_are_counted_without_what_they_measure():
    assert survival.short("motion too low (0.12)") == "motion too low"
    assert survival.short(f"near-duplicate of {'ab12' * 16}") == "near-duplicate of ..."
    assert survival.short("cut: into 14 clips") == "cut: into N clips"
    assert survival.short("cannot be read (no video (none at all))") == "cannot be read"


def test_a_manifest_longer_than_a_batch_gives_the_same(run, monkeypatch):
    stages = survival.of_run(run)
    whole = survival.page(stages, run / "one.html", run)
    monkeypatch.setattr(survival, "ROWS", 3)
    assert survival.page(stages, run / "two.html", run) == whole
    assert (run / "one.html").read_bytes() == (run / "two.html").read_bytes()


def test_histograms_count_every_row_and_split_at_the_bounds(tmp_path):
    values = keyed.rng(1, "values").normal(0, 1, 5000)
    rows = [row(i, scores={"motion": float(value), "other": 2.0}) for i, value in enumerate(values)]
    manifest.write(tmp_path / "m.parquet", [*rows, row(9999, scores={"motion": 50.0}, dropped="gone")])
    found, = survival.histograms(tmp_path / "m.parquet", {"motion": [-1.0, 1.5]}, True)
    kept = (values >= -1) & (values <= 1.5)
    assert (found.kept.sum(), found.lost.sum()) == (kept.sum(), (~kept).sum())
    assert found.quantiles[0] == values.min() and found.quantiles[-1] == values.max()
    assert found.quantiles[2] == pytest.approx(np.median(values), abs=0.05)
    other, = survival.histograms(tmp_path / "m.parquet", {"motion": [-1.0, 1.5]}, False)
    assert other.name == "other" and other.rows == 5000 and np.isfinite(other.edges).all()


def test_the_page_stands_alone(run):
    text = survival.page(survival.of_run(run), run / "survival.html", run)
    page = (run / "survival.html").read_text()
    assert not re.search(r"<script|https?://|<link|@import|url\(", page)
    assert page.count('class="mark"') == 1 and "prefers-color-scheme" in page and "viewport" in page
    assert "clip <" not in page and "clip &lt;" in page  # captions are text
    assert "data:image/jpeg;base64," in page and str(run) not in page
    assert "filter-one: 5 motion too low" in text and "20" in text.splitlines()[1]
    for word in ("motion too low", "joined: in a longer clip", "no file", "gap_s"):
        assert word in page
    survival.page(survival.of_run(run), run / "bare.html", run, thumbnails=False)
    assert "data:image" not in (run / "bare.html").read_text()


def test_thumbnails_are_of_what_this_stage_dropped_and_kept(run):
    stages = [path for _, _, path in survival.of_run(run)]
    dropped = survival.samples(stages[3], stages[2], {"motion too low"}, 0)
    assert len(dropped) == 5 and all(each["dropped"].startswith("motion too low") for each in dropped)
    assert survival.samples(stages[4], stages[3], {"motion too low"}, 0) == []
    kept = survival.samples(stages[4], stages[3], None, 0)
    assert len(kept) == survival.SHOWN and all(each["dropped"] is None for each in kept)
    assert kept == survival.samples(stages[4], stages[3], None, 0) != survival.samples(stages[4], stages[3], None, 1)
    assert survival.thumbnail(run / "gone.mp4", 0.0) is None


def test_a_run_that_lost_everything_still_has_a_page(tmp_path):
    manifest.write(tmp_path / "m.parquet", [row(0, dropped="no file", path=None)])
    path = tmp_path / "m.parquet"
    stages = [("ingest", {}, path), ("filter", {"keep": {"motion": [1, None]}}, path)]
    text = survival.page(stages, tmp_path / "page.html", tmp_path)
    assert "0.0%" in text and (tmp_path / "page.html").stat().st_size > 1000


def test_the_command_line(run, tmp_path, capsys):
    assert survival.main([str(run), "--no-thumbnails"]) == 0
    assert "motion too low" in capsys.readouterr().out and (run / "survival.html").is_file()
    (tmp_path / "other").mkdir()
    assert survival.main([str(tmp_path / "other")]) == 1
    assert "is not the folder of a run" in capsys.readouterr().err
    (run / "stages" / "02-score.parquet").write_bytes(b"no")
    assert survival.main([str(run)]) == 1
    assert "02-score.parquet: cannot be read as a manifest" in capsys.readouterr().err
