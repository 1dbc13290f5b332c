"""What the licences of a set's clips allow: the ledger that is asked before pixels go into shards.

    python -m data_tools.licence MANIFEST.parquet [--allow SOURCE ...]

A clip's licence is the word in its row's column `licence`. The default refuses pixels that may not be passed on, or of which nobody
knows it, and licences that cannot be kept together in one set; `allow` names the sources or licences that the user has cleared.
It is a ledger of what the sources say of themselves (the pages of the data sets, creativecommons.org), not legal advice.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_tools import manifest
from latte.command import command


@dataclass(frozen=True)
class Terms:
    """What a licence says. None: it does not say, or nobody knows."""

    pass_on: bool | None  # may the pixels be given to others, cut and repaired?
    commercial: bool | None  # may they be used for gain?
    alike: str = ""  # what is made of them must be under this licence, share-alike
    credit: bool = True  # must their source be named?
    note: str = ""


# What ingest writes into the rows of a list that comes with no other licence
OF_LISTS = {"internvid": "CC-BY-NC-SA-4.0 (annotations)", "panda": "non-commercial research (Panda-70M, HD-VILA)",
            "openvid": "CC-BY-4.0, research", "koala": "non-commercial (Koala-36M)", "webvid": "withdrawn", "vript": "research",
            "mira0": "non-commercial (MiraData)", "mira1": "non-commercial (MiraData)", "hdvg": "academic (HD-VG-130M)"}
_OWNERS = "the videos stay their owners'"
UNKNOWN = Terms(None, None, note="no licence that the ledger knows")
LEDGER = {
    OF_LISTS["internvid"]: Terms(False, False, "CC-BY-NC-SA", note=f"the list alone; {_OWNERS}"),
    OF_LISTS["panda"]: Terms(False, False, note=_OWNERS),
    OF_LISTS["openvid"]: Terms(None, False, note="clips of other collections, whose terms it cannot change"),
    OF_LISTS["koala"]: Terms(False, False, note=_OWNERS),
    OF_LISTS["webvid"]: Terms(False, False, note="withdrawn in 2024 at its owners' wish"),
    OF_LISTS["vript"]: Terms(None, False, note="for research; of the videos it says nothing"),
    OF_LISTS["mira0"]: Terms(False, False, note=_OWNERS),
    OF_LISTS["hdvg"]: Terms(False, False, note=_OWNERS),
    "CC0": Terms(True, True, credit=False),
    "public domain": Terms(True, True, credit=False),
    "own": Terms(True, True, credit=False, note="made by whoever makes the set"),
    "CC-BY": Terms(True, True),
    "CC-BY-SA": Terms(True, True, "CC-BY-SA"),
    "CC-BY-NC": Terms(True, False),
    "CC-BY-NC-SA": Terms(True, False, "CC-BY-NC-SA"),
    "CC-BY-ND": Terms(False, True, note="only unchanged, and clips are cut"),
    "CC-BY-NC-ND": Terms(False, False, note="only unchanged, and clips are cut"),
    "MIT": Terms(True, True),
    "Apache-2.0": Terms(True, True),
    "BSD-3-Clause": Terms(True, True),
}
_FOLDED = {name.casefold(): terms for name, terms in LEDGER.items()}
Found = Mapping[tuple[str, str], int]  # (source, licence) -> clips


def terms(licence: str | None) -> Terms:
    """What a licence says: a name of LEDGER in any case, Creative Commons with any version ("CC BY-SA 3.0"), else UNKNOWN."""
    text = " ".join((licence or "").split()).casefold()
    if text in _FOLDED:
        return _FOLDED[text]
    common = re.fullmatch(r"(cc0|cc-by(?:-nc)?(?:-sa|-nd)?)(?:-\d\.\d)?(?:-(?:international|unported))?", text.replace(" ", "-"))
    return _FOLDED[common[1]] if common else UNKNOWN


def found(rows: list[manifest.Row]) -> Counter:
    """How many clips there are of each (source, licence)."""
    return Counter((row.get("source") or "", row.get("licence") or "") for row in rows)


def check(clips: Found, allow: Collection[str] = (), key: str = "allow") -> None:
    """Raises ValueError, naming the sources and the setting `key`, for pixels that may not be passed on and for licences that
    cannot be kept together. allow: sources or licences that the user has cleared; nothing is asked of them."""
    asked = {(source, licence): count for (source, licence), count in clips.items() if not {source, licence} & set(allow)}
    refused = {pair for pair in asked if not terms(pair[1]).pass_on}
    if refused:
        raise ValueError("pixels that may not be passed on, or of which nobody knows it, do not go into shards: "
                         f"{_told(refused, asked)}. Leave these sources out, give ingest the licence you hold, or, if you may pass "
                         f"them on or the shards stay with you, name them in {key}: [{_names(refused)}]")
    clashing = {pair for pair in asked if any(_clash(terms(pair[1]), terms(other[1])) for other in asked)}
    if clashing:
        raise ValueError(f"licences that cannot be kept together in one set: {_told(clashing, asked)}. Make a set of each, or "
                         f"name what you have cleared in {key}: [{_names(clashing)}]")


def _names(pairs: Collection[tuple[str, str]]) -> str:
    return ", ".join(sorted({source or licence for source, licence in pairs}))


def _told(pairs: Collection[tuple[str, str]], clips: Found) -> str:
    def told(source: str, licence: str) -> str:
        note, count = terms(licence).note, clips[source, licence]
        return f"{source or 'no source'} ({licence or 'no licence'}{note and f': {note}'}; {count} clip{'s' * (count != 1)})"

    return "; ".join(told(*pair) for pair in sorted(pairs))


def _clash(one: Terms, other: Terms) -> bool:
    """Whether a share-alike licence forbids what the other one demands: another share-alike, or no gain where gain must be free."""
    def against(one: Terms, other: Terms) -> bool:
        return bool(one.alike) and (other.alike not in ("", one.alike) or (bool(one.commercial) and other.commercial is False))

    return against(one, other) or against(other, one)


def table(clips: Found) -> str:
    """Markdown: what the licence of each source allows."""
    words = {True: "yes", False: "no", None: "not known"}
    names = ("source", "licence", "clips", "may be passed on", "for gain", "share alike", "name it", "note")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (source, licence), count in sorted(clips.items()):
        says = terms(licence)
        values = (source or "-", licence or "none given", f"{count:,}", words[says.pass_on], words[says.commercial],
                  says.alike or "-", words[says.credit], says.note or "-")
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.licence", description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path, help="its clips that are not dropped are looked at")
    parser.add_argument("--allow", nargs="*", default=[], metavar="SOURCE", help="sources or licences that you have cleared")
    args = parser.parse_args(argv)
    clips: Counter = Counter()
    for rows in manifest.batches(args.manifest):
        clips += found([row for row in rows if not row["dropped"]])
    print(table(clips))
    check(clips, args.allow, "--allow")
    return 0


if __name__ == "__main__":
    sys.exit(main())
