"""Every decoding back-end against PyAV. torchcodec loads where FFmpeg's libraries are found; see benchmarks/decode.py."""

import multiprocessing
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from test_video import BIKES, nearest, numbered, numbers

from latte import video
from latte.config import DataConfig, StageConfig
from latte.data import make_loader, open_clips


def missing(backend):
    try:
        video.read(BIKES, frames=1, backend=backend)
    except ValueError as error:
        return str(error)
    return None


WHY_NOT = {backend: missing(backend) for backend in video.BACKENDS}
OTHERS = [pytest.param(backend, marks=pytest.mark.skipif(bool(WHY_NOT[backend]), reason=str(WHY_NOT[backend])))
          for backend in video.BACKENDS if backend != "pyav"]


def encoded(path, codec, times_ms, rotation=0, **stream_settings):
    frames = video.read(BIKES, 0.0, len(times_ms), 25, 80, 96)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 80, 96, "yuv420p", 2_000_000
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in stream_settings.items():
            setattr(stream.codec_context, name, value)
        stream.set_display_rotation(rotation)
        for image, ms in zip(frames, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(ms), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def assert_same(path, backend, wanted):
    native = video.read_at(path, wanted, backend="pyav")
    # Measured: no level apart, in every clip of benchmarks/decode.py.
    assert np.array_equal(video.read_at(path, wanted, backend=backend), native)
    apart = np.abs(video.read_at(path, wanted, 32, 48, "pyav").astype(int) - video.read_at(path, wanted, 32, 48, backend))
    # PyAV scales YUV and converts once; the others can only give RGB. Measured: a mean of 1 to 2 levels.
    assert apart.shape == (len(wanted), 32, 48, 3) and apart.mean() < 2.5


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9", "mpeg4"])
def test_equal_frames(tmp_path, backend, codec):
    path = encoded(tmp_path / "a.mp4", codec, range(0, 3200, 40))
    assert_same(path, backend, [0.5 + i / 8 for i in range(16)])
    assert_same(path, backend, [0.0, 0.01, 0.02, 1.5, 3.1])


@pytest.mark.parametrize("backend", OTHERS)
def test_equal_frames_of_real_footage(backend):
    assert_same(BIKES, backend, [5 + i / 8 for i in range(16)])
    assert_same(BIKES, backend, [i * 0.6 for i in range(16)])


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_and_stretched_pixels(tmp_path, backend, rotation):
    path = encoded(tmp_path / "a.mp4", "libx264", range(0, 400, 40), rotation, sample_aspect_ratio=Fraction(3, 2))
    assert_same(path, backend, [0.0, 0.1, 0.2])


@pytest.mark.parametrize("backend", [*OTHERS, "pyav"])
@pytest.mark.parametrize("gop", [12, 1000])
def test_nearest_frame_at_a_variable_rate(tmp_path, backend, gop):
    times = np.cumsum(np.random.default_rng(0).choice([8, 20, 40, 300], size=100))
    times -= times[0]
    numbered(tmp_path / "a.mp4", times, gop)
    for start_s in (0.0, 0.35, 2.0):
        wanted = [start_s + i / 12.5 for i in range(40)]
        frames = video.read(tmp_path / "a.mp4", start_s, 40, 12.5, backend=backend)
        assert numbers(frames) == list(nearest(times / 1000, wanted))


@pytest.mark.parametrize("backend", OTHERS)
def test_ties_take_the_earlier_frame_and_time_zero_is_the_first(tmp_path, backend):
    numbered(tmp_path / "a.mp4", [0, 250, 500, 750])
    assert numbers(video.read(tmp_path / "a.mp4", 0, 7, 8, backend=backend)) == [0, 0, 1, 1, 2, 2, 3]
    numbered(tmp_path / "late.mkv", [5000 + 40 * i for i in range(50)])
    assert numbers(video.read(tmp_path / "late.mkv", 1.0, 4, 25, backend=backend)) == [25, 26, 27, 28]


def hides_its_start(path):
    """A copy of bikes whose edit list hides ten frames, as cutting without encoding leaves it."""
    with av.open(str(BIKES)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                shift = round(Fraction(10, 25) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)


@pytest.mark.parametrize("backend", [*OTHERS, "pyav"])
def test_hidden_frames_are_not_shown(tmp_path, backend):
    hides_its_start(tmp_path / "a.mp4")
    if backend == "decord":
        with pytest.raises(ValueError, match=r"a\.mp4: decord cannot decode it \(it finds 250 frames"):
            video.read(tmp_path / "a.mp4", 0, 4, 25, backend=backend)
    else:
        shown = video.read(tmp_path / "a.mp4", 0, 4, 25, backend=backend)
        assert np.array_equal(shown, video.read(BIKES, 10 / 25, 4, 25))


@pytest.mark.parametrize("backend", OTHERS)
def test_errors_name_the_file(tmp_path, backend):
    (tmp_path / "text.mp4").write_text("no video here " * 100)
    for name, why in (("gone", "no such video file"), ("text", "cannot be opened as a video")):
        with pytest.raises(ValueError, match=rf"{name}\.mp4: {why}"):
            video.read(tmp_path / f"{name}.mp4", backend=backend)
    with pytest.raises(ValueError, match=r"bikes\.mp4: has 10\.00 s of video, too little for the 128 frames from 0 s to 15.875 s"):
        video.read(BIKES, backend=backend)
    damaged = bytearray(BIKES.read_bytes())
    damaged[100_000:130_000] = np.random.default_rng(0).bytes(30_000)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    for each in ("pyav", backend):
        with pytest.raises(ValueError, match=r"damaged\.mp4: "):
            video.read(tmp_path / "damaged.mp4", frames=64, backend=each)
    with av.open(str(tmp_path / "raw"), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=rf"raw: has no timestamps, which {backend} needs"):
        video.read(tmp_path / "raw", frames=1, backend=backend)


@pytest.mark.skipif(bool(WHY_NOT["decord"]), reason=str(WHY_NOT["decord"]))
def test_decord_refuses_narrow_pictures_that_it_pads(tmp_path):
    """It takes the padded bytes of a line, divided by the width, for the channels; 48 pixels are padded to 64."""
    video.write(tmp_path / "a.mp4", video.read(BIKES, 0, 4, 8, 48, 48))
    with pytest.raises(ValueError, match=r"a\.mp4: decord cannot decode it"):
        video.read(tmp_path / "a.mp4", frames=2, backend="decord")


@pytest.mark.skipif(bool(WHY_NOT["decord"]), reason=str(WHY_NOT["decord"]))
def test_decord_cannot_decode_av1(tmp_path):
    path = encoded(tmp_path / "a.mp4", "libsvtav1", range(0, 400, 40))
    assert video.read(path, frames=2).shape == (2, 80, 96, 3)
    with pytest.raises(ValueError, match=r"a\.mp4: decord cannot decode it"):
        video.read(path, frames=2, backend="decord")


def test_a_back_end_that_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match=r"no decoding back-end 'opencv'; there are pyav, decord, torchcodec"):
        video.read(BIKES, frames=1, backend="opencv")

    def refuse(name):
        raise OSError(f"{name}: libavcodec.so.62: cannot open shared object file\nand more lines")

    monkeypatch.setattr(video, "import_module", refuse)
    with pytest.raises(ValueError, match=r"decord cannot be loaded; it needs pip install decord==0.6.0 \(decord: libav"):
        video.read(BIKES, frames=1, backend="decord")
    with pytest.raises(ValueError, match=r"torchcodec cannot be loaded; .*torchcodec==0.13.0 and FFmpeg's .* \(.*file\)$"):
        video.read(BIKES, frames=1, backend="torchcodec")


def _child(backend, pipe):
    pipe.send(video.read(BIKES, 2.0, 4, 8, backend=backend).sum())


@pytest.mark.parametrize("backend", [*OTHERS, "pyav"])
def test_a_forked_worker_decodes_after_its_parent_did(backend):
    expected = video.read(BIKES, 2.0, 4, 8, backend=backend).sum()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_child, args=(backend, theirs), daemon=True)
    worker.start()
    assert ours.poll(60), f"{backend} hangs in a forked worker"
    assert ours.recv() == expected
    worker.join(10)


def rss_mib(process="self"):
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


NO_PROC = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of processes from Linux's /proc")


def children():
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return {child: rss_mib(child) for child in found if Path(f"/proc/{child}").exists()}


@NO_PROC
def test_memory_stays_over_2000_clips_of_the_loader(tmp_path):
    """Both the training process and its loader processes stay under a ceiling."""
    for i in range(8):
        video.write(tmp_path / f"{i}.mp4", video.read(BIKES, i, 16, 8, 64, 64))
    cfg = DataConfig(source="folder", path=str(tmp_path), layout="videos", workers=1, recycle_batches=125)
    stages = [StageConfig(steps=250, frames=16, height=16, width=16, batch_size=8)]
    own, theirs, seen = [], [], set()
    for batch in make_loader(open_clips(cfg, 0, stages), cfg, stages, 0):
        assert batch.x.shape == (8, 16, 3, 16, 16) and not batch.notes
        if batch.step % 25 == 20:
            own.append(rss_mib())
            now = children()
            theirs.append(max(now.values()))
            seen |= set(now)
    assert len(seen) == 2  # the first worker was replaced
    assert own[-1] - own[0] < 64 and max(theirs) - theirs[0] < 64, (own, theirs)


@NO_PROC
def test_recycling_bounds_the_memory_of_workers_that_leak(tmp_path, monkeypatch):
    for i in range(4):
        video.write(tmp_path / f"{i}.mp4", video.read(BIKES, i, 4, 8, 32, 32))
    leak, real = [], video.read_at

    def leaking(*args, **kwargs):
        leak.append(np.ones(2**18))  # 2 MiB a clip, 200 in all
        return real(*args, **kwargs)

    monkeypatch.setattr(video, "read_at", leaking)
    stages = [StageConfig(steps=50, frames=4, height=16, width=16, batch_size=2)]
    most = {}
    for recycle in (0, 10):
        cfg = DataConfig(source="folder", path=str(tmp_path), layout="videos", workers=1, recycle_batches=recycle)
        most[recycle] = max(max(children().values()) for _ in make_loader(open_clips(cfg, 0, stages), cfg, stages, 0))
    assert most[10] < most[0] - 100, most
