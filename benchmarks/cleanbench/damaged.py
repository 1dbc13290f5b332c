"""500 damaged inputs: each has to end as a row with a reason or as a clip; nothing may crash or hang."""

import tempfile
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np

from cleanbench.common import Bench, Row
from data_tools import clean, degrade, manifest
from data_tools.film import Clip
from latte import keyed


def plant(folder: Path, count: int) -> list[Path]:
    """Writes `count` inputs, of which the names say what is wrong with them."""
    clips = [degrade.synth(100 + i, 20, 96, 128) for i in range(4)]
    seeds = {}
    for i, clip in enumerate(clips):
        for form, codec, suffix in (("mp4", "libx264", "mp4"), ("matroska", "libx264", "mkv"), ("avi", "mpeg4", "avi"),
                                    ("mpeg", "mpeg2video", "mpg"), ("mpegts", "libx264", "ts")):
            path = folder / f"seed{i}.{suffix}"
            degrade.encode(clip, str(path), form=form, codec=codec, bit_rate=0 if codec == "libx264" else 800_000)
            seeds[path] = path.read_bytes()
            path.unlink()
    names, made = list(seeds), []

    def add(kind: str, suffix: str, content: bytes) -> None:
        path = folder / f"{len(made):03d}_{kind}{suffix}"
        path.write_bytes(content)
        made.append(path)

    i = 0
    while len(made) < count:
        rng = keyed.rng(7, "damaged", i)
        seed = names[i % len(names)]
        whole = bytearray(seeds[seed])
        kind = i % 14
        if kind in (0, 1):
            add("truncated", seed.suffix, bytes(whole[:int(rng.integers(1, len(whole)))]))
        elif kind in (2, 3, 4):
            for _ in range(int(rng.choice([1, 5, 50, 500]))):
                whole[int(rng.integers(0, len(whole)))] ^= 1 << int(rng.integers(0, 8))
            add("flipped", seed.suffix, bytes(whole))
        elif kind == 5:
            at, length = int(rng.integers(0, len(whole))), int(rng.integers(1, 4000))
            whole[at:at + length] = bytes(len(whole[at:at + length]))
            add("zeroed", seed.suffix, bytes(whole))
        elif kind == 6:
            add("empty", seed.suffix, b"") if i % 4 < 2 else add("zeros", seed.suffix, bytes(int(rng.integers(1, 5000))))
        elif kind == 7:
            add("text", ".mp4", b"Dear diary, this is no film.\n" * int(rng.integers(1, 200)))
        elif kind == 8:
            add("wrongname", str(rng.choice([".txt", ".jpg", ".mp3", ""])), bytes(whole))
        elif kind == 9:
            add("cutout", seed.suffix, bytes(whole[:len(whole) // 3] + whole[len(whole) // 2:]))
        elif kind == 10:
            add("noise", seed.suffix, rng.bytes(int(rng.integers(10, 20_000))))
        elif kind == 11:
            add("swapped", seed.suffix, seeds[names[(i + 7) % len(names)]])
        else:
            path = folder / f"{len(made):03d}_odd.mkv"
            _odd(path, int(rng.integers(0, 9)), clips[i % 4])
            path = path if path.exists() else next(folder.glob(f"{len(made):03d}_*"))
            made.append(path)
        i += 1
    return made


def _odd(path: Path, which: int, clip: Clip) -> None:
    """Files that are whole but unusual."""
    if which == 0:
        degrade.encode(clip.take(slice(0, 1)), str(path))
    elif which == 1:
        degrade.encode(clip, str(path), codec="ffv1", pixels="yuv420p10le")
    elif which == 2:
        degrade.encode(clip, str(path), codec="ffv1", pixels="yuv422p")
    elif which == 3:  # an odd size
        odd = Clip(clip.y[:, :95, :127], clip.u[:, :48, :64], clip.v[:, :48, :64], clip.at_s)
        with av.open(str(path), "w", format="matroska") as container:
            stream = container.add_stream("ffv1", rate=25)
            stream.width, stream.height, stream.pix_fmt = 127, 95, "gray"
            for y in odd.y:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(y), format="gray")))
            container.mux(stream.encode())
    elif which == 4:  # turned for display
        degrade.encode(clip, str(path), form="mp4")
        with av.open(str(path)) as source, av.open(str(path.with_suffix(".mp4")), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            stream.set_display_rotation(90)
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        path.unlink()
    elif which == 5:  # sound without pictures
        with av.open(str(path), "w", format="matroska") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    elif which == 6:  # metadata that are not UTF-8
        degrade.encode(clip, str(path), form="avi", codec="mpeg4", bit_rate=500_000)
        with av.open(str(path)) as source, av.open(str(path.with_suffix(".avi")), "w") as target:
            target.metadata["title"] = "NAMENAMENAME"
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        path.unlink()
        named = path.with_suffix(".avi")
        named.write_bytes(named.read_bytes().replace(b"NAMENAMENAME", b"\xff\xfe\xe9\x80NAMENAME"))
    elif which == 7:  # tiny
        tiny = Clip(clip.y[:, :4, :4], clip.u[:, :2, :2], clip.v[:, :2, :2], clip.at_s)
        degrade.encode(tiny, str(path), codec="ffv1")
    else:
        black = Clip(np.full_like(clip.y, 16), np.full_like(clip.u, 128), np.full_like(clip.v, 128), clip.at_s)
        degrade.encode(black, str(path))


def score(bench: Bench) -> list[Row]:
    count = 500 if not bench.quick else 28
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        paths = plant(folder, count)
        rows = [{"id": f"{i:064d}", "path": path.name, "source_id": path.name} for i, path in enumerate(paths)]
        before = time.monotonic()
        done = clean.clean_rows(rows, folder, folder / "out", clean.Settings(), workers=2, timeout_s=120)
        seconds = time.monotonic() - before
        manifest.write(folder / "out" / "manifest.parquet", done)
    ends = Counter("kept" if not row["dropped"] else row["dropped"].split(" (")[0] for row in done if "dropped" in row)
    crashed = sum("ended its process" in (row.get("dropped") or "") for row in done)
    hung = sum("took longer" in (row.get("dropped") or "") for row in done)
    failed = [row for row in done if "cleaning failed" in (row.get("dropped") or "")]
    for row in failed:
        print(f"damaged: {row['source_id']}: {row['dropped']}")
    print(f"damaged: {dict(ends)} in {seconds:.0f} s")
    return [Row("damaged", f"{count} damaged inputs", name, float(value), "0", None, count)
            for name, value in (("without a row", len(paths) - len(done)), ("crashed", crashed), ("hung", hung),
                                ("failed for a mistake of ours", len(failed)))]
