"""Survival: what each stage of a run kept and dropped, and why, on one page and in the terminal.

    python -m data_tools.survival RUN_FOLDER [--out PAGE.html] [--no-thumbnails]

Manifests are gone through in batches, so they may hold millions of rows. Rows that were joined into longer clips or cut into
shorter ones changed their form and are not lost: what the new rows lack of their hours stands in a column of its own. The page
needs no script and no other file. Thumbnails are chosen by a hash of (seed, id): leave them out where footage may not be shown.
"""

import argparse
import base64
import hashlib
import heapq
import html
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latte import video
from latte.command import command

FORM = ("joined:", "cut:")  # reasons of rows that live on in others
BINS = 32  # of a histogram
SAMPLE = 100_000  # values of a score from which its range and quantiles are read
SHOWN = 6  # thumbnails of a kind for a stage
HEIGHT, QUALITY = 90, 60  # of a thumbnail: lines, and JPEG's
ROWS = 65_536  # that are held at a time


class Stage(NamedTuple):
    """A stage of a run."""

    name: str
    settings: dict[str, Any]
    path: Path  # its manifest


@dataclass
class Held:
    """What a manifest holds: rows and seconds that live, and of each reason."""

    rows: int = 0
    seconds: float = 0.0
    dropped: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass
class Passed:
    """What happened to the rows that came into a stage."""

    stage: Stage
    came: tuple[int, float]  # rows, seconds
    went: tuple[int, float]
    lost: dict[str, tuple[int, float]]  # by reason, most first
    formed: dict[str, tuple[int, float]]  # the same of rows that live on in others

    @property
    def gone(self) -> tuple[int, float]:
        """Rows and seconds of all losses."""
        return sum(rows for rows, _ in self.lost.values()), sum(seconds for _, seconds in self.lost.values())

    @property
    def new(self) -> int:
        """Rows that the stage made of others."""
        return self.went[0] - self.came[0] + self.gone[0] + sum(rows for rows, _ in self.formed.values())

    @property
    def unused(self) -> float:
        """Seconds of rows that live on in others which these do not hold, overlaps among them."""
        return self.came[1] - self.gone[1] - self.went[1]


def passed(stages: list[Stage]) -> list[Passed]:
    """What each stage did, in order. Raises ValueError naming a manifest that cannot be read."""
    out, before = [], None
    for stage in stages:
        now = held(stage.path)
        new = {reason: (rows - (before.dropped.get(reason, (0, 0.0))[0] if before else 0),
                        seconds - (before.dropped.get(reason, (0, 0.0))[1] if before else 0.0))
               for reason, (rows, seconds) in now.dropped.items()}
        new = {reason: new[reason] for reason in sorted(new, key=lambda reason: (-new[reason][0], reason)) if new[reason][0] > 0}
        came = (before.rows, before.seconds) if before else (
            now.rows + sum(rows for rows, _ in new.values()), now.seconds + sum(seconds for _, seconds in new.values()))
        formed = {reason: count for reason, count in new.items() if reason.startswith(FORM)}
        lost = {reason: count for reason, count in new.items() if reason not in formed}
        out.append(Passed(stage, came, (now.rows, now.seconds), lost, formed))
        before = now
    return out


def held(path: Path) -> Held:
    """Counts a manifest's rows."""
    found, rows, seconds = Held(), Counter(), Counter()
    for batch in _batches(path, ["dropped", "start_s", "end_s", "from_s", "to_s", "frames", "fps"]):
        lengths, dropped = _seconds(batch), batch.column("dropped").dictionary_encode()
        codes = dropped.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        found.rows += int((codes < 0).sum())
        found.seconds += float(lengths[codes < 0].sum())
        for code, reason in enumerate(dropped.dictionary.to_pylist()):
            key = short(reason)
            rows[key] += int((codes == code).sum())
            seconds[key] += float(lengths[codes == code].sum())
    found.dropped = {key: (rows[key], seconds[key]) for key in rows}
    return found


def short(reason: str) -> str:
    """A reason without what is measured or named in it, so that equal ones can be counted."""
    reason = re.sub(r"\s+\(.*\)\s*$", "", reason, flags=re.DOTALL)
    return re.sub(r"\b[0-9a-f]{12,64}\b", "...", re.sub(r"\binto \d+ ", "into N ", reason))


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(ROWS, columns=columns)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such manifest") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a manifest ({error})") from None


def _seconds(batch: pa.RecordBatch) -> np.ndarray:
    """How long the clips of a batch are, [rows]; 0 where nothing tells."""
    start, end, first, last, frames, fps = (
        batch.column(name).cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
        for name in ("start_s", "end_s", "from_s", "to_s", "frames", "fps"))
    with np.errstate(divide="ignore", invalid="ignore"):
        counted = frames / fps
    lengths = np.where(np.isfinite(end - start), end - start, np.where(np.isfinite(last - first), last - first, counted))
    return np.where(np.isfinite(lengths), lengths, 0.0)


# Histograms

class Histogram(NamedTuple):
    """How a score is spread over the rows of a manifest that live."""

    name: str
    bounds: tuple[float | None, float | None]  # least and most that is kept
    edges: np.ndarray  # [BINS + 1]; the outermost bins hold what lies beyond them too
    kept: np.ndarray  # [BINS] rows within the bounds
    lost: np.ndarray  # [BINS]
    quantiles: tuple[float, ...]  # 0, 5, 50, 95, 100 %

    @property
    def rows(self) -> int:
        return int(self.kept.sum() + self.lost.sum())


def histograms(path: Path, keep: dict[str, list[float | None]], only: bool) -> list[Histogram]:
    """Of the scores of a manifest, with the bounds `keep`; `only` these scores, or all others without bounds."""
    values: dict[str, list[np.ndarray]] = {}
    least, most = {}, {}
    for name, found in _scores(path):
        values.setdefault(name, []).append(found[::-(-len(found) // 4096)])
        least[name] = min(least.get(name, np.inf), float(found.min()))
        most[name] = max(most.get(name, -np.inf), float(found.max()))
    samples = {name: np.concatenate(parts) for name, parts in values.items() if (name in keep) == only}
    samples = {name: sample[::-(-len(sample) // SAMPLE)] for name, sample in samples.items()}
    out = {}
    for name, sample in samples.items():
        bounds = tuple(keep.get(name, (None, None)))
        given = [bound for bound in bounds if bound is not None]
        low, high = (float(value) for value in np.quantile(sample, [0.01, 0.99]))
        low, high = min([low, *given]), max([high, *given])
        pad = 0.02 * (high - low) or 0.5
        low, high = max(low - pad, min([least[name], *given])) if high > low else low - pad, high + pad
        middle = (float(value) for value in np.quantile(sample, [0.05, 0.5, 0.95]))
        out[name] = Histogram(name, bounds, np.linspace(low, high, BINS + 1), np.zeros(BINS, int), np.zeros(BINS, int),
                              (least[name], *middle, most[name]))
    for name, found in _scores(path):
        if name in out:
            least_kept, most_kept = (bound if bound is not None else fallback
                                     for bound, fallback in zip(out[name].bounds, (-np.inf, np.inf), strict=True))
            good = (found >= least_kept) & (found <= most_kept)
            for target, part in ((out[name].kept, found[good]), (out[name].lost, found[~good])):
                target += np.histogram(np.clip(part, out[name].edges[0], out[name].edges[-1]), out[name].edges)[0]
    return [out[name] for name in sorted(out, key=lambda name: (list(keep).index(name) if name in keep else 0, name))]


def _scores(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(score, values of rows that live), batch by batch."""
    for batch in _batches(path, ["dropped", "scores"]):
        scores = batch.column("scores")
        offsets = scores.offsets.to_numpy()
        row_of = np.repeat(np.arange(len(batch)), np.diff(offsets))
        live = batch.column("dropped").is_null().to_numpy(zero_copy_only=False)[row_of]
        keys = scores.keys.slice(offsets[0], len(row_of)).dictionary_encode()
        items = scores.items.slice(offsets[0], len(row_of)).fill_null(np.nan).to_numpy(zero_copy_only=False)
        codes = keys.indices.to_numpy(zero_copy_only=False)
        for code, name in enumerate(keys.dictionary.to_pylist()):
            found = items[(codes == code) & live & np.isfinite(items)]
            if len(found):
                yield name, found


# Thumbnails

def samples(path: Path, before: Path | None, reasons: set[str] | None, seed: int) -> list[dict[str, Any]]:
    """At most SHOWN rows with a file: that live, or that were dropped for one of `reasons` and lived in the manifest before."""
    chosen: list[tuple[bytes, int, dict]] = []
    wanted = SHOWN if reasons is None or before is None else 8 * SHOWN
    for batch in _batches(path, ["id", "path", "start_s", "end_s", "caption", "dropped"]):
        for name, file, start, end, caption, why in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if file and (why is None if reasons is None else why is not None and short(why) in reasons):
                rank = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
                item = (bytes(255 - byte for byte in rank), len(chosen), {"id": name, "path": file, "start_s": start, "end_s": end,
                                                                          "caption": caption, "dropped": why})
                if len(chosen) < wanted:
                    heapq.heappush(chosen, item)
                elif item[0] > chosen[0][0]:
                    heapq.heapreplace(chosen, item)
    rows = [item[2] for item in sorted(chosen, key=lambda item: item[0], reverse=True)]
    if reasons is not None and before is not None:
        names, old = {row["id"] for row in rows}, set()
        for batch in _batches(before, ["id", "dropped"]):
            old |= {name for name, why in zip(*(column.to_pylist() for column in batch.columns), strict=True)
                    if why is not None and name in names}
        rows = [row for row in rows if row["id"] not in old]
    return rows[:SHOWN]


def thumbnail(path: Path, at_s: float) -> str | None:
    """A picture of a video as a data URI; None where there is none to be had."""
    try:
        info = video.probe(path)
        width = max(round(info.shown_width * HEIGHT / info.shown_height / 2) * 2, 2)
        image = Image.fromarray(video.read_at(path, [at_s], HEIGHT, min(width, 4 * HEIGHT))[0])
    except (ValueError, OSError, ZeroDivisionError):
        return None
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"


# Terminal

def table(steps: list[Passed]) -> str:
    """The stages as a table of text, the reasons below."""
    rows = [["stage", "rows in", "hours in", "lost", "reformed", "new", "unused h", "rows out", "hours out", "kept"]]
    rows += [[step.stage.name, str(step.came[0]), _hours(step.came[1]), str(step.gone[0]),
              str(sum(count for count, _ in step.formed.values())), str(step.new), _hours(step.unused), str(step.went[0]),
              _hours(step.went[1]), _share(step)] for step in steps]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)) for row in rows]
    for step in steps:
        lines += [f"{step.stage.name}: {rows} {reason} ({_hours(seconds)} h)"
                  for reason, (rows, seconds) in [*step.lost.items(), *step.formed.items()]]
    return "\n".join(lines)


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    if abs(seconds) < 0.01:
        return "0"
    return f"{hours:.4f}" if abs(hours) < 0.1 else f"{hours:.2f}" if abs(hours) < 100 else f"{hours:.0f}"


def _share(step: Passed) -> str:
    return f"{1 - step.gone[0] / step.came[0]:.1%}" if step.came[0] else "-"


# Page

STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5b6470;--line:#d9dde2;--paper:#fff;--card:#f6f7f9;--kept:#2f7d5b;--lost:#c4602d;
--formed:#7a8aa0;--mark:#111}
@media(prefers-color-scheme:dark){:root{--ink:#e7eaee;--soft:#a2acb8;--line:#353c45;--paper:#14171a;--card:#1d2126;--kept:#58b78b;
--lost:#ec8d58;--formed:#8d9db3;--mark:#fff}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:auto;padding:1.5rem 1rem 4rem}h1{font-size:1.5rem;margin:0 0 .3rem}
h2{font-size:1.15rem;margin:2.6rem 0 .5rem}
h3{font-size:.95rem;margin:1.2rem 0 .4rem}p{margin:.3rem 0;color:var(--soft)}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600;color:var(--soft)}
td:first-child{min-width:9rem;white-space:normal}
.bar{display:flex;height:.8rem;min-width:9rem;background:var(--card)}.bar i{display:block}
.kept{background:var(--kept);fill:var(--kept)}.lost{background:var(--lost);fill:var(--lost)}
.formed{background:var(--formed);fill:var(--formed)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.8rem}figure{margin:0;background:var(--card);
padding:.6rem;border-radius:.4rem}figcaption{font-size:.85rem;color:var(--soft)}figcaption b{color:var(--ink)}
svg{display:block;width:100%;height:auto}.mark{stroke:var(--mark);stroke-width:1.5;stroke-dasharray:4 2}
.scale{display:flex;justify-content:space-between;font-size:.8rem;color:var(--soft)}
.thumbs{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem}.thumbs figure{padding:0;overflow:hidden}
.thumbs img,.thumbs .none{display:block;width:100%;height:5.6rem;object-fit:cover;background:var(--line)}
.thumbs figcaption{padding:.3rem .5rem;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--soft)}
pre{overflow-x:auto;background:var(--card);padding:.6rem;border-radius:.4rem;margin:.3rem 0}
.key span{margin-right:1.2rem;white-space:nowrap;display:inline-block}
.key i{display:inline-block;width:.8rem;height:.8rem;margin-right:.35rem;vertical-align:-.08rem}
"""


def page(stages: list[tuple[str, dict[str, Any], Path]], out: Path, folder: Path, thumbnails: bool = True, seed: int = 0) -> str:
    """Writes the page of (name, settings, manifest) in order; `folder` is where rows' paths start. Gives the terminal's table.

    Raises ValueError naming a manifest that cannot be read.
    """
    steps = passed([Stage(name, settings, Path(path)) for name, settings, path in stages])
    if not steps:
        raise ValueError(f"{folder}: no stage has been run")
    first, last = steps[0].came, steps[-1].went
    share = last[1] / first[1] if first[1] else 0.0
    parts = [f"<h1>What is left of {first[0]:,} clips</h1><p>{last[0]:,} clips and {_hours(last[1])} of {_hours(first[1])} hours "
             f"({share:.1%}) after {len(steps)} stages.</p>", _overview(steps)]
    for i, step in enumerate(steps):
        before = steps[i - 1].stage.path if i else None
        parts += [f"<h2>{i}. {html.escape(step.stage.name)}</h2>", _reasons(step), _spread(step, before)]
        if thumbnails and step.lost:
            parts.append(_thumbs("Dropped here", samples(step.stage.path, before, set(step.lost), seed), folder))
        if thumbnails and (step.lost or i == len(steps) - 1):
            parts.append(_thumbs("Kept", samples(step.stage.path, before, None, seed), folder))
        settings = html.escape(json.dumps(step.stage.settings, indent=1, default=str))
        parts.append(f"<details><summary>Settings</summary><pre>{settings}</pre></details>")
    text = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>Survival</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n")
    with video.renamed_when_whole(out) as part:
        part.write_text(text, encoding="utf-8")
    return table(steps)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of cells that are HTML; it scrolls where the page is narrow."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)] + ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _overview(steps: list[Passed]) -> str:
    """The table of stages, with bars of the rows that came in."""
    rows = []
    for step in steps:
        formed = sum(count for count, _ in step.formed.values())
        shares = (("kept", step.came[0] - step.gone[0] - formed), ("formed", formed), ("lost", step.gone[0]))
        bar = "".join(f'<i class="{kind}" style="width:{100 * count / max(step.came[0], 1):.2f}%"></i>' for kind, count in shares)
        rows.append((html.escape(step.stage.name), f"{step.came[0]:,}", _hours(step.came[1]), f"{step.gone[0]:,}", f"{formed:,}",
                     f"{step.new:,}", _hours(step.unused), f"{step.went[0]:,}", _hours(step.went[1]), _share(step),
                     f'<div class="bar">{bar}</div>'))
    head = ("stage", "rows in", "hours in", "lost", "joined, cut", "new", "unused hours", "rows out", "hours out", "kept", "")
    words = (("kept", "kept as they are"), ("formed", "joined or cut into new rows"), ("lost", "dropped"))
    key = "".join(f'<span><i class="{kind}"></i>{word}</span>' for kind, word in words)
    return (f'{_table(head, rows)}<p class="key">{key}</p>'
            f"<p>Unused hours: what rows that were joined or cut held and the new rows do not hold, overlaps among it.</p>")


def _reasons(step: Passed) -> str:
    reasons = [*step.lost.items(), *step.formed.items()]
    if not reasons:
        return "<p>Nothing was dropped.</p>"
    lines = [(html.escape(reason), f"{rows:,}", _hours(seconds), f"{rows / max(step.came[0], 1):.1%}")
             for reason, (rows, seconds) in reasons]
    return _table(("reason", "rows", "hours", "of rows in"), lines)


def _spread(step: Passed, before: Path | None) -> str:
    """Histograms: of what a filter bounds, over the rows that came to it; of all scores where they were computed."""
    keep = step.stage.settings.get("keep") or {}
    found = histograms(before, keep, True) if keep and before else []
    if step.stage.name.partition("-")[0] == "score":
        found = histograms(step.stage.path, {}, False)
    if not found:
        return ""
    rows = [(html.escape(each.name), f"{each.rows:,}", *(f"{value:.4g}" for value in each.quantiles),
             *("-" if bound is None else f"{bound:.4g}" for bound in each.bounds), f"{int(each.lost.sum()):,}") for each in found]
    numbers = _table(("score", "rows", "least", "5 %", "median", "95 %", "most", "kept from", "to", "outside"), rows)
    return (f'<h3>Scores</h3><div class="grid">{"".join(map(_figure, found))}</div>'
            f"<details><summary>Numbers</summary>{numbers}</details>")


def _figure(each: Histogram) -> str:
    """A histogram as SVG, 320 wide and 90 high, with its bounds drawn in."""
    tallest, wide = max(int((each.kept + each.lost).max()), 1), 320 / BINS
    bars = []
    for i, (kept, lost) in enumerate(zip(each.kept.tolist(), each.lost.tolist(), strict=True)):
        top = 90.0
        for kind, rows in (("kept", kept), ("lost", lost)):
            if rows:
                high = max(86 * rows / tallest, 0.8)
                top -= high
                bars.append(f'<rect class="{kind}" x="{i * wide:.1f}" y="{top:.1f}" width="{wide - 0.8:.1f}" height="{high:.1f}">'
                            f"<title>{each.edges[i]:.3g} to {each.edges[i + 1]:.3g}: {rows:,}</title></rect>")
    given = [bound for bound in each.bounds if bound is not None]
    places = [320 * (bound - each.edges[0]) / (each.edges[-1] - each.edges[0]) for bound in given]
    marks = "".join(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="90"/>' for x in places)
    wanted = [f"{word} {bound:g}" for word, bound in zip(("from", "to"), each.bounds, strict=True) if bound is not None]
    note = f", kept {' '.join(wanted)}: {int(each.lost.sum()):,} outside" if given else ""
    name = html.escape(each.name)
    return (f'<figure><svg viewBox="0 0 320 90" role="img" aria-label="Histogram of {name}">{"".join(bars)}{marks}</svg>'
            f'<div class="scale"><span>{each.edges[0]:.3g}</span><span>{each.edges[-1]:.3g}</span></div>'
            f"<figcaption><b>{name}</b>{note}</figcaption></figure>")


def _thumbs(title: str, rows: list[dict[str, Any]], folder: Path) -> str:
    if not rows:
        return ""
    figures = []
    for row in rows:
        start = row["start_s"] or 0.0
        middle = start if row["end_s"] is None else (start + row["end_s"]) / 2
        picture = thumbnail(folder / row["path"], middle) or thumbnail(folder / row["path"], start)
        caption = html.escape(row["dropped"] or (row["caption"] or "")[:80])
        image = f'<img alt="" src="{picture}">' if picture else '<span class="none"></span>'
        figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return f'<h3>{title}</h3><div class="thumbs">{"".join(figures)}</div>'


def of_run(folder: Path) -> list[tuple[str, dict[str, Any], Path]]:
    """The stages of a run's folder, by its run.json. Raises ValueError naming what is missing."""
    try:
        listed = json.loads((folder / "run.json").read_text())["stages"]
        return [(name, settings, folder / "stages" / f"{i:02d}-{name}.parquet") for i, (name, settings, _) in enumerate(listed)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: is not the folder of a run ({error})") from None


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.survival", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a run")
    parser.add_argument("--out", type=Path, help="the page; survival.html in the folder if not given")
    parser.add_argument("--no-thumbnails", dest="thumbnails", action="store_false", help="show no footage")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of thumbnails")
    args = parser.parse_args(argv)
    out = args.out or args.folder / "survival.html"
    print(page(of_run(args.folder), out, args.folder, args.thumbnails, args.seed))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
