"""Do no harm: clean clips through the whole chain; they must come out as they went in."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from cleanbench.common import SPANS, Bench, Row, real
from data_tools import clean, degrade, film, measure
from data_tools.film import Clip


def untouched(count: int) -> list[tuple[str, Clip, int]]:
    """(name, clip, crf or 0 for as it is) of clips that nothing was done to: procedural ones, still ones, noisy ones, real ones.

    Half are coded, at 18 to 28, as all footage is."""
    out: list[tuple[str, Clip, int]] = []
    for family in SPANS:
        out += [(name, without_repeats(clip), 0) for name, clip in real(family, 120)]
    for i in range(len(out)):
        out.append((f"{out[i][0]} coded", out[i][1], (18, 23, 28)[i % 3]))
    i = 0
    while len(out) < count:
        seed = 9_500 + i
        rng = np.random.default_rng(seed)
        clip = degrade.synth(seed, 90, *((360, 640), (270, 480), (240, 432))[i % 3], still=i % 10 == 9)
        if i % 5 == 4:
            clip = clip._replace(y=np.clip(clip.y + rng.normal(0, 4, clip.y.shape), 0, 255).astype(np.uint8))
        out.append((f"synth{seed}", clip, (0, 18, 23, 28)[i % 4]))
        i += 1
    return out[:count]


def without_repeats(clip: Clip) -> Clip:
    """A real clip without the pictures that its own makers repeated (Big Buck Bunny at 25 is 24 with one in 25 shown twice)."""
    change = np.abs(np.diff(clip.y.astype(np.int16), axis=0)).mean((1, 2))
    return clip.take(np.flatnonzero(np.concatenate([[True], change > 0.1 * np.median(change)]))).timed(clip.rate)


def score(bench: Bench) -> list[Row]:
    clips = untouched(100 if not bench.quick else 8)
    calm, lost, steps = 0, [], Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, clip, crf in clips:
            path = Path(folder) / "in.mkv"
            degrade.encode(clip, str(path), crf=crf)  # 0 is lossless
            before = film.to_clip(film.read(path))
            with clean.cleaned(path, clean.Settings()) as (started, outcome):
                nothing = outcome.film is started
                calm += nothing and not outcome.dropped
                steps.update(edit.step for edit in outcome.edits)
                if nothing:
                    lost.append(0.0)
                else:
                    print(f"harm: {name} crf {crf}: {[edit.step for edit in outcome.edits]} {outcome.dropped or ''}")
                    after = film.to_clip(outcome.film)
                    same = after.y.shape == before.y.shape
                    truth = measure.psnr(before.y, clip.y) if crf else 60.0
                    lost.append(max(0.0, truth - min(measure.psnr(after.y, clip.y), 60.0)) if same else 60.0)
    particulars = ", ".join(f"{step} {n}" for step, n in steps.most_common()) or "no repair at all"
    return [Row("harm", f"untouched clips ({particulars})", "share with nothing to do", calm / len(clips), ">= 0.99", None,
                len(clips)),
            Row("harm", "untouched clips", "mean loss, dB", float(np.mean(lost)), "< 0.1", None, len(clips))]
