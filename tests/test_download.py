"""The downloader asks for each video once, remembers what became of it and goes on where it was stopped; a stand-in is yt-dlp."""

import hashlib
import json
import sys

import pytest

from data_tools import download, ingest, manifest

STAND_IN = '''
import sys
from pathlib import Path

url, target = sys.argv[-1], Path(sys.argv[sys.argv.index("--output") + 1].replace("%(ext)s", "mp4").replace("%%", "%"))
assert sys.argv[-2] == "--" and "bv[height<=?360][ext=mp4]" in sys.argv[sys.argv.index("--format") + 1]
with open(target.parent.parent / "asked", "a") as asked:
    asked.write(url.rpartition("=")[2] + " ")
said = {"priv": "Private video. Sign in if you've been granted access to this video",
        "gone": "Video unavailable. This video has been removed by the uploader",
        "land": "Video unavailable. The uploader has not made this video available in your country",
        "bots": "Sign in to confirm you\\u2019re not a bot. Use --cookies",
        "weak": "unable to download: The read operation timed out"}
for word, message in said.items():
    if word in url and not (word == "weak" and target.with_suffix(".part").exists()):
        target.with_suffix(".part").touch()
        sys.exit("WARNING: something\\nERROR: [youtube] x: " + message)
if "none" not in url:
    target.write_bytes(url.encode())
'''


@pytest.fixture
def place(tmp_path):
    (tmp_path / "stand in.py").write_text(STAND_IN)
    return tmp_path


def wanted(*names):
    return {f"{name:-<11}": f"https://www.youtube.com/watch?v={name:-<11}" for name in names}


def fetch(place, names, waits=None, blocks=5, **options):
    settings = download.Settings(height=360, program=f"{sys.executable} '{place / 'stand in.py'}'", blocks=blocks)
    wait = (waits if waits is not None else []).append
    return download.download(wanted(*names), place / "vid%eos", settings, wait=wait, **options)


def asked(place):
    path = place / "asked"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return [name.rstrip("-") for name in found]


def test_every_video_once_with_a_ledger(place):
    waits = []
    states = fetch(place, ["a_b", "priv", "gone", "land", "weak", "none"], waits)
    assert states == {"ok": 1, "private": 1, "gone": 1, "blocked": 1, "failed": 2}
    assert waits == [5.0] * 5
    assert asked(place) == ["a_b", "priv", "gone", "land", "weak", "none"]
    entries = download.ledger(place / "vid%eos" / "ledger.jsonl")
    data = (place / "vid%eos" / "a_b--------.mp4").read_bytes()
    assert entries["a_b--------"] | {"time": 0} == {
        "video": "a_b--------", "url": data.decode(), "time": 0, "state": "ok", "message": "", "file": "a_b--------.mp4",
        "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert entries["land-------"]["message"].startswith("ERROR: [youtube] x: Video unavailable. The uploader")
    assert entries["none-------"]["message"] == "no file came"
    assert fetch(place, ["a_b", "priv", "gone", "land", "weak", "new"])["ok"] == 3  # the weak one goes on now
    assert asked(place) == ["land", "weak", "new"]
    fetch(place, ["priv", "gone"], again=True)
    assert asked(place) == ["priv", "gone"]
    (place / "vid%eos" / "a_b--------.mp4").unlink()
    assert fetch(place, ["a_b", "more", "most"], limit=2) == {"ok": 2, "left": 1}
    assert asked(place) == ["a_b", "more"]


def test_a_ledger_that_was_cut_off(place):
    fetch(place, ["one", "two"])
    path = place / "vid%eos" / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    asked(place)
    fetch(place, ["one", "two", "three"])
    assert asked(place) == ["two", "three"]
    assert len(download.ledger(path)) == 3


def test_it_stops_where_it_is_not_welcome(place):
    with pytest.raises(ValueError, match="blocked 2 times.*not a bot"):
        fetch(place, ["bots", "bots2", "bots3"], blocks=2)
    assert asked(place) == ["bots", "bots2"]


@pytest.mark.parametrize(("message", "state"), [
    ("ERROR: [youtube] x: This video is not available", "gone"), ("ERROR: [generic] x: HTTP Error 404: Not Found", "gone"),
    ("ERROR: [youtube] x: Video unavailable. This video is no longer available because the account has been terminated.", "gone"),
    ("ERROR: [youtube] x: Private video. Sign in if you've been granted access", "private"),
    ("ERROR: [youtube] x: HTTP Error 429: Too Many Requests", "blocked"), ("ERROR: x: Sign in to confirm your age", "blocked"),
    ("ERROR: [youtube] x: The uploader has not made this video available in your country", "blocked"),
    ("ERROR: [generic] x: Requested format is not available. Use --list-formats", "failed"), ("", "failed")])
def test_what_a_message_means(message, state):
    assert download._state(message) == state


def test_bad_names_and_settings(place, monkeypatch):
    settings = download.Settings(program=f"{sys.executable} '{place / 'stand in.py'}'")
    bad = {"../x": "https://a/b", ".x": "https://a/b", "x": "--exec=rm"}
    states = download.download(bad, place / "v", settings, wait=lambda s: None)
    assert states == {"failed": 3} and asked(place) == []
    for wrong in (dict(height=0), dict(sleep_s=-1), dict(blocks=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            download.Settings(**wrong)
    monkeypatch.setattr(download.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="yt-dlp is not installed"):
        download.program(download.Settings())
    with pytest.raises(ValueError, match="gone/program: cannot be run"):
        download.download(wanted("a"), place / "v", download.Settings(program=f"{place}/gone/program"))


def test_from_a_manifest_and_back(place, capsys):
    names = list(wanted("a_b-C_d", "gone"))
    lines = [{"YoutubeID": name, "Start_timestamp": f"00:00:0{i}.000", "End_timestamp": "00:00:09.000", "Caption": "c"}
             for name in names for i in range(2)]
    (place / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ingest.ingest("internvid", place / "l.jsonl", place / "m.parquet")
    command = [str(place / "m.parquet"), "--out", str(place / "v"), "--height", "360", "--sleep-s", "0", "--program"]
    assert download.main([*command, f"{sys.executable} '{place / 'stand in.py'}'"]) == 0
    assert "1 ok, 1 gone" in capsys.readouterr().out and asked(place) == ["a_b-C_d", "gone"]
    ingest.ingest("internvid", place / "l.jsonl", place / "m.parquet", files=place / "v")
    rows = manifest.read(place / "m.parquet")
    assert [row["path"] for row in rows] == [f"v/{names[0]}.mp4"] * 2 + [None] * 2
    assert [row["start_s"] for row in rows[:2]] == [0.0, 1.0]
    assert download.main([*command, "/no/such/program"]) == 0  # nothing is left to ask
    assert download.main([str(place / "x.parquet"), "--out", str(place / "v")]) == 1
