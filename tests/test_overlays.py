"""What is drawn over the picture: bars, tickers and burned text are found and repaired, scenes stay; and the plug for networks."""

import io
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_tools import bars, degrade, networks, overlay, ticker
from data_tools.film import Clip, from_clip, to_clip
from data_tools.measure import psnr
from latte import keyed

SCENE = degrade.synth(11, 30, 180, 320)
NEWS = "BREAKING NEWS 1234 THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG  WEATHER 56 DEGREES AND RAIN"


def dark(clip, gain=0.25):
    y = 16 + (clip.y.astype(np.float32) - 16) * gain
    return clip._replace(y=np.rint(y).astype(np.uint8))


def noisy(clip, sigma=6.0):
    noise = keyed.rng(1, "noise").normal(0, sigma, clip.y.shape)
    return clip._replace(y=np.clip(clip.y + noise, 0, 255).astype(np.uint8))


def gray(y):
    f, h, w = y.shape
    return Clip(y, *(np.full((f, h // 2, w // 2), 128, np.uint8) for _ in range(2)), np.arange(f) / 25)


# Bars

@pytest.mark.parametrize("kind", degrade.BARS)
@pytest.mark.parametrize(("top", "left"), [(22, 0), (0, 30), (22, 30)])
def test_bars_are_found_to_the_line(kind, top, left):
    clip, box = degrade.barred(SCENE, kind, top, left)
    found = bars.find(from_clip(clip))
    assert found[:4] == box
    assert found.kind == kind


@pytest.mark.parametrize("kind", degrade.BARS)
@pytest.mark.parametrize("change", [dark, noisy, lambda clip: degrade.coded(clip, 28)], ids=["dark", "noise", "coded"])
def test_bars_are_found_through_damage(kind, change):
    clip, box = degrade.barred(dark(SCENE) if change is dark else SCENE, kind, 0, 30)
    found = bars.find(from_clip(clip if change is dark else change(clip)))
    assert found is not None
    assert max(abs(a - b) for a, b in zip(found[:4], box, strict=True)) <= 4


def scenes_without_bars():
    y = SCENE.y
    f, h, w = y.shape
    wall, door, sky, credits_, letters, enters = (y.copy() for _ in range(6))
    wall[:, :, :60] = 16
    door[:, :, :40], door[:, :, 270:] = 30, 70
    sky[:, :70] = 17
    credits_[:], letters[:] = 16, 16
    for i in range(f):
        for k in range(12):
            cv2.putText(credits_[i], NEWS[k:k + 4 + k * 5 % 13], (40, 40 + k * 24 - 2 * i), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 235, 1)
        cv2.putText(letters[i], "THE END", (80, 100), cv2.FONT_HERSHEY_SIMPLEX, 1.2, 235, 2)
    barred = degrade.barred(SCENE, "black", 20, 0)[0].y
    enters[:15] = barred[:15]
    return {"scene": y, "dark": dark(SCENE).y, "wall": wall, "door": door, "sky": sky, "credits": credits_, "letters": letters,
            "bars for half of it": enters, "black": np.full_like(y, 16)}


@pytest.mark.parametrize("name", scenes_without_bars())
def test_scenes_without_bars_stay(name):
    film = from_clip(gray(scenes_without_bars()[name]))
    outcome = bars.bars(film)
    assert outcome.film is film
    assert outcome.verdict == "nothing to do"


def test_the_crop_is_the_picture_inside():
    clip, box = degrade.barred(SCENE, "black", 22, 0)
    outcome = bars.bars(from_clip(clip))
    out = to_clip(outcome.film)
    assert np.array_equal(out.y, SCENE.y[:, 22:-22])
    assert np.array_equal(out.u, SCENE.u[:, 11:-11])
    assert (outcome.film.kind.width, outcome.film.kind.height) == (320, 136)
    assert outcome.edits[0].settings["top"] == 22
    assert bars.find(from_clip(clip), step=4)[:4] == (24, 0, 156, 320)


def test_wrong_boxes_are_refused():
    film = from_clip(SCENE)
    with pytest.raises(ValueError, match="does not lie in a picture of 320x180"):
        bars.crop(film, bars.Box(0, 0, 200, 320))
    with pytest.raises(ValueError, match="starts inside a chroma pixel"):
        next(iter(bars.crop(film, bars.Box(1, 0, 101, 320))))


# Tickers

def running(seed=3, speed=4.7, frames=80, rate=24):
    return degrade.ticker(degrade.synth(seed, frames, 180, 320).timed(rate), NEWS, speed, x0=250)[0]


BAND = np.s_[:, 136:172]


@pytest.mark.parametrize("speed", [6.0, 3.3])
def test_blended_tickers_are_drawn_anew(speed):
    source = degrade.synth(3, 80, 180, 320).timed(24)
    given, _ = degrade.blended(running(speed=speed), 30, 24)
    truth, _ = degrade.ticker(source.take(np.minimum(np.arange(len(given.y)), 79)).timed(30), NEWS, speed * 0.8, x0=250)
    outcome = ticker.ticker(from_clip(degrade.coded(given, 23)))
    out = to_clip(outcome.film)
    assert outcome.verdict == "blended ticker"
    assert outcome.found["laws"][0]["speed"] == pytest.approx(speed * 0.8, abs=0.02)
    assert outcome.found["laws"][0]["ratio"] == pytest.approx(0.8)
    assert psnr(out.y[BAND], truth.y[BAND]) > psnr(given.y[BAND], truth.y[BAND]) + 8
    assert np.array_equal(out.y[:, :130], degrade.coded(given, 23).y[:, :130])


@pytest.mark.parametrize("order", degrade.ORDERS)
def test_woven_tickers_are_drawn_anew(order):
    source = running()
    outcome = ticker.ticker(from_clip(degrade.weave(source, order)))
    assert outcome.verdict == "woven ticker"
    assert outcome.found["laws"][0]["name"] == f"woven {order}"
    assert psnr(to_clip(outcome.film).y[BAND], source.y[::2][BAND]) > 30


@pytest.mark.parametrize("clip", [running(), degrade.coded(running(), 23), SCENE, degrade.synth(5, 60, 180, 320)],
                         ids=["whole", "coded", "text over a scene", "longer"])
def test_whole_tickers_and_scenes_stay(clip):
    film = from_clip(clip)
    outcome = ticker.ticker(film)
    assert outcome.film is film
    assert outcome.verdict == "nothing to do"


# Burned text

def readable():
    pytest.importorskip("rapidocr", reason="the OCR engine is an extra")


MOVING = degrade.synth(1, 40, 180, 320)


def test_looking_for_text_takes_no_more_memory_the_longer_it_goes_on():
    readable()

    def taken() -> float:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    for y in MOVING.y[:2]:
        overlay._detected(y)
    before, kept = taken(), []
    for y in MOVING.y[:5]:
        overlay._detected(y)
        kept += [y.copy() for _ in range(4)]  # 0.2 MiB: what lies between the engine's buffers keeps the heap from shrinking
    assert taken() - before < 12


def test_burned_text_at_an_edge_is_cut_off():
    readable()
    clip, box = degrade.captioned(MOVING, "The quick fox runs", top=0.85)
    outcome = overlay.overlay(from_clip(clip))
    assert outcome.verdict == "cropped"
    found = outcome.found["texts"][0]
    assert found["text"].startswith("The quick fox runs")
    assert found["kind"] == "subtitle"
    assert overlay.Box(*found["box"]).shared(overlay.Box(*box)) > 0.6
    out = to_clip(outcome.film).y
    assert np.array_equal(out, MOVING.y[:, :out.shape[1]])
    assert out.shape[1] >= 0.8 * 180


def test_burned_text_in_the_middle_is_filled():
    readable()
    clip, box = degrade.captioned(MOVING, "In the middle now", top=0.45)
    outcome = overlay.overlay(from_clip(clip))
    assert outcome.verdict == "filled"
    out, changed = to_clip(outcome.film).y, np.abs(clip.y.astype(int) - MOVING.y) > 8
    assert psnr(out, MOVING.y, changed) > psnr(clip.y, MOVING.y, changed) + 6
    assert np.array_equal(out[:, :50], MOVING.y[:, :50])


def test_filling_is_worth_it_only_where_text_hides_more_than_filling_spoils(monkeypatch):
    readable()
    clip, _ = degrade.captioned(MOVING, "In the middle now", top=0.45)
    tracks, _ = overlay.find(from_clip(clip))
    (opaque,), (nothing,) = overlay._worth(from_clip(clip), tracks), overlay._worth(from_clip(MOVING), tracks)
    assert opaque > overlay.WORTH
    assert nothing < 2
    monkeypatch.setattr(overlay, "WORTH", opaque + 1)
    film = from_clip(clip)
    outcome = overlay.overlay(film)
    assert outcome.verdict == "left"
    assert outcome.film is film
    assert outcome.dropped is None
    assert "could not be shown to be better" in outcome.notes[0]


def test_see_through_text_stays():
    readable()
    film = from_clip(degrade.captioned(degrade.synth(1, 24), "CHANNEL 7", top=0.3, size=0.7, alpha=0.3)[0])
    assert overlay.overlay(film).film is film


@pytest.mark.parametrize("clip", [MOVING, degrade.synth(4, 30, 180, 320, still=True)], ids=["moving", "still"])
def test_text_of_the_scene_stays(clip):
    readable()
    film = from_clip(clip)
    assert overlay.overlay(film).film is film


def test_a_sign_that_moves_with_the_scene_stays():
    readable()
    signed, _ = degrade.captioned(MOVING, "GROCERY STORE", top=0.45)
    moves = [np.roll(plane, 3 * i, 1) for i, plane in enumerate(signed.y[:1].repeat(40, 0))]
    still = signed.y[:1].repeat(40, 0)
    for y in (np.stack(moves), still):
        assert overlay.find(from_clip(signed._replace(y=y)))[0] == []


def test_text_that_cannot_be_removed_drops_the_clip(monkeypatch):
    readable()
    monkeypatch.setattr(overlay, "LARGEST", 0.001)
    clip, _ = degrade.captioned(MOVING, "In the middle now", top=0.45)
    outcome = overlay.overlay(from_clip(clip))
    assert outcome.verdict == "dropped"
    assert "too much" in outcome.dropped


def test_without_an_engine_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    overlay._engine.cache_clear()
    with pytest.raises(ValueError, match="pip install rapidocr onnxruntime"):
        overlay.find(from_clip(MOVING))
    overlay._engine.cache_clear()


# Networks

STAND_IN = """
import os, time
import numpy as np
def brighter(x): print("words on stdout"); return np.minimum(x, 253) + np.uint8(2)
def twice(x): return x.repeat(2, 1).repeat(2, 2)
def short(x): return x[:-1]
def inverted(x): return 255 - x
def slow(x): time.sleep(60)
def crash(x): os._exit(3)
"""
NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(()))
    def forward(self, x): return x * self.gain
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "stand_in_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:.")
    return tmp_path


SMALL = degrade.synth(3, 21, 90, 160)


@pytest.mark.parametrize(("name", "size"), [("brighter", (90, 160)), ("twice", (180, 320))])
def test_a_function_repairs_windows_of_pictures(stand_in, name, size):
    outcome = networks.networks(from_clip(SMALL), function=f"stand_in:{name}", window=8)
    out = to_clip(outcome.film)
    assert outcome.verdict == "repaired"
    assert out.y.shape == (21, *size)
    assert np.allclose(out.at_s, SMALL.at_s, atol=1e-4)
    assert outcome.found["least_psnr_db"] > 35


def test_a_torch_module_with_weights(stand_in):
    import torch
    from safetensors.torch import save_file
    save_file({"gain": torch.tensor(0.5)}, stand_in / "net.safetensors")
    network = networks.loaded("stand_in_net:Net", str(stand_in / "net.safetensors"))
    assert np.array_equal(network(np.full((2, 4, 6, 3), 100, np.uint8)), np.full((2, 4, 6, 3), 50))


@pytest.mark.parametrize(("name", "reason"), [
    ("short", "it gave 7 pictures for 8"), ("inverted", "dB from the input"), ("slow", "no answer within 2 s"),
    ("crash", "exit code 3")])
def test_what_a_function_does_wrong_leaves_the_film(stand_in, name, reason):
    film = from_clip(SMALL)
    outcome = networks.networks(film, function=f"stand_in:{name}", window=8, timeout_s=2 if name == "slow" else 60)
    assert outcome.verdict == "refused"
    assert outcome.film is film
    assert reason in outcome.notes[0]


def test_what_is_no_network_is_refused():
    with pytest.raises(ValueError, match="no attribute 'missing'"):
        networks.loaded("math:missing")
    asked = b'{"count": 1, "height": 2, "width": 2}\n' + bytes(12)
    with pytest.raises(ValueError, match="must give uint8"):
        networks.serve(lambda rgb: rgb / 255, io.BytesIO(asked), io.BytesIO())
    answer = io.BytesIO()
    networks.serve(lambda rgb: rgb, io.BytesIO(asked + asked), answer)
    assert answer.getvalue() == asked + asked


def test_a_command_speaks_the_protocol():
    film = from_clip(SMALL)
    assert networks.networks(film, command="cat").found["least_psnr_db"] > 35
    assert "cannot start" in networks.networks(film, command="no-such-program").notes[0]
    assert "expected a line of JSON" in networks.networks(film, command="echo hello").notes[0]


def test_networks_are_off_and_refuse_bad_settings():
    film = from_clip(SMALL)
    assert networks.networks(film).film is film
    for settings, message in (({"function": "f", "command": "cat"}, "not both"), ({"function": "f"}, "module:name"),
                              ({"command": "cat", "window": 4}, "more than twice overlap"),
                              ({"function": "a:b", "weights": "none"}, "there is no file none")):
        with pytest.raises(ValueError, match=message):
            networks.networks(film, **settings)
