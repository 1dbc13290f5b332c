"""Manifests: what is written is read back, no clip vanishes, and training reads them."""


import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_tools import manifest
from latte import video
from latte.clips import FileClips
from latte.config import DataConfig, ShapeConfig

WHOLE = {"id": "a", "source": "films", "source_id": "a.mp4", "video": "a", "from_s": 11.5, "to_s": 14.0, "url": "https://example.org/a",
         "path": "films/a.mp4", "start_s": 1.5, "end_s": 4.0, "width": 64,
         "height": 48, "fps": 23.976, "frames": 60,
         "origin": {"path": "a.mkv", "sha256": "1" * 64, "start_s": 11.5, "end_s": 14.0},
         "parts": [{"id": "b", "from_s": 11.5, "to_s": 12.0, "caption": "a ball"}],
         "transitions": [{"kind": "cut", "from_s": 1.0, "to_s": 1.04, "confidence": 0.9}], "picked": [1.5, 1.625],
         "field_order": "tff", "caption": "a red ball", "caption_source": "file",
         "captions": {"short": "ball", "dense": None, "camera": "still", "subjects": None, "style": None, "events": None},
         "scores": {"sharpness": 0.5, "motion": 1.25}, "tags": {"language": "en"},
         "edits": [{"step": "deinterlace", "settings": '{"taps": 5}', "confidence": 0.9, "version": "1"}],
         "dropped": None, "licence": "CC0", "sha256": "0" * 64, "shard": None}


def pattern(path, frames=12, height=32, width=48, seed=0):
    picture = np.random.default_rng(seed).integers(0, 256, (4, 6, 3)).repeat(height // 4, 0).repeat(width // 6, 1)
    video.write(path, np.stack([np.roll(picture, 2 * i, axis=1) for i in range(frames)]).astype(np.uint8), 8)


@pytest.fixture
def folder(tmp_path):
    """Two good videos, one without a caption, one that is none and one that is turned by a quarter."""
    place = tmp_path / "films"
    (place / "more").mkdir(parents=True)
    pattern(place / "a.mp4")
    pattern(place / "more" / "b.mp4", frames=24, seed=1)
    pattern(place / "mute.mp4", seed=2)
    (place / "broken.mp4").write_bytes(b"no video at all")
    for name in ("a", "more/b", "broken", "turned"):
        (place / f"{name}.txt").write_text(f"caption of {name}\n")
    with av.open(str(place / "turned.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(90)
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * i, np.uint8), format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return place


def test_rows_round_trip(tmp_path):
    bare = {**dict.fromkeys(manifest.SCHEMA.names), "id": "b", "path": "b.mp4"}
    manifest.write(tmp_path / "m.parquet", [WHOLE, {"id": "b", "path": "b.mp4"}])
    assert manifest.read(tmp_path / "m.parquet") == [WHOLE, bare]
    assert pq.read_schema(tmp_path / "m.parquet").remove_metadata() == manifest.SCHEMA
    manifest.write(tmp_path / "empty.parquet", [])
    assert manifest.read(tmp_path / "empty.parquet") == []


@pytest.mark.parametrize(("change", "message"), [
    ({"id": None}, "needs id and path"), ({"colour": "red"}, "knows no colour"), ({"fps": "fast"}, "does not fit"),
    ({"frames": "many"}, "does not fit"), ({"scores": {"sharpness": "high"}}, "does not fit"),
])
def test_a_wrong_row_is_refused_and_the_old_file_stays(tmp_path, change, message):
    manifest.write(tmp_path / "m.parquet", [WHOLE])
    with pytest.raises(ValueError, match=message):
        manifest.write(tmp_path / "m.parquet", [WHOLE, {**WHOLE, **change}])
    assert manifest.read(tmp_path / "m.parquet") == [WHOLE]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    manifest.write(tmp_path / "m.parquet", [WHOLE])

    def full(file, table):
        raise OSError("No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match=r"m\.parquet: could not be written"):
        manifest.write(tmp_path / "m.parquet", [WHOLE | {"id": "b"}])
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"] and manifest.read(tmp_path / "m.parquet") == [WHOLE]


def test_what_is_no_manifest_is_named(tmp_path):
    (tmp_path / "text.parquet").write_text("id,path\n")
    pq.write_table(pa.table({"id": ["a"], "path": ["a.mp4"]}), tmp_path / "other.parquet")
    for name, message in (("missing", "no such manifest"), ("text", "cannot be read"), ("other", "missing or unknown: caption")):
        with pytest.raises(ValueError, match=rf"{name}\.parquet: .*{message}"):
            manifest.read(tmp_path / f"{name}.parquet")


def test_a_folder_becomes_rows_and_none_vanishes(folder, capsys):
    out = folder.parent / "lists" / "films.parquet"
    assert manifest.main([str(folder), str(out)]) == 0
    said = capsys.readouterr().out
    assert "5 clips, 2 of them dropped" in said and "dropped mute.mp4: no caption" in said
    assert "dropped broken.mp4: unreadable (cannot be opened" in said
    rows = {row["source_id"]: row for row in manifest.read(out)}
    assert list(rows) == ["a.mp4", "broken.mp4", "more/b.mp4", "mute.mp4", "turned.mp4"]
    first = rows["a.mp4"]
    assert (first["path"], first["caption"], first["caption_source"]) == ("../films/a.mp4", "caption of a", "file")
    assert (first["start_s"], first["end_s"], first["frames"], first["fps"], first["source"]) == (0, 1.5, 12, 8, "films")
    assert [(row["width"], row["height"]) for row in rows.values()] == [(48, 32), (None, None), (48, 32), (48, 32), (32, 48)]
    assert rows["mute.mp4"]["dropped"] == "no caption" and rows["mute.mp4"]["frames"] == 12
    assert all(len(row["sha256"]) == 64 for row in rows.values()) and len({row["id"] for row in rows.values()}) == 5
    first_bytes = out.read_bytes()
    assert manifest.main([str(folder), str(out)]) == 0 and out.read_bytes() == first_bytes


def test_captions_of_a_table_and_a_file_that_is_not_there(folder):
    (folder / "captions.csv").write_text("file,caption\na.mp4,\"a ball, red\"\ngone.mp4,gone\n")
    out = folder / "m.parquet"
    assert manifest.main([str(folder), str(out)]) == 0
    first, gone = manifest.read(out)
    assert (first["caption"], first["path"], first["dropped"]) == ("a ball, red", "a.mp4", None)
    assert gone["path"] == "gone.mp4" and "unreadable" in gone["dropped"] and gone["sha256"] is None


def test_training_reads_a_manifest_as_its_folder(folder):
    out = folder.parent / "films.parquet"
    assert manifest.main([str(folder), str(out)]) == 0
    shape = ShapeConfig(frames=12, height=16, width=24, fps=[8.0])  # the whole of a.mp4: every draw of a start gives the same
    listed = FileClips(DataConfig(source="manifest", path=str(out)), 0, [shape])
    walked = FileClips(DataConfig(source="folder", path=str(folder)), 0, [shape])
    assert "no caption" in listed.dropped.values() and len(listed.dropped) == len(walked.dropped) == 3
    assert listed.pool(shape) == walked.pool(shape) and listed.pool(shape).size == 2
    one, other = listed.clip(shape, 0, 0), walked.clip(shape, 0, 0)
    assert torch.equal(one.x, other.x) and (one.caption, one.fps) == (other.caption, other.fps) == ("caption of a", 8.0)


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for place, message in (("nowhere", "is not a folder"), ("empty", "holds no video")):
        assert manifest.main([str(tmp_path / place), str(tmp_path / "m.parquet")]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_a_manifest_tells_how_it_was_made(tmp_path):
    manifest.write(tmp_path / "m.parquet", [WHOLE], {"stages": [["cut", {"fps": 8}, "1"]]})
    assert manifest.about(tmp_path / "m.parquet") == {"stages": [["cut", {"fps": 8}, "1"]]}
    assert manifest.read(tmp_path / "m.parquet") == [WHOLE]
    manifest.write(tmp_path / "m.parquet", [WHOLE])
    assert manifest.about(tmp_path / "m.parquet") == {}
    with pytest.raises(ValueError, match="none.parquet: no such manifest"):
        manifest.about(tmp_path / "none.parquet")
