"""Ghosts, dropouts, scratches, torn feet, lost colour, flicker, blocks and noise: found and undone, beside FFmpeg's filters."""

import subprocess

import numpy as np

from cleanbench.common import Bench, Row, mean, sheet, through_filters
from data_tools import degrade
from data_tools.film import Clip, from_clip, to_clip
from data_tools.measure import f1, psnr
from data_tools.repair import dropout, ghost, smooth, wear

FAMILIES = ("synth", "bbb", "bikes", "car")
SHARES = (0.3, 0.5, 0.7)


def score(bench: Bench) -> list[Row]:
    parts = _ghosts, _dropouts, _held, _worn, _colour, _flicker, _blocks, _noise
    return [row for part in parts for row in part(bench)]


def through_binary(clip: Clip, filters: str) -> Clip:
    """A clip through filters that only a GPL build of FFmpeg has, in the binary that imageio-ffmpeg brings."""
    import imageio_ffmpeg
    f, h, w = clip.y.shape
    raw = b"".join(plane.tobytes() for planes in zip(*clip[:3], strict=True) for plane in planes)
    form = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{w}x{h}", "-r", "25"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-threads", "1", *form, "-i", "-", "-vf", filters, *form, "-"]
    done = subprocess.run(command, input=raw, capture_output=True, check=True)
    sizes = [h * w, clip.u[0].size, clip.v[0].size]
    rows = np.frombuffer(done.stdout, np.uint8).reshape(-1, sum(sizes))
    planes = np.split(rows, np.cumsum(sizes)[:-1], 1)
    return Clip(planes[0].reshape(-1, h, w), *(part.reshape(-1, *clip.u.shape[1:]) for part in planes[1:]), clip.at_s[:len(rows)])


def _median(clip: Clip) -> Clip:
    """FFmpeg's median over three pictures, with the two that it leaves out put back where they belong."""
    out = through_filters(clip, "tmedian=radius=1")
    return Clip(*(np.concatenate([given[:1], made, given[-1:]])[:len(given)]
                  for given, made in zip(clip[:3], out[:3], strict=True)), clip.at_s)


def _deghosted(clip: Clip) -> tuple[ghost.Found | None, Clip]:
    film = from_clip(clip)
    for found in ghost.analyse(film):
        repaired = ghost.repair(film, found)
        if not ghost.prove(film, repaired, found):
            return found, to_clip(repaired)
    return None, clip


def _ghosts(bench: Bench) -> list[Row]:
    rows = []
    for crf in (None, 20, 24):
        coding = f"crf {crf}" if crf else "clean"
        for family in FAMILIES:
            errors, gains, best, caught, peers = [], [], [], [], {"hqdn3d": [], "atadenoise": [], "tmedian": []}
            clips = list(bench.clips((family,), 48, 3))
            for _, name, clip in clips:
                for share in SHARES:
                    damaged = degrade.ghosted(clip, share)
                    damaged = degrade.coded(damaged, crf) if crf else damaged
                    before = psnr(damaged.y, clip.y)
                    found, made = _deghosted(damaged)
                    exact = to_clip(ghost.repair(from_clip(damaged), ghost.Found("trail", share)))
                    caught.append(found is not None)
                    errors.append(abs(found.share - share) if found else np.nan)
                    gains.append(psnr(made.y, clip.y) - before)
                    best.append(psnr(exact.y, clip.y) - before)
                    if share == 0.5 and crf is None:
                        others = {"hqdn3d": through_binary(damaged, "hqdn3d"), "atadenoise": through_filters(damaged, "atadenoise"),
                                  "tmedian": _median(damaged)}
                        for peer, other in others.items():
                            peers[peer].append(psnr(other.y, clip.y) - before)
                        if bench.pictures and name in ("bbb0", "synth0"):
                            _show(bench.pictures / f"ghost_{name}.png", damaged, others["hqdn3d"], made, clip, "hqdn3d")
            if not clips:
                continue
            setting, count = f"{coding}, {family}, a .3 .5 .7", len(clips)
            rows.append(Row("ghost", setting, "found", mean(caught), "1", clips=count))
            if any(caught):
                goal = "<= 0.03" if crf is None else "<= 0.07"
                rows.append(Row("ghost", setting, "greatest error of a where found", float(np.nanmax(errors)), goal, clips=count))
            if crf is None:
                averages = {peer: mean(values) for peer, values in peers.items()}
                rows.append(Row("ghost", setting, "gain, dB", mean(gains), ">= 12", averages, count))
            else:
                rows.append(Row("ghost", setting, "share of the true a's gain", mean(gains) / mean(best), ">= 0.8", clips=count))
    return rows


def _dropouts(bench: Bench) -> list[Row]:
    rows = []
    for crf in (None, 20):
        coding = f"crf {crf}" if crf else "clean"
        for family in FAMILIES:
            figures, peers = [], {"tmedian": [], "removegrain": [], "hqdn3d": []}
            clips = list(bench.clips((family,), 48, 2))
            for k, (_, name, clip) in enumerate(clips):
                damaged, lost = degrade.dropouts(clip, k)
                damaged = degrade.coded(damaged, crf) if crf else damaged
                made = list(dropout.mended(iter(from_clip(damaged))))
                mask = np.stack([np.zeros(lost.shape[1:], bool) if each.mask is None else each.mask for each in made])
                filled = to_clip(each.picture for each in made)
                figures.append((f1(mask, lost), psnr(filled.y, clip.y, lost), psnr(filled.y, clip.y, ~lost)))
                if crf:
                    continue
                others = {"tmedian": _median(damaged), "removegrain": through_filters(damaged, "removegrain=m0=4"),
                          "hqdn3d": through_binary(damaged, "hqdn3d")}
                for peer, other in others.items():
                    peers[peer].append((psnr(other.y, clip.y, lost), psnr(other.y, clip.y, ~lost)))
                if bench.pictures and name in ("bbb0", "synth0"):
                    _show(bench.pictures / f"dropouts_{name}.png", damaged, others["tmedian"], filled, clip, "tmedian")
            if not clips:
                continue
            setting, (found, within, without) = f"{coding}, {family}", (mean(values) for values in zip(*figures, strict=True))
            peers = {peer: values for peer, values in peers.items() if values}
            inside, outside = ({peer: mean(value[k] for value in values) for peer, values in peers.items()} for k in (0, 1))
            rows += [Row("dropouts", setting, "F1 of the mask", found, ">= 0.9", clips=len(clips)),
                     Row("dropouts", setting, "PSNR inside, dB", within, ">= 30", inside, len(clips))]
            if crf is None:
                rows.append(Row("dropouts", setting, "PSNR outside, dB", without, ">= 60", outside, len(clips)))
    return rows


def _held(bench: Bench) -> list[Row]:
    """Dropouts that a player hid by the line above."""
    rows = []
    for family in FAMILIES:
        figures = []
        for k, (_, _, clip) in enumerate(bench.clips((family,), 48, 2)):
            damaged, lost = degrade.dropouts(clip, k, held=True)
            made = list(dropout.mended(iter(from_clip(damaged))))
            mask = np.stack([np.zeros(lost.shape[1:], bool) if each.mask is None else each.mask for each in made])
            filled = to_clip(each.picture for each in made)
            figures.append(((mask & lost).sum() / max(mask.sum(), 1), psnr(damaged.y, clip.y, lost), psnr(filled.y, clip.y, lost),
                            psnr(filled.y, clip.y, ~lost)))
        if figures:
            right, before, after, outside = (mean(values) for values in zip(*figures, strict=True))
            setting, count = f"lines held, {family}", len(figures)
            rows += [Row("dropouts", setting, "share of the mask that was lost", right, ">= 0.95", clips=count),
                     Row("dropouts", setting, "PSNR inside, dB", after, f"> {before:.1f}", clips=count),
                     Row("dropouts", setting, "PSNR outside, dB", outside, ">= 60", clips=count)]
    return rows


def _worn(bench: Bench) -> list[Row]:
    before, after, feet = [], [], []
    clips = list(bench.clips(FAMILIES, 48, 2))
    for k, (_, name, clip) in enumerate(clips):
        damaged, lost = degrade.scratched(clip, k, dust=0)
        watch = wear.ScratchWatch()
        for plane in damaged.y:
            watch.add(plane)
        made = to_clip(wear.unscratched(from_clip(damaged), watch.found()))
        before.append(psnr(damaged.y, clip.y, lost))
        after.append(psnr(made.y, clip.y, lost))
        if bench.pictures and name == "bbb0":
            _show(bench.pictures / "scratches_bbb0.png", damaged, _median(damaged), made, clip, "tmedian")
        torn, lines = degrade.head_switch(clip, k)
        foot = wear.FootWatch()
        for plane in torn.y:
            foot.add(plane)
        feet.append(foot.found() == lines)
    return [Row("scratches", "all", "PSNR inside, dB", mean(after), f"> {mean(before):.1f}", clips=len(clips)),
            Row("foot", "all", "exact number of lines", mean(feet), "1", clips=len(clips))]


def _colour(bench: Bench) -> list[Row]:
    rows = []
    for crf in (None, 20):
        scores, before, after = [], [], []
        clips = list(bench.clips(FAMILIES, 48, 2))
        for k, (_, _, clip) in enumerate(clips):
            damaged, lost = degrade.discoloured(clip, k, 0.15)
            damaged = degrade.coded(damaged, crf) if crf else damaged
            watch = wear.ColourWatch()
            for picture in from_clip(damaged):
                watch.add(picture)
            found = np.isin(np.arange(len(clip.y)), watch.found())
            made = to_clip(wear.coloured(from_clip(damaged), watch.found()))
            mask = np.broadcast_to(lost[:, :, None], clip.u.shape)
            scores.append(f1(found, lost.any(1)))
            before.append(psnr(damaged.u, clip.u, mask))
            after.append(psnr(made.u, clip.u, mask))
        setting = f"crf {crf}, all" if crf else "clean, all"
        rows += [Row("colour", setting, "F1 of pictures", mean(scores), ">= 0.9", clips=len(clips)),
                 Row("colour", setting, "PSNR of u where lost, dB", mean(after), f"> {mean(before):.1f}", clips=len(clips))]
    return rows


def _flicker(bench: Bench) -> list[Row]:
    rows = []
    for family in FAMILIES:
        ratios, peers = [], []
        clips = list(bench.clips((family,), 48, 2))
        for k, (_, name, clip) in enumerate(clips):
            damaged, _ = degrade.flicker(clip, k)
            watch = smooth.FlickerWatch()
            for plane in damaged.y:
                watch.add(plane)
            flicker = watch.found()
            made = to_clip(smooth.steadied(from_clip(damaged), flicker)) if flicker else damaged
            other = through_filters(damaged, "deflicker")
            ratios.append(_restlessness(damaged, clip) / _restlessness(made, clip))
            peers.append(_restlessness(damaged, clip) / _restlessness(other, clip))
            if bench.pictures and name == "synth0":
                _show(bench.pictures / "flicker_synth0.png", damaged, other, made, clip, "deflicker")
        if clips:
            averages = {"deflicker": mean(peers)}
            rows.append(Row("flicker", family, "energy before / after", mean(ratios), ">= 5", averages, len(clips)))
    return rows


def _restlessness(clip: Clip, truth: Clip) -> float:
    """Energy of the steps of the gain between a clip and its truth."""
    gain = np.log((clip.y.mean((1, 2)) - smooth.BLACK) / (truth.y.mean((1, 2)) - smooth.BLACK))
    return float(np.square(np.diff(gain)).sum()) + 1e-9


def _blocks(bench: Bench) -> list[Row]:
    rows = []
    for family in FAMILIES:
        gains, peers = [], []
        clips = list(bench.clips((family,), 48, 1))
        for _, name, clip in clips:
            damaged = degrade.coded(clip, codec="mpeg2video", bit_rate=600_000)
            watch = smooth.BlockWatch()
            for plane in damaged.y:
                watch.add(plane)
            blocks = watch.found()
            made = to_clip(smooth.deblocked(from_clip(damaged), blocks)) if blocks else damaged
            other = through_filters(damaged, "deblock=filter=strong:block=8")
            gains.append(psnr(made.y, clip.y) - psnr(damaged.y, clip.y))
            peers.append(psnr(other.y, clip.y) - psnr(damaged.y, clip.y))
            if bench.pictures and name == "bbb0":
                _show(bench.pictures / "blocks_bbb0.png", damaged, other, made, clip, "deblock")
        if clips:
            setting, averages = f"{family}, mpeg2 600 kbit/s", {"deblock": mean(peers)}
            rows.append(Row("blocks", setting, "gain, dB", mean(gains), ">= 0", averages, len(clips)))
    return rows


def _noise(bench: Bench) -> list[Row]:
    rows = []
    for level in (6, 10):
        for family in FAMILIES:
            gains, peers = [], {"hqdn3d": [], "nlmeans": [], "atadenoise": []}
            for k, (_, name, clip) in enumerate(bench.clips((family,), 24, 2)):
                damaged = degrade.tape(clip, k, noise=level, chroma_noise=0, chroma_shift=0, jitter=0)
                watch = smooth.NoiseWatch()
                for plane in damaged.y:
                    watch.add(plane)
                noise, film = watch.found(), from_clip(damaged)
                made = film if noise is None else smooth.denoised(film, noise)
                refused = noise is not None and smooth.prove_noise(film, made, noise)
                made = damaged if refused else to_clip(made)
                others = {"hqdn3d": through_binary(damaged, "hqdn3d"), "nlmeans": through_binary(damaged, f"nlmeans=s={level}"),
                          "atadenoise": through_filters(damaged, "atadenoise")}
                before = psnr(damaged.y, clip.y)
                gains.append(psnr(made.y, clip.y) - before)
                for peer, other in others.items():
                    peers[peer].append(psnr(other.y, clip.y) - before)
                if bench.pictures and name == "bbb0" and level == 10:
                    _show(bench.pictures / "noise_bbb0.png", damaged, others["nlmeans"], made, clip, "nlmeans")
            if gains:
                averages = {peer: mean(values) for peer, values in peers.items()}
                rows.append(Row("noise", f"{level} levels, {family}", "gain, dB", mean(gains), ">= 0", averages, len(gains)))
    return rows


def _show(path, damaged: Clip, other: Clip, made: Clip, truth: Clip, peer: str) -> None:
    """A sheet of the place of a middle picture where the damage is greatest."""
    k = len(truth.y) // 2
    height, width = (min(side, most) for side, most in zip(truth.y.shape[1:], (104, 152), strict=True))
    wrong = np.square(damaged.y[k].astype(float) - truth.y[k]).cumsum(0).cumsum(1)
    energy = wrong[height:, width:] - wrong[:-height, width:] - wrong[height:, :-width] + wrong[:-height, :-width]
    top, left = np.unravel_index(energy.argmax(), energy.shape) if energy.size else (0, 0)
    area = np.s_[k, top:top + height, left:left + width]
    sheet(path, [("damaged", damaged.y[area]), (peer, other.y[area]), ("ours", made.y[area]), ("truth", truth.y[area])])
