"""Sets on their way out: twins are found, licences are kept, shards come out the same every time, each fault in them is named."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest

from data_tools import dedupe, ingest, licence, manifest, score, shard, verify
from data_tools import film as films
from data_tools.manifest import Job
from latte import keyed, video
from latte.config import WorldConfig
from latte.world.render import render
from latte.world.scene import sample_scene


def clip_of(number, frames=8):
    """Frames [f 32 32 3] of moving noise of its own."""
    picture = keyed.rng(7, "clip", number).integers(0, 256, (8, 8, 3)).repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(picture, i, axis=1) for i in range(frames)]).astype(np.uint8)


def row_of(out, number, frames=8, **more):
    """The row of a clip that the stage cut would leave, with its file."""
    key = hashlib.sha256(f"clip {number}".encode()).hexdigest()
    path = out / "clips" / f"{key}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write(path, clip_of(number, frames), 8)
    return {"id": key, "source": "film", "licence": "CC-BY-4.0", "video": f"v-_{number}", "from_s": 1.0, "to_s": 1 + frames / 8,
            "path": f"clips/{key}.mp4", "start_s": 0.0, "end_s": frames / 8, "width": 32, "height": 32, "fps": 8.0,
            "frames": frames, "picked": [1 + i / 8 for i in range(frames)], "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "caption": f"clip “{number}”", "caption_source": "film", "scores": {"motion": 0.5}, "tags": {"language": "en"},
            "origin": {"path": "film.mp4", "sha256": "0" * 64, "start_s": 1.0, "end_s": 2.0},
            "edits": [{"step": "bars", "settings": '{"top": 2}', "confidence": 0.9, "version": "1"}]} | more


def published(out, rows, clips=3, **settings):
    """Shards and publishes rows as a run does; gives the rows of the manifest."""
    manifest.write(out / "in.parquet", rows)
    live = [row for row in manifest.read(out / "in.parquet") if not row["dropped"]]
    made = shard.work(live, Job(out, shard.Settings(clips=clips, **settings)))
    dropped = [row for row in manifest.read(out / "in.parquet") if row["dropped"]]
    manifest.write(out / "manifest.parquet", made + dropped,
                   {"stages": [["shard", {"clips": clips, "name": "small | set"}, "1"]], "versions": {"av": "18"}})
    shard.publish(out)
    return manifest.read(out / "manifest.parquet")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    rows = [row_of(out, number) for number in range(7)]
    rows.append({"id": "whole", "path": None, "dropped": "cut: into 7 clips", "start_s": 0.0, "end_s": 60.0})
    return out, published(out, rows)


@pytest.fixture
def a_set(made, tmp_path):
    """A copy of the set that may be harmed."""
    shutil.copytree(made[0], tmp_path / "set")
    return tmp_path / "set"


# Twins

def hashed(number, length=4.0, noise=0, mirrored=False, **more):
    """A row whose four hashes differ in `noise` bits each from those of the clip of that number."""
    hashes = keyed.rng(3, "hash", number).integers(0, 2**64, 4, dtype=np.uint64)
    draw = keyed.rng(4, "noise", number, noise)
    for i in range(4):
        for bit in draw.choice(64, noise, replace=False):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    hashes ^= dedupe.MIRROR if mirrored else np.uint64(0)
    name = f"{number}-{noise}-{mirrored}-{length}"
    return {"id": name, "path": f"{name}.mp4", "start_s": 0.0, "end_s": length,
            "tags": {"phash": ",".join(f"{int(word):016x}" for word in hashes)}} | more


def without_twins(rows, **settings):
    job = Job(None, dedupe.Settings(**settings))
    done = {row["id"]: row["dropped"] for row in dedupe.work(rows, job)}
    assert {row["id"]: row["dropped"] for row in dedupe.work(rows[::-1], job)} == done  # whatever the order
    return done


def test_near_duplicates_keep_the_best():
    rows = [hashed(1, 4.0), hashed(1, 6.0, noise=2), hashed(1, 5.0, noise=3, mirrored=True)]
    rows += [hashed(2), hashed(3, noise=20), hashed(3)]
    best = rows[1]["id"]
    done, twin = without_twins(rows), f"near-duplicate (of {best})"
    assert [done[row["id"]] for row in rows] == [twin, None, twin, None, None, None]
    clusters = [row["tags"].get("cluster") for row in dedupe.work(rows, Job(None, dedupe.Settings()))]
    assert clusters == [best] * 3 + [None] * 3
    rows[0]["scores"] = {"sharpness": 0.9}
    rows[2]["scores"] = {"sharpness": 0.1}
    assert without_twins(rows, keep="sharpness")[rows[0]["id"]] is None
    assert set(without_twins(rows, bits=-1).values()) == {None}
    windows = [hashed(1, noise=noise, source="film", video="one") for noise in range(3)]
    assert sum(why is None for why in without_twins(windows).values()) == 1
    assert set(without_twins(windows, same_video=False).values()) == {None}
    copy = hashed(1, 9.0, source="film", video="two")
    assert set(without_twins([*windows, copy], same_video=False).values()) == {None, f"near-duplicate (of {copy['id']})"}
    unhashed = [hashed(number, tags=tags) for number, tags in enumerate(({"phash": "zz,1,2,3"}, None, {"phash": "1"}))]
    assert set(without_twins([hashed(7), *unhashed]).values()) == {None}
    assert set(without_twins(unhashed).values()) == {None}


def looks_of(path):
    """A clip's hashes as data_tools.score makes them."""
    pictures = [picture.y for picture in films.read(path)]
    return ",".join(f"{score.hash_of(pictures[int(share * len(pictures))]):016x}" for share in score.LOOKS)


def test_planted_copies_are_found(tmp_path):
    rows = []
    for number in range(6):
        scene = sample_scene(keyed.rng(9, "scene", number), WorldConfig(), "train", 4.0, 1.5)
        frames = render(scene, 96, 144, np.arange(32) / 8)
        made = {"": frames, "small": frames[:, ::2, ::2], "dark": frames // 3 * 2, "mirrored": frames[:, :, ::-1],
                "cropped": frames[:, 2:-2, 2:-2]}
        for kind, pictures in made.items():
            video.write(tmp_path / f"{number}{kind}.mp4", pictures, 8)
        films.write(tmp_path / f"{number}coarse.mp4", films.read(tmp_path / f"{number}.mp4"), crf=38)
        rows += [{"id": f"{number}{kind}", "path": f"{number}{kind}.mp4", "start_s": 0.0, "end_s": 4.0 + (not kind),
                  "tags": {"phash": looks_of(tmp_path / f"{number}{kind}.mp4")}} for kind in (*made, "coarse")]
    done = without_twins(rows)
    assert done == {row["id"]: f"near-duplicate (of {row['id'][0]})" if row["id"][1:] else None for row in rows}


def test_equal_files_and_spans():
    tube = dict(video="a_b-C_d-E_f", from_s=1.0, to_s=5.0)
    rows = [hashed(1, sha256="a"), hashed(2, length=3.0), hashed(3, sha256="a"), hashed(4, sha256="a", start_s=1.0),
            hashed(5, source="internvid", **tube), hashed(6, source="panda", **tube)]
    rows += [hashed(7, source="x", **tube | {"video": "77"}), hashed(8, source="y", **tube | {"video": "77"}),
             hashed(9, source="x", **tube | {"video": "77", "to_s": 4.5})]
    rows.append(hashed(10, path=rows[1]["path"], length=3.0))
    done = without_twins(rows)
    assert {key.partition("-")[0]: why for key, why in done.items() if why} == {
        "3": "duplicate (of 1-0-False-4.0)", "6": "duplicate (of 5-0-False-4.0)", "2": "duplicate (of 10-0-False-3.0)"}


def test_many_rows_and_a_crowd_of_equal_ones():
    rows = [hashed(number) for number in range(2000)] + [hashed(number, noise=5) for number in range(200)]
    black = {"phash": ",".join(["0" * 16] * 4)}
    rows += [{"id": f"black {number}", "path": f"{number}.mp4", "tags": black} for number in range(500)]
    done = without_twins(rows)
    assert sum(bool(done[hashed(number, noise=5)["id"]]) or bool(done[hashed(number)["id"]]) for number in range(200)) >= 198
    assert not any(done[hashed(number)["id"]] for number in range(200, 2000))
    assert sum(why is None for key, why in done.items() if key.startswith("black")) == 1
    assert without_twins([rows[0], rows[-1]], least_change=3)[rows[-1]["id"]] == "unchanging (0 bits)"


def test_settings_out_of_range():
    for wrong in (dict(bits=17), dict(alike=1), dict(least_change=-1)):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: "):
            dedupe.Settings(**wrong)
    with pytest.raises(ValueError, match="^clips: 0"):
        shard.Settings(clips=0)


def test_dedupe_as_a_command(tmp_path, capsys):
    manifest.write(tmp_path / "a" / "m.parquet", [hashed(1), hashed(1, noise=1), hashed(2) | {"dropped": "no caption"}])
    assert dedupe.main([str(tmp_path / "a" / "m.parquet"), str(tmp_path / "b" / "n.parquet"), "--bits", "4"]) == 0
    rows = manifest.read(tmp_path / "b" / "n.parquet")
    assert [bool(row["dropped"]) for row in rows] == [False, True, True] and rows[0]["path"].startswith("../a/")
    assert "2 clips, 1 of them there twice" in capsys.readouterr().out
    assert dedupe.main([str(tmp_path / "x.parquet"), str(tmp_path / "n.parquet")]) == 1


# Licences

def test_terms_of_licences():
    assert licence.terms("cc by-sa 3.0").alike == "CC-BY-SA"
    assert licence.terms("CC-BY-NC-SA-4.0").commercial is False and licence.terms("CC-BY-NC-SA-4.0").pass_on
    assert licence.terms("CC-BY-NC-SA-4.0 (annotations)").pass_on is False
    assert licence.terms("CC0-1.0") == licence.terms("cc0") and not licence.terms("CC0").credit
    assert licence.terms(None) == licence.terms("who knows") == licence.UNKNOWN
    assert all(licence.terms(name) is not licence.UNKNOWN for name in licence.OF_LISTS.values())


def test_what_may_not_be_passed_on_is_refused():
    clips = {("film", "CC-BY-4.0"): 3, ("internvid", licence.OF_LISTS["internvid"]): 2, ("own", ""): 1}
    with pytest.raises(ValueError, match=r"internvid \(CC-BY-NC-SA-4.0 \(annotations\): the list alone.*2 clips\); own .*1 clip\).*"
                                         r"shard.allow: \[internvid, own\]"):
        licence.check(clips, key="shard.allow")
    licence.check(clips, ["internvid", "own"])
    with pytest.raises(ValueError, match=r"allow: \[own\]"):
        licence.check(clips, [licence.OF_LISTS["internvid"]])  # by the licence's name


@pytest.mark.parametrize(("licences", "fits"), [
    (["CC-BY-SA-4.0", "CC-BY-NC-4.0"], False), (["CC-BY-SA-4.0", "CC-BY-NC-SA-4.0"], False), (["CC-BY-SA-3.0", "CC-BY-4.0"], True),
    (["CC-BY-NC-SA-4.0", "CC-BY-NC-4.0", "CC0"], True), (["MIT", "CC-BY-NC-4.0"], True), (["CC-BY-SA-4.0", "CC BY-SA 3.0"], True)])
def test_what_may_not_be_mixed_is_refused(licences, fits):
    clips = {(f"source {i}", name): 1 for i, name in enumerate(licences)}
    if fits:
        return licence.check(clips)
    with pytest.raises(ValueError, match=r"cannot be kept together.*source 0.*source 1.*allow: \[source 0, source 1\]"):
        licence.check(clips)
    return licence.check(clips, ["source 1"])


def test_shards_ask_for_licences(tmp_path, capsys):
    rows = [row_of(tmp_path, 0), row_of(tmp_path, 1, source="internvid", licence=licence.OF_LISTS["internvid"])]
    manifest.write(tmp_path / "m.parquet", rows)
    command = [str(tmp_path / "m.parquet"), "--out", str(tmp_path / "out")]
    assert shard.main(command) == 1
    assert "internvid" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert shard.main([*command, "--allow", "internvid"]) == 0
    assert verify.main([str(tmp_path / "out")]) == 0
    assert "| internvid | CC-BY-NC-SA-4.0 (annotations) | 1 | no | no |" in (tmp_path / "out" / "CARD.md").read_text()
    with pytest.raises(ValueError, match=r"shard.allow: \[internvid\]"):  # before a run works for hours
        shard.ask(tmp_path / "m.parquet", shard.Settings())
    shard.ask(tmp_path / "m.parquet", shard.Settings(allow=("internvid",)))
    assert licence.main([str(tmp_path / "m.parquet")]) == 1
    assert licence.main([str(tmp_path / "m.parquet"), "--allow", "internvid"]) == 0


# Shards

def test_shards_hold_every_clip_and_nothing_of_this_machine(made):
    out, rows = made
    assert sorted(path.name for path in (out / "shards").iterdir()) == [
        "index.json", *(f"shard-{i:06d}.tar" for i in range(3))]
    by_shard = {}
    for row in rows[:-1]:
        by_shard.setdefault(row["shard"].split("/")[1], []).append(row)
    for name, members in by_shard.items():
        with tarfile.open(out / "shards" / name) as tar:
            assert {(about.mtime, about.uid, about.gid, about.uname, about.mode) for about in tar} == {(0, 0, 0, "", 0o644)}
            assert tar.getnames() == [f"{row['id']}.{suffix}" for row in sorted(members, key=lambda row: row["id"])
                                      for suffix in ("json", "mp4", "txt")]
            for row in members:
                assert tar.extractfile(f"{row['id']}.mp4").read() == (out / row["path"]).read_bytes()
                assert tar.extractfile(f"{row['id']}.txt").read().decode() == row["caption"]
                told = json.loads(tar.extractfile(f"{row['id']}.json").read())
                assert told == {key: value for key, value in row.items() if value is not None and key not in ("path", "shard")}
    assert rows[-1]["dropped"] == "cut: into 7 clips"
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True).returncode == 0
    card = (out / "CARD.md").read_text()
    for part in ("# small | set", "Clips: 7, together 0.00 hours. Shards: 3,", "| film | CC-BY-4.0 | 7 | yes | yes |",
                 "| cut | 1 | 0.017 |", "| 32x32, 8 frames at 8 fps | 7 |", "have a caption, 100% were repaired.", "With av 18."):
        assert part in card, part


def test_the_same_rows_give_the_same_bytes_however_often_it_was_stopped(made, tmp_path, monkeypatch):
    out, rows = made
    again = tmp_path / "again"
    shutil.copytree(out / "clips", again / "clips")
    live = manifest.read(out / "in.parquet")[:-1]
    job = Job(again, shard.Settings(clips=3))
    pack, packed = shard._pack, []

    def stopped(path, *rest):
        packed.append(path.name)
        if packed == ["shard-000000.tar", "shard-000001.tar"]:
            raise KeyboardInterrupt
        return pack(path, *rest)

    monkeypatch.setattr(shard, "_pack", stopped)
    with pytest.raises(KeyboardInterrupt):
        shard.work(live[::-1], job)
    done = shard.work(live[::-1], job)
    assert packed[2:] == ["shard-000001.tar", "shard-000002.tar"]  # the first was not made again
    assert done == rows[:-1][::-1]
    for path in (out / "shards").iterdir():
        assert (again / "shards" / path.name).read_bytes() == path.read_bytes()
    (again / "shards" / "shard-000002.tar").write_bytes(b"cut off")
    shard.work(live, job)
    assert packed[4:] == ["shard-000002.tar"]
    shard.work(live[:2], job)  # a smaller set leaves no shard of the larger one
    assert [path.name for path in (again / "shards").glob("*.tar")] == ["shard-000000.tar"]


def test_clips_that_cannot_be_packed_are_dropped(tmp_path):
    rows = [row_of(tmp_path, number) for number in range(4)]
    (tmp_path / rows[0]["path"]).unlink()
    (tmp_path / rows[1]["path"]).write_bytes(b"other bytes")
    rows[2] |= {"frames": 80, "start_s": 0.5}
    rows[3]["sha256"] = None
    done = published(tmp_path, rows)
    assert [row["dropped"] for row in done] == ["its file is gone", "its file is not the one that was made",
                                                "a span of a longer file, which the stage cut has not cut", None]
    assert done[3]["sha256"] and [row["shard"] for row in done[:3]] == [None] * 3
    assert list(verify.verify(tmp_path)) == []


def test_ingest_reads_our_shards_back(made, tmp_path):
    out, rows = made
    ingest.ingest("webdataset", out / "shards", tmp_path / "m.parquet")
    back = {row["id"]: row for row in manifest.read(tmp_path / "m.parquet")}
    assert len(back) == 7
    for row in rows[:-1]:
        found = back[row["id"]]
        assert (tmp_path / found["path"]).read_bytes() == (out / row["path"]).read_bytes()
        assert {key for key in row if found[key] != row[key]} <= {"path", "shard"}


# What verify finds

def kinds(out):
    return {(problem.kind, problem.place.removeprefix("shards/")) for problem in verify.verify(out)}


def rewritten(out, name, change):
    """Writes a shard's members anew after `change` had them, [(name, bytes)], and the sums as if that were right."""
    path = out / "shards" / name
    with tarfile.open(path) as tar:
        members = [(about.name, tar.extractfile(about).read()) for about in tar]
    with tarfile.open(path, "w") as tar:
        for member, data in change(members):
            about = tarfile.TarInfo(member)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    sums = [line for line in (out / "SHA256SUMS").read_text().splitlines() if name not in line]
    (out / "SHA256SUMS").write_text("\n".join([*sums, f"{manifest.sha256_of(path)}  shards/{name}"]) + "\n")


def test_a_whole_set_is_right(a_set, capsys):
    assert verify.main([str(a_set)]) == 0
    assert "all is as it was made" in capsys.readouterr().out
    assert verify.main([str(a_set / "gone")]) == 1
    assert "no such manifest" in capsys.readouterr().err


def test_faults_of_files(a_set, tmp_path, capsys):
    first, second, third = sorted((a_set / "shards").glob("*.tar"))
    first.unlink()
    data = bytearray(second.read_bytes())
    data[5000] ^= 1
    second.write_bytes(data)
    third.write_bytes(third.read_bytes()[:1000])
    (a_set / "shards" / "shard-000009.tar").write_bytes(b"")
    (a_set / "CARD.md").write_text("another")
    assert verify.main([str(a_set), "--report", str(tmp_path / "r.json")]) == 1
    found = {(problem["kind"], problem["place"].removeprefix("shards/")) for problem in
             json.loads((tmp_path / "r.json").read_text())["problems"]}
    assert {("missing", first.name), ("altered", second.name), ("altered", third.name), ("cut off", third.name),
            ("unknown", "shard-000009.tar"), ("altered", "CARD.md")} <= found
    assert f"missing: shards/{first.name}: SHA256SUMS names it" in capsys.readouterr().out
    (a_set / "SHA256SUMS").unlink()
    assert ("missing", "SHA256SUMS") in kinds(a_set)


def test_faults_of_clips(a_set):
    name = "shard-000000.tar"
    with tarfile.open(a_set / "shards" / name) as tar:
        one, two, three = sorted({member.partition(".")[0] for member in tar.getnames()})

    def change(members):
        held = dict(members)
        video.write(a_set / "long.mp4", clip_of(99, 9), 8)
        told = json.loads(held[f"{two}.json"]) | {"caption": "another"}
        return [(f"{one}.mp4", (a_set / "long.mp4").read_bytes()), (f"{one}.json", held[f"{one}.json"]), (f"{one}.txt", b""),
                (f"{two}.mp4", held[f"{two}.mp4"][:-200]), (f"{two}.json", json.dumps(told).encode()), (f"{two}.txt", b""),
                (f"{three}.json", held[f"{three}.json"]), (f"{three}.json", held[f"{three}.json"]), (f"{three}.txt", b""),
                ("stranger.mp4", b"x"), (f"{three}.png", b"x")]

    rewritten(a_set, name, change)
    found = kinds(a_set)
    assert {("altered", f"{name}/{one}.mp4"), ("frames", f"{name}/{one}.mp4"), ("altered", f"{name}/{two}.mp4"),
            ("altered", f"{name}/{two}.json"), ("missing", f"{name}/{three}.mp4"), ("doubled", f"{name}/{three}.json"),
            ("unknown", f"{name}/stranger.mp4"), ("unknown", f"{name}/{three}.png")} <= found
    assert not any(place.startswith("shard-000001") for _, place in found)


def test_faults_of_rows(made, tmp_path):
    out, rows = made
    shutil.copytree(out, tmp_path / "set")
    ids = [row["id"] for row in rows]
    changed = [rows[0] | {"end_s": -1.0}, rows[1] | {"frames": 9}, rows[2] | {"picked": [2.0, 1.0] * 4},
               rows[3] | {"dropped": "blurred"}, rows[4], rows[4], rows[5] | {"shard": "shards/shard-000077.tar/x.mp4"},
               rows[6] | {"shard": None, "path": "clips/gone.mp4"}]
    manifest.write(tmp_path / "set" / "manifest.parquet", changed)
    found = kinds(tmp_path / "set")
    assert {("altered", "manifest.parquet"), ("span", ids[0]), ("span", ids[1]), ("frames", ids[1]), ("span", ids[2]),
            ("row", ids[3]), ("doubled", ids[4]), ("missing", "shard-000077.tar"), ("missing", "clips/gone.mp4")} <= found
    assert any(kind == "unknown" and ids[3] in place for kind, place in found)


def test_a_set_without_shards(tmp_path):
    rows = [row_of(tmp_path, number) for number in range(3)]
    manifest.write(tmp_path / "manifest.parquet", rows)
    assert kinds(tmp_path) == set()
    (tmp_path / rows[0]["path"]).write_bytes((tmp_path / rows[1]["path"]).read_bytes())
    video.write(tmp_path / rows[2]["path"], clip_of(3, 4), 8)
    assert kinds(tmp_path) == {("altered", rows[0]["path"]), ("altered", rows[2]["path"]), ("frames", rows[2]["path"])}
