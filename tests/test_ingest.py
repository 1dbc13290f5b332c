"""Lists of open video sets become manifests: every layout, exact times, files by several habits, bad lines counted."""

import csv
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import ingest, manifest
from latte import video

ID = "a_b-C_d-E_f"  # eleven characters, as YouTube's are


def rows_of(kind, path, out, **options):
    counts = ingest.ingest(kind, path, out / "m.parquet", **options)
    return manifest.read(out / "m.parquet"), counts


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(("text", "value"), [
    ("00:02:33.133", 153.133), ("2:33.133", 153.133), ("33.1", 33.1), (12, 12.0), ("01:00:00,5", 3600.5), ("PT00H00M17S", 17.0),
    ("PT1M2.5S", 62.5), ("10:00:00.001", 36000.001)])
def test_times(text, value):
    assert ingest.seconds(text) == value


def test_times_that_are_none():
    for text in ("", "1:2:x", "PTx", "later"):
        with pytest.raises(ingest.Bad, match="not a time"):
            ingest.seconds(text)


def test_internvid(tmp_path):
    lines = [{"YoutubeID": ID, "Start_timestamp": "00:02:33.133", "End_timestamp": "00:02:37.937", "Caption": "a  dog\nruns ",
              "Aesthetic_Score": 4.7, "UMT_Score": 0.44},
             {"YoutubeID": "-_456789012", "Start_timestamp": "00:00:00.000", "End_timestamp": "00:00:09.500", "Caption": "",
              "Language": "en", "Category": "Music"},
             {"YoutubeID": ID, "Start_timestamp": "00:00:05.000", "End_timestamp": "00:00:04.000", "Caption": "backwards"},
             {"YoutubeID": ID, "End_timestamp": "00:00:04.000", "Caption": "no start"}]
    path = tmp_path / "flt.jsonl"
    path.write_text("\n".join([json.dumps(lines[0]), "{broken", *map(json.dumps, lines[1:]), json.dumps(lines[0]), "", "[1, 2]"]))
    rows, counts = rows_of("internvid", path, tmp_path)
    assert counts == {"clips": 2, "no file": 2, "bad lines": 4, "repeated": 1}
    first, second = rows
    assert (first["video"], first["from_s"], first["to_s"], first["caption"]) == (ID, 153.133, 157.937, "a dog runs")
    assert first["scores"] == {"UMT_Score": 0.44, "Aesthetic_Score": 4.7}
    assert first["tags"] == {"start": "00:02:33.133", "end": "00:02:37.937"}
    assert first["licence"].startswith("CC-BY-NC-SA")
    assert second["tags"]["video_language"] == "en"
    assert second["scores"] == {}
    assert second["caption"] is None
    assert len({row["id"] for row in rows}) == 2


@pytest.mark.parametrize("habit", ["{id}_{start}_{end}", "{id}_{bare_start}_{bare_end}", "{id}_{dash_start}_{dash_end}", "{id}"])
def test_files_are_found_by_several_habits(tmp_path, habit):
    start, end = "00:00:02.500", "00:00:06.000"
    name = habit.format(id=ID, start=start, end=end, bare_start=start.replace(":", ""), bare_end=end.replace(":", ""),
                        dash_start=start.replace(":", "-"), dash_end=end.replace(":", "-"))
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    (tmp_path / "videos" / "deep" / f"{name}.mp4").touch()
    (tmp_path / "videos" / "a_b.mp4").touch()  # begins alike
    (tmp_path / "l.jsonl").write_text(json.dumps({"YoutubeID": ID, "Start_timestamp": start, "End_timestamp": end, "Caption": "c"}))
    (row,), _ = rows_of("internvid", tmp_path / "l.jsonl", tmp_path, files=tmp_path / "videos")
    assert row["path"] == f"videos/deep/{name}.mp4"
    assert (row["start_s"], row["end_s"]) == ((2.5, 6.0) if habit == "{id}" else (0.0, 3.5))
    assert (row["from_s"], row["to_s"], row["dropped"]) == (2.5, 6.0, None)


def test_panda(tmp_path):
    path = write_csv(tmp_path / "p.csv", [
        {"videoID": ID, "url": f"https://youtu.be/{ID}",
         "timestamp": "[['0:00:01.000', '0:00:04.5'], ['0:01:00.25', '0:01:09.75']]",
         "caption": "['one, two', \"it's\"]", "matching_score": "[0.4, 0.5]", "desirable_filtering": "['desirable', 'still']",
         "shot_boundary_detection": "[[[0, 1]], [[0, 1]]]"},
        {"videoID": "x", "url": "u", "timestamp": "[['0:00:01', '0:00:02']]", "caption": "['a', 'b']", "matching_score": "[1]",
         "desirable_filtering": "[1]", "shot_boundary_detection": "[1]"},
        {"videoID": "y", "url": "u", "timestamp": "__import__('os')", "caption": "", "matching_score": "",
         "desirable_filtering": "", "shot_boundary_detection": ""}])
    rows, counts = rows_of("panda", path, tmp_path)
    assert [(row["from_s"], row["to_s"], row["caption"]) for row in rows] == [(1.0, 4.5, "one, two"), (60.25, 69.75, "it's")]
    assert rows[1]["tags"]["desirable"] == "still"
    assert rows[1]["scores"] == {"matching_score": 0.5}
    assert counts["bad lines"] == 2


def test_openvid_koala_webvid(tmp_path):
    (tmp_path / "v").mkdir()
    for name in (f"{ID}_3_30to120.mp4", "celebv_x1.mp4"):
        (tmp_path / "v" / name).touch()
    about = {"caption": "c", "aesthetic score": "5.1", "motion score": "", "temporal consistency score": "0.9",
             "camera motion": "pan_left", "frame": "90", "fps": "30.0", "seconds": "3.0"}
    path = write_csv(tmp_path / "o.csv", [{"video": name} | about for name in (f"{ID}_3_30to120.mp4", "celebv_x1.mp4")])
    rows, _ = rows_of("openvid", path, tmp_path, files=tmp_path / "v")
    assert (rows[0]["video"], rows[0]["from_s"], rows[0]["to_s"], rows[0]["start_s"], rows[0]["end_s"]) == (ID, 1.0, 4.0, 0.0, 3.0)
    assert rows[0]["scores"] == {"aesthetic_score": 5.1, "temporal_consistency_score": 0.9}
    assert (rows[0]["captions"]["camera"], rows[0]["fps"], rows[0]["frames"]) == ("pan_left", 30.0, 90)
    assert (rows[1]["video"], rows[1]["from_s"], rows[1]["path"]) == ("celebv_x1", None, "v/celebv_x1.mp4")
    path = write_csv(tmp_path / "k.csv", [
        {"videoID": f"{ID}_12", "url": "u", "timestamp": "['0:00:10.0', '0:00:22.5']", "caption": "c", "clarity_score": "0.9",
         "aesthetic_score": "4", "motion_score": "2", "video_training_suitability_score": "3.5"}])
    (row,), _ = rows_of("koala", path, tmp_path)
    assert (row["video"], row["source_id"], row["from_s"], row["to_s"]) == (ID, f"{ID}_12", 10.0, 22.5)
    assert row["scores"]["video_training_suitability_score"] == 3.5
    (tmp_path / "v" / "1-10").mkdir()
    (tmp_path / "v" / "1-10" / "77.mp4").touch()
    path = write_csv(tmp_path / "w.csv", [{"videoid": "77", "name": "c", "page_idx": "0", "page_dir": "1-10",
                                           "duration": "PT00H00M17S", "contentUrl": "u"}])
    (row,), _ = rows_of("webvid", path, tmp_path, files=tmp_path / "v")
    assert (row["path"], row["to_s"]) == ("v/1-10/77.mp4", 17.0)


def test_vript_mira_hdvg(tmp_path):
    (tmp_path / "vript").mkdir()
    scene = {"video_id": ID, "clip_id": "1", "video_title": "t", "voiceover": ["hello", "you"],
             "caption": {"shot_type": "close", "camera_movement": "still", "content": "a man", "scene_title": "man"}}
    (tmp_path / "vript" / f"{ID}.json").write_text(json.dumps({"meta": {}, "data": {f"{ID}-Scene-001": scene}}))
    (tmp_path / "vript" / f"{ID}_cut_meta.json").write_text(json.dumps({f"{ID}-Scene-001": {"start": 1.5, "end": "00:00:04"}}))
    (tmp_path / "vript" / "broken.json").write_text("{")
    (row,), counts = rows_of("vript", tmp_path / "vript", tmp_path)
    assert (row["from_s"], row["to_s"], row["captions"]["camera"], row["tags"]["voiceover"]) == (1.5, 4.0, "still", "hello you")
    assert counts["bad lines"] == 1
    words = {f"{name}_caption": name for name in ("main_object", "background", "style", "camera", "short", "dense")}
    frames = {"index": "3", "video_id": ID, "start_frame": "50", "end_frame": "150", "fps": "25"}
    path = write_csv(tmp_path / "m0.csv", [frames | words])
    (row,), _ = rows_of("mira0", path, tmp_path)
    assert (row["from_s"], row["to_s"], row["caption"], row["captions"]["subjects"]) == (2.0, 6.0, "dense", "main_object")
    path = write_csv(tmp_path / "m1.csv", [{"clip_id": "9", "source": "youtube", "video_url": "u", "video_id": ID, "width": "1280",
                                            "height": "720", "fps": "30", "seconds": "3", "timestamp": "['0:00:02', '0:00:05']",
                                            "frame_number": "90", "framestamp": "[0, 90]", "file_path": "a/b.mp4"} | words])
    (row,), _ = rows_of("mira1", path, tmp_path)
    assert (row["from_s"], row["to_s"], row["width"], row["frames"]) == (2.0, 5.0, 1280, 90)
    scenes = [{"clip_id": f"{ID}.0_0", "scene_cut": [0, 100], "caption": "x"},
              {"clip_id": f"{ID}.0_1", "scene_cut": [100, -1], "caption": "y"}]
    clip = {"span": ["00:00:10.000", "00:00:20.000"], "fps": 25, "scene_split": scenes}
    (tmp_path / "h.json").write_text(json.dumps({ID: {"clip": {f"{ID}.0.mp4": clip}}}))
    rows, _ = rows_of("hdvg", tmp_path / "h.json", tmp_path)
    assert [(row["from_s"], row["to_s"]) for row in rows] == [(10.0, 14.0), (14.0, 20.0)]


def test_video2dataset_and_tables(tmp_path):
    table = {"url": [f"https://www.youtube.com/watch?v={ID}"], "caption": ["c"], "clips": [[[1.0, 2.5], [3.0, 4.0]]]}
    pq.write_table(pa.table(table), tmp_path / "v.parquet")
    rows, _ = rows_of("video2dataset", tmp_path / "v.parquet", tmp_path)
    assert [(row["video"], row["from_s"], row["to_s"]) for row in rows] == [(ID, 1.0, 2.5), (ID, 3.0, 4.0)]
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").touch()
    path = write_csv(tmp_path / "t.csv", [{"file": "a.mp4", "text": "c", "score": "0.5", "start": "", "end": ""},
                                          {"file": "", "text": "c", "score": "0.5", "start": "", "end": ""}])
    (row,), counts = rows_of("table", path, tmp_path, files=tmp_path / "v")
    assert (row["path"], row["caption"], row["scores"], row["start_s"]) == ("v/a.mp4", "c", {"score": 0.5}, None)
    assert counts["bad lines"] == 1


def test_bad_words_are_refused(tmp_path, capsys):
    assert ingest.main(["intervid", "x", str(tmp_path / "m.parquet")]) == 1
    assert "intervid: no such kind of list; there are internvid" in capsys.readouterr().err
    assert ingest.main(["internvid", str(tmp_path / "x.jsonl"), str(tmp_path / "m.parquet")]) == 1
    assert "no such list" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def clip_bytes(tmp_path, seed=0):
    """The bytes of a small video."""
    picture = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    video.write(tmp_path / "made.mp4", np.stack([picture] * 4), 8)
    data = (tmp_path / "made.mp4").read_bytes()
    (tmp_path / "made.mp4").unlink()
    return data


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


def test_webdataset_shards_are_read_and_unpacked_once(tmp_path, capsys):
    place = tmp_path / "shards"
    place.mkdir()
    data = clip_bytes(tmp_path)
    about = {"url": f"https://www.youtube.com/watch?v={ID}", "clips": [["00:00:01.000", "00:00:01.500"]], "aesthetic": 5.5,
             "width": 640, "caption": "from json", "license": "CC-BY-4.0"}
    write_tar(place / "00000.tar", {
        "00000_00001.mp4": data, "00000_00001.txt": b"a  dog", "00000_00002.json": json.dumps(about).encode(),
        "00000_00002.MP4": data, "../../etc/evil.mp4": data, "words.txt": b"no video", "a/x_1.5_2.5.mp4": data})
    write_tar(place / "00001.tar", {"00001_00001.mp4": data, "broken.json": b"{", "broken.mp4": data})
    whole = (place / "00001.tar").read_bytes()
    (place / "00002.tar").write_bytes(whole[:len(data) // 2])
    rows, counts = rows_of("webdataset", place, tmp_path / "out")
    assert counts == {"clips": 5, "usable": 2, "no caption": 3, "bad lines": 3}
    assert "words: no video" in (told := capsys.readouterr().err) and "00002.tar" in told
    by_name = {row["source_id"]: row for row in rows}
    plain, spanned = by_name["00000_00001"], by_name["00000_00002"]
    assert (plain["caption"], plain["video"], plain["start_s"]) == ("a dog", "00000/00000_00001", 0.0)
    assert (spanned["video"], spanned["from_s"], spanned["to_s"], spanned["end_s"]) == (ID, 1.0, 1.5, 0.5)
    assert (spanned["scores"], spanned["width"], spanned["licence"]) == ({"aesthetic": 5.5}, 640, "CC-BY-4.0")
    assert "a/x_1.5_2.5" in by_name
    files = sorted((tmp_path / "out" / "sources").iterdir())
    assert [file.name for file in files] == sorted(f"{row['id']}.mp4" for row in rows)  # whatever the names in the tar
    assert all(file.read_bytes() == data for file in files)
    stamps = [file.stat().st_mtime_ns for file in files]
    files[0].write_bytes(data[:-1])  # as if cut off
    assert rows_of("webdataset", place, tmp_path / "out")[0] == rows
    assert files[0].read_bytes() == data
    assert [file.stat().st_mtime_ns for file in files][1:] == stamps[1:]


def test_data_sets_of_a_hub(tmp_path):
    data, other = clip_bytes(tmp_path), clip_bytes(tmp_path, 1)
    cells = pa.array([{"bytes": data, "path": "a.mp4"}, {"bytes": None, "path": "b.mp4"}, None],
                     pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns = pa.table({"video": cells, "text": ["one", "two", "three"], "likes": [1, 2, 3]})
    for split in ("train", "test"):  # as Dataset.save_to_disk leaves it
        place = tmp_path / "disk" / split
        place.mkdir(parents=True)
        part = columns if split == "train" else columns.slice(0, 1).set_column(1, "text", pa.array(["four"])).set_column(
            0, "video", pa.array([{"bytes": other, "path": None}], cells.type))
        with pa.OSFile(str(place / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, part.schema) as writer:
            writer.write_table(part)
        (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (place / "dataset_info.json").write_text("{}")
    (tmp_path / "disk" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    (tmp_path / "disk" / "train" / "b.mp4").write_bytes(other)
    rows, counts = rows_of("huggingface", tmp_path / "disk", tmp_path / "out")
    assert [(row["caption"], row["scores"]["likes"]) for row in rows] == [("one", 1), ("two", 2), ("four", 1)]
    assert counts["bad lines"] == 1
    assert [(tmp_path / "out" / row["path"]).read_bytes() for row in rows] == [data, other, other]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    columns = columns.set_column(0, "video", pa.array([{"bytes": data, "path": "a.mp4"}] * 2 + [{"bytes": other, "path": "a.mp4"}]))
    pq.write_table(columns, tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    rows, counts = rows_of("huggingface", tmp_path / "hub", tmp_path / "out")
    assert [(tmp_path / "out" / row["path"]).read_bytes() for row in rows] == [data, other] and counts["repeated"] == 1
    (tmp_path / "plain" / "train").mkdir(parents=True)
    (tmp_path / "plain" / "train" / "b.mp4").write_bytes(other)
    line = {"file_name": "b.mp4", "text": "five", "start": 0.25, "end": 0.5}
    (tmp_path / "plain" / "train" / "metadata.jsonl").write_text(json.dumps(line))
    (tmp_path / "plain" / "more.csv").write_text("file_name,text\ntrain/b.mp4,six\n")
    (tmp_path / "plain" / "broken.parquet").write_bytes(b"PAR1")
    rows, counts = rows_of("huggingface", tmp_path / "plain", tmp_path / "out")
    assert {row["caption"] for row in rows} == {"five", "six"} and counts["bad lines"] == 1
    assert {row["path"] for row in rows} == {"../plain/train/b.mp4"}
    assert {(row["caption"], row["start_s"], row["end_s"]) for row in rows} == {("five", 0.25, 0.5), ("six", None, None)}
    (tmp_path / "l.json").write_text(json.dumps([{"video": "train/b.mp4", "caption": "seven"}]))
    (row,), _ = rows_of("table", tmp_path / "l.json", tmp_path, files=tmp_path / "plain")
    assert row["path"] == "plain/train/b.mp4"


def test_a_folder_agrees_with_the_manifest_of_a_folder(tmp_path):
    place = tmp_path / "films"
    (place / "more").mkdir(parents=True)
    for number, name in enumerate(("a", "more/b", "more/c", "mute")):
        (place / f"{name}.mp4").write_bytes(clip_bytes(tmp_path, number))
    (place / "a.txt").write_text("a  ball\n")
    (place / "more" / "b.json").write_text(json.dumps({"caption": "a box", "beauty": 3, "licence": "CC0"}))
    (place / "more" / "c.mp4").write_bytes(b"no video")
    (place / "more" / "c.txt").write_text("nothing")
    rows, counts = rows_of("folder", place, tmp_path)
    manifest.main([str(place), str(tmp_path / "n.parquet")])
    theirs = {row["source_id"]: row for row in manifest.read(tmp_path / "n.parquet")}
    assert [row["source_id"] for row in rows] == ["a.mp4", "more/b.mp4", "more/c.mp4", "mute.mp4"]
    for row in rows:
        for key in ("id", "path", "sha256", "start_s", "end_s", "width", "height", "fps", "frames", "source"):
            assert row[key] == theirs[row["source_id"]][key], key
    assert counts == {"clips": 4, "usable": 2, "unreadable": 1, "no caption": 1}
    assert (rows[0]["caption"], rows[1]["caption"]) == ("a ball", "a box")
    assert (rows[1]["scores"], rows[1]["licence"]) == ({"beauty": 3}, "CC0")
    (place / "metadata.csv").write_text("file_name,text\na.mp4,from the table\nmore/gone.mp4,gone\n")
    (place / "copy.mp4").write_bytes((place / "a.mp4").read_bytes())
    listed = ingest.List("folder", str(place), captioned=False, source="own", licence="CC0")
    rows = list(ingest.listed(ingest.Settings([listed]), tmp_path))
    assert {row["source_id"]: row["caption"] for row in rows}["a.mp4"] == "from the table"
    assert {row["source_id"]: (row["dropped"] or "").partition(" (")[0] for row in rows} == {
        "a.mp4": "", "copy.mp4": "", "more/b.mp4": "", "mute.mp4": "", "more/c.mp4": "unreadable", "more/gone.mp4": "no file"}
    assert len({row["id"] for row in rows}) == len(rows) == 6
    assert {row["source"] for row in rows} == {"own"}


def test_several_lists_make_one_manifest(tmp_path):
    line = {"YoutubeID": ID, "Start_timestamp": "00:00:01.000", "End_timestamp": "00:00:04.000", "Caption": "c"}
    for name, lines in (("flt", [line, line | {"YoutubeID": "-" * 11}]), ("aes", [line | {"Aesthetic_Score": 5.0}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lists = [ingest.List("internvid", str(tmp_path / f"{name}.jsonl")) for name in ("flt", "aes")]
    settings = ingest.Settings([*lists, replace(lists[0], limit=1, source="again")])
    counts = Counter()
    rows = list(ingest.listed(settings, tmp_path, counts))
    assert len(rows) == 2 and counts["repeated"] == 2
    assert ingest.inputs(settings)[0][0].endswith("flt.jsonl")
    with pytest.raises(ValueError, match="gone.jsonl: no such list"):
        list(ingest.listed(ingest.Settings([ingest.List("panda", str(tmp_path / "gone.jsonl"))]), tmp_path))
    with pytest.raises(ValueError, match="^lists: name at least one"):
        ingest.Settings()
    for wrong, name in ((dict(kind="x"), "kind: x"), (dict(limit=-1), "limit: -1")):
        with pytest.raises(ValueError, match=name):
            ingest.List(**{"kind": "panda", "list": "l"} | wrong)


ODD = (None, "", 5, -1, 1e300, float("nan"), float("inf"), True, [], {}, ["x"], {"a": 1}, "\x00", "x" * 10_000, "[" * 5000,
       "99:99:99:99", "nan", "1e999", "-5", "\ud800")


@pytest.mark.parametrize("kind", ["internvid", "table", "hdvg", "vript", "koala", "panda"])
def test_no_odd_value_stops_a_list(tmp_path, kind):
    scene = {"clip_id": "0", "scene_cut": [0, 100], "caption": "x"}
    good = {"internvid": {"YoutubeID": ID, "Start_timestamp": "00:00:01.000", "End_timestamp": "00:00:02.000", "Caption": "c",
                          "UMT_Score": 0.5, "Language": "en"},
            "table": {"file": "a.mp4", "caption": "c", "start": 1, "end": 2, "url": "u", "id": "i", "width": 64, "num_frames": 9,
                      "clips": [[1, 2]], "licence": "CC0", "score": 1},
            "hdvg": {"span": ["0", "9"], "fps": 25, "scene_split": [scene]},
            "vript": {"video_id": ID, "caption": {"content": "c"}, "voiceover": ["a"], "video_title": "t"},
            "koala": {"videoID": f"{ID}_1", "timestamp": "['0:00:10.0', '0:00:22.5']", "caption": "c", "motion_score": "1"},
            "panda": {"videoID": ID, "url": "u", "timestamp": "[['0:01', '0:02']]", "caption": "['c']"}}[kind]
    entries = [good, *(good | {key: odd} for key in good for odd in ODD), *ODD]
    path = tmp_path / f"list.{'csv' if kind in ('koala', 'panda') else 'json'}"
    if kind in ("koala", "panda"):
        write_csv(path, [entry for entry in entries if isinstance(entry, dict) and entry.keys() == good.keys()
                         and "\ud800" not in entry.values()])
        path.write_bytes(path.read_bytes() + b"\xff\xfe,\x00\n\"never closed")
    elif kind == "hdvg":
        path.write_text(json.dumps({str(i): {"clip": {"c": entry}} for i, entry in enumerate(entries)}))
    elif kind == "vript":
        path = tmp_path / "lists"
        path.mkdir()
        for i, entry in enumerate(entries):
            (path / f"{i}.json").write_text(json.dumps({"data": {f"{i}-Scene-001": entry}}))
    else:
        path.write_text("\n".join(map(json.dumps, entries)))
    rows, counts = rows_of(kind, path, tmp_path / "out")
    assert len(rows) == counts["clips"] >= 1 and counts["bad lines"] >= 5


def test_odd_json_in_a_tar(tmp_path):
    members = {}
    ours = {"id": "a" * 64, "sha256": "b", "start_s": 0.0, "end_s": 1.0, "caption": "c"}
    for i, entry in enumerate([*ODD, *({key: odd} for key in ("caption", "url", "clips", "start", "id", "width") for odd in ODD),
                               *(ours | {key: odd} for key in ("id", "end_s", "caption", "path") for odd in ODD)]):
        members |= {f"{i}.json": json.dumps(entry).encode(), f"{i}.mp4": b"pixels", f"{i}.txt": b"c"}
    members["x.json"] = json.dumps(ours | {"id": "../../x", "dropped": "not ours to say"}).encode()
    write_tar(tmp_path / "t.tar", members | {"x.mp4": b"pixels"})
    rows, counts = rows_of("webdataset", tmp_path / "t.tar", tmp_path / "out")
    assert len(rows) == counts["clips"] > 20 and counts["bad lines"] > 20
    assert {path.parent for path in (tmp_path / "out").rglob("*.mp4")} == {tmp_path / "out" / "sources"}
    assert all(row["dropped"] in (None, "no caption") for row in rows)
