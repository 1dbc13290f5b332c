"""Captions of scenes by a grammar with many paraphrases, and the way back: from a caption to what it pins down.

A caption is a structure ("there is {a} that {does}.") filled with words. Structures and words come in two sets, one for
training and one that only the test split uses; the plain names of shapes, colours, sizes and turns belong to both. `parse`
reads both sets: it cuts a text into known phrases, longest first, and lets each one act on the object spoken of.
"""

import math
import re

import numpy as np

from latte.world.scene import (
    CAMERA_AMOUNTS,
    SPEEDS,
    SPLITS,
    Camera,
    Object,
    Phase,
    Scene,
    bounces,
    even_starts,
)

# What a phrase means -> (its phrases in training, those of the test split). "moves|moving" is a verb in its two forms.
SHAPE_WORDS = {
    "circle": (("circle", "disc"), ("filled circle", "round disk")),
    "square": (("square",), ("box", "square tile")),
    "triangle": (("triangle",), ("three-sided shape", "three-cornered shape")),
    "cross": (("cross", "plus sign"), ("plus shape", "plus symbol")),
    "ring": (("ring", "hoop"), ("annulus", "hollow circle")),
    "star": (("star", "five-pointed star"), ("star shape", "star with five points")),
}
COLOUR_WORDS = {
    "red": (("red",), ("scarlet", "ruby red")),
    "orange": (("orange",), ("tangerine", "bright orange")),
    "yellow": (("yellow",), ("lemon yellow", "canary yellow")),
    "green": (("green",), ("emerald", "grass-green")),
    "cyan": (("cyan",), ("turquoise", "aqua")),
    "blue": (("blue",), ("cobalt blue", "royal blue")),
    "purple": (("purple",), ("violet", "plum purple")),
    "white": (("white",), ("snow-white", "pure white")),
}
SIZE_WORDS = {
    "small": (("small", "little"), ("tiny", "petite")),
    "medium": (("medium",), ("mid-sized", "middle-sized")),
    "large": (("large", "big"), ("huge", "giant")),
}
DIRECTION_WORDS = {
    "right": (("right", "to the right", "rightwards", "towards the right", "from left to right"),
              ("rightward", "to the right-hand side", "in the direction of the right edge")),
    "left": (("left", "to the left", "leftwards", "towards the left", "from right to left"),
             ("leftward", "to the left-hand side", "in the direction of the left edge")),
    "up": (("up", "upwards", "towards the top", "straight up", "from bottom to top"),
           ("upward", "to the upper side", "in the direction of the top edge")),
    "down": (("down", "downwards", "towards the bottom", "straight down", "from top to bottom"),
             ("downward", "to the lower side", "in the direction of the bottom edge")),
    "up-right": (("up and to the right", "diagonally up and right", "towards the upper right", "to the top right"),
                 ("up-right", "upward to the right", "in the direction of the top right corner")),
    "up-left": (("up and to the left", "diagonally up and left", "towards the upper left", "to the top left"),
                ("up-left", "upward to the left", "in the direction of the top left corner")),
    "down-right": (("down and to the right", "diagonally down and right", "towards the lower right", "to the bottom right"),
                   ("down-right", "downward to the right", "in the direction of the bottom right corner")),
    "down-left": (("down and to the left", "diagonally down and left", "towards the lower left", "to the bottom left"),
                  ("down-left", "downward to the left", "in the direction of the bottom left corner")),
}
TURN_WORDS = {
    "clockwise": (("clockwise",), ("in the clockwise sense", "clockwise like a watch hand")),
    "counter-clockwise": (("counter-clockwise", "anticlockwise"), ("in the counter-clockwise sense", "against the clock")),
}
SPEED_WORDS = {
    "slow": (("slowly", "at a slow pace"), ("unhurriedly", "at low speed")),
    "fast": (("quickly", "fast", "at a quick pace"), ("swiftly", "at high speed")),
}
LINEAR_VERBS = (("moves|moving", "glides|gliding", "travels|travelling", "slides|sliding", "goes|going", "heads|heading"),
                ("sails|sailing", "advances|advancing", "floats|floating", "proceeds|proceeding"))
VERBS = {
    "circle": (("circles|circling", "moves in a circle|moving in a circle", "goes round and round|going round and round"),
               ("orbits|orbiting", "loops around|looping around", "follows a circular path|following a circular path")),
    "still": (("stays still|staying still", "does not move|not moving", "rests in place|resting in place"),
              ("remains motionless|remaining motionless", "keeps its place|keeping its place", "stays put|staying put")),
    "stop": (("stops|stopping", "comes to rest|coming to rest"),
             ("halts|halting", "comes to a standstill|coming to a standstill")),
    "go": (("moves on|moving on", "continues the same way|continuing the same way", "sets off again|setting off again"),
           ("carries on|carrying on", "resumes its way|resuming its way")),
    "pause": (("pauses from|pausing from",), ("takes a break between|taking a break between",)),
    "appear": (("appears|appearing", "comes into view|coming into view"), ("shows up|showing up", "emerges|emerging")),
    "vanish": (("vanishes|vanishing", "disappears|disappearing"),
               ("goes out of sight|going out of sight", "is gone|being gone")),
    "between": (("is only there from|being only there from",), ("exists only between|existing only between",)),
    "grow": (("grows|growing", "gets bigger|getting bigger"), ("becomes larger|becoming larger", "expands|expanding")),
    "shrink": (("shrinks|shrinking", "gets smaller|getting smaller"),
               ("becomes smaller|becoming smaller", "contracts|contracting")),
    "bounce": (("bounces off the edges|bouncing off the edges", "bounces back from the walls|bouncing back from the walls"),
               ("rebounds at the borders|rebounding at the borders",)),
}
STEADILY = (("all the time", "steadily"), ("throughout", "continually"))
CAMERA_WORDS = {
    "static": (("the camera is static", "the camera does not move", "the camera stays still"),
               ("the viewpoint is fixed", "the shot is locked off")),
    "pan-left": (("the camera pans left", "the camera pans to the left", "the camera moves left"),
                 ("the viewpoint sweeps to the left", "the shot is a leftward pan")),
    "pan-right": (("the camera pans right", "the camera pans to the right", "the camera moves right"),
                  ("the viewpoint sweeps to the right", "the shot is a rightward pan")),
    "tilt-up": (("the camera tilts up", "the camera tilts upwards", "the camera moves up"),
                ("the viewpoint sweeps to the top", "the shot is an upward tilt")),
    "tilt-down": (("the camera tilts down", "the camera tilts downwards", "the camera moves down"),
                  ("the viewpoint sweeps to the bottom", "the shot is a downward tilt")),
    "zoom-in": (("the camera zooms in", "the camera is zooming in", "the camera moves closer"),
                ("the viewpoint draws nearer", "the shot tightens")),
    "zoom-out": (("the camera zooms out", "the camera is zooming out", "the camera moves back"),
                 ("the viewpoint draws back", "the shot widens")),
    "shake": (("the camera shakes", "the camera is shaking", "the camera is unsteady"),
              ("the viewpoint trembles", "the shot is handheld and wobbly")),
}
EMPTY_WORDS = (("an empty scene", "no objects at all", "nothing but the background"),
               ("a vacant stage", "the picture contains no object"))
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNT_WORDS = (("{} objects.", "there are {} objects.", "{} shapes."), ("the cast has {} members.", "{} figures in all."))
HALF_WORDS = (("halfway through",), ("at the midpoint",))
TIME_WORDS = (("at {} seconds", "after {} seconds", "{} seconds in"), ("at the {} second mark", "once {} seconds have passed"))
BACKGROUND_WORDS = (("the background is grey.", "behind lies a dark textured background."),
                    ("a cloudy grey backdrop fills the rest.",))
ORDERS = {2: (("first {}, then {}", "{} and then {}", "{}, then {}"),
              ("to begin with {}, afterwards {}", "initially {}, later {}")),
          3: (("first {}, then {}, and finally {}", "{}, then {}, then {}", "{}, then {} and at last {}"),
              ("to begin with {}, afterwards {}, in the end {}", "initially {}, later {}, ultimately {}"))}
# {a}: "a small red circle", {n}: the same without article, {does} and {doing}: what it does, in the verb's two forms.
STRUCTURES = (
    (
        "{a} {does}.", "{a} {doing}.", "{n} {doing}.", "one {n} {does}.", "the {n} {does}.", "{a} is seen {doing}.",
        "there is {a} {doing}.", "there is {a} that {does}.", "there is {a}. it {does}.", "{a}. it {does}.",
        "{a} which {does}.", "we see {a} {doing}.", "we see how {a} {does}.", "you can see {a} {doing}.",
        "watch {a} {doing}.", "here {a} {does}.", "a video of {a} {doing}.", "a video of {a} that {does}.",
        "a clip in which {a} {does}.", "a short film about {a} {doing}.", "in this video, {a} {does}.",
        "in the picture, {a} {does}.", "on the screen, {a} {does}.", "in the scene {a} {does}.",
        "this clip shows {a} {doing}.", "the video shows how {a} {does}.", "the scene has {a} that {does}.", "{doing}: {a}.",
        "{doing}, {a} is on the screen.", "a {shape} {does}. it is {size} and {colour}.",
        "a {colour} {shape} {does}. it is {size}.", "a {size} {shape} {does}. its colour is {colour}.",
        "a {size} {shape} of {colour} colour {does}.", "a {shape}, {size} and {colour}, {does}.",
        "a {colour} {shape} of {size} size {does}.", "a {colour}, {size} {shape} {does}.",
        "a {shape} that is {colour} and {size} {does}.", "something {size} and {colour} {does}: a {shape}.",
        "an object {does}. it is a {size} {colour} {shape}.", "{size}, {colour}, {shape}: it {does}.",
    ),
    (
        "imagine {a} that {does}.", "picture {a} as it {does}.", "behold {a}, which {does}.",
        "an animation where {a} {does}.", "the footage contains {a} and it {does}.", "you are looking at {a} {doing}.",
        "{a} can be observed {doing}.", "the subject is {a}. during the recording it {does}.", "{doing} is what {a} does.",
        "in front of us {a} {does}.", "a {shape} {does}, {colour} in colour and {size} in size.",
        "its shape: {shape}, its colour: {colour}, its size: {size}, it {does}.",
        "with {colour} as its colour, a {size} {shape} {does}.",
        "the thing that {does} is a {colour} {shape}, {size} of format.",
    ),
)
NOUNS = {"shape": SHAPE_WORDS, "colour": COLOUR_WORDS, "size": SIZE_WORDS}
# Words that say nothing of the scene, and spellings, that `parse` takes from people although the grammar does not use them.
EXTRA_FILLERS = ("an and are be has with moving across frame sized coloured against over while move travel go glide slide head "
                 "drift drifts drifting fly flies flying run runs running object")
HINT = "say for example 'a small red circle moves right'"
SPELLINGS = {"toward": "towards", "color": "colour", "colored": "coloured", "gray": "grey", "traveling": "travelling",
             "counterclockwise": "counter clockwise"}


def caption(scene: Scene, rng: np.random.Generator, split: str = "train") -> str:
    """A true caption of a scene: every object with its shape, colour, size and motion, and the camera unless it is static.

    Speeds, a static camera, counts, bounces and the background are told now and then; starts and amounts are not told.
    split "test" draws structures and words that "train" never uses.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return _Writer(scene, rng, SPLITS.index(split)).text()


class _Writer:
    def __init__(self, scene: Scene, rng: np.random.Generator, split: int):
        self.scene, self.rng, self.split = scene, rng, split

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def word(self, words) -> str:
        """One of the phrases of this split."""
        return self.pick(words[self.split])

    def noun(self, kind: str, name: str) -> str:
        """A word for a shape, colour or size: half of the time the plain name, which both splits share."""
        return name if self.chance(0.5) else self.word(NOUNS[kind][name])

    def verb(self, words, form: int) -> str:
        return self.word(words).split("|")[form]

    def text(self) -> str:
        count = len(self.scene.objects)
        if count == 0:
            parts = [self.word(EMPTY_WORDS) + "."]
        elif count > 1 and self.split == 0 and self.chance(0.25):
            parts = [" while ".join(f"{self.phrase(o)} {self.predicate(o, 0)}" for o in self.scene.objects) + "."]
        else:
            parts = [self.sentence(o) for o in self.scene.objects]
        if count > 1 and self.chance(0.3):
            parts.insert(0, self.word(COUNT_WORDS).format(COUNTS[count]))
        camera = self.scene.camera.kind
        if camera != "static" or self.chance(0.2):
            told = self.word(CAMERA_WORDS[camera])
            if self.split == 0 and self.chance(0.3):
                parts[-1] = f"{parts[-1][:-1]} while {told}."
            else:
                parts.insert(0 if self.chance(0.3) else len(parts), told + ".")
        if self.chance(0.15):
            parts.append(self.word(BACKGROUND_WORDS))
        text = re.sub(r"\ba (?=[aeiou])", "an ", " ".join(parts))
        return re.sub(r"(^|\. )([a-z])", lambda m: m[1] + m[2].upper(), text)

    def sentence(self, obj: Object) -> str:
        """One object in one of the structures."""
        structure = self.pick(STRUCTURES[self.split])
        phrase = self.phrase(obj)
        form = 1 if "{doing}" in structure else 0
        slots = {"does": self.predicate(obj, form), "a": phrase, "n": phrase.removeprefix("a ")}
        slots |= {"doing": slots["does"]} | {kind: self.noun(kind, getattr(obj, kind)) for kind in NOUNS}
        return structure.format(**slots)

    def phrase(self, obj: Object) -> str:
        return f"a {self.noun('size', obj.size)} {self.noun('colour', obj.colour)} {self.noun('shape', obj.shape)}"

    def moment(self, seconds: float) -> str:
        if seconds == self.scene.seconds / 2 and self.chance(0.5):
            return self.word(HALF_WORDS)
        return self.word(TIME_WORDS).format(f"{seconds:g}")

    def timed(self, event: str, seconds: float) -> str:
        moment = self.moment(seconds)
        return f"{event} {moment}" if moment.endswith(" in") or self.chance(0.7) else f"{moment} {event}"

    def predicate(self, obj: Object, form: int) -> str:
        """All that an object does; form 0 = finite verbs, 1 = participles."""
        core = self.motions(obj, form)
        seen, gone = obj.appear_s > 0, obj.vanish_s < self.scene.seconds
        if seen and gone and self.chance(0.4):
            link = " to " if self.split == 0 else " and "
            core += f" and {self.verb(VERBS['between'], form)} {obj.appear_s:g}{link}{obj.vanish_s:g} seconds"
        else:
            if seen:
                core = f"{self.verb(VERBS['appear'], form)} {self.moment(obj.appear_s)} and {core}"
            if gone:
                core += f" and {self.verb(VERBS['vanish'], form)} {self.moment(obj.vanish_s)}"
        if obj.growth != "none":
            core = f"{self.verb(VERBS[obj.growth], form)} {self.word(STEADILY)} and {core}"
        if len(obj.phases) == 1 and self.chance(0.2) and bounces(obj, self.scene):
            core += f" and {self.verb(VERBS['bounce'], form)}"
        return core

    def motions(self, obj: Object, form: int) -> str:
        phases = obj.phases
        speeds = {p.speed for p in phases if p.motion != "still"}
        names = [name for name, speed in SPEEDS.items() if speeds == {speed}]
        speed = " " + self.word(SPEED_WORDS[names[0]]) if names and self.chance(0.5) else ""
        parts = []
        for i, phase in enumerate(phases):
            if phase.motion == "still":
                verb = "stop" if i and self.chance(0.6) else "still"
                parts.append(self.verb(VERBS[verb], form))
            elif phase.motion == "circle":
                parts.append(f"{self.verb(VERBS['circle'], form)} {self.word(TURN_WORDS[phase.direction])}{speed}")
                speed = ""
            elif i > 1 and phases[i - 1].motion == "still" and phase.direction == phases[i - 2].direction and self.chance(0.6):
                parts.append(self.verb(VERBS["go"], form))  # on in the direction it had before it stopped
            else:
                parts.append(f"{self.verb(LINEAR_VERBS, form)} {self.word(DIRECTION_WORDS[phase.direction])}{speed}")
                speed = ""
        if len(parts) == 1:
            return parts[0]
        starts = [p.start_s for p in phases]
        paused = [p.motion for p in phases] == ["linear", "still", "linear"] and phases[0].direction == phases[2].direction
        if paused and self.chance(0.4):
            link = " to " if self.split == 0 else " and "
            return f"{parts[0]} and {self.verb(VERBS['pause'], form)} {starts[1]:g}{link}{starts[2]:g} seconds"
        if starts != even_starts(len(starts), self.scene.seconds) or self.chance(0.5):
            parts[1:] = [self.timed(part, start_s) for part, start_s in zip(parts[1:], starts[1:], strict=True)]
        return self.word(ORDERS[len(parts)]).format(*parts)


# ---- the way back


def _key(phrase: str) -> tuple[str, ...]:
    return tuple(phrase.replace("-", " ").split())


def _lexicon() -> dict[tuple[str, ...], tuple[str, object]]:
    """Every known phrase, as its words -> (kind of act, value); kind "filler" does nothing."""
    known: dict[tuple[str, ...], tuple[str, object]] = {}

    def add(phrase: str, kind: str, value=None) -> None:
        act = known.setdefault(_key(phrase), (kind, value))
        assert act == (kind, value), f"{phrase!r} means both {act} and {(kind, value)}"

    for kind, table in (("shape", SHAPE_WORDS), ("colour", COLOUR_WORDS), ("size", SIZE_WORDS), ("linear", DIRECTION_WORDS),
                        ("turn", TURN_WORDS), ("speed", SPEED_WORDS), ("camera", CAMERA_WORDS)):
        for name, (train, test) in table.items():
            for phrase in (*train, *test):
                add(phrase, kind, name)
    for verb, (train, test) in VERBS.items():
        for form in "|".join(train + test).split("|"):
            add(form, verb)
    for phrase in (*EMPTY_WORDS[0], *EMPTY_WORDS[1]):
        add(phrase, "empty")
    for phrase in (*HALF_WORDS[0], *HALF_WORDS[1]):
        add(phrase, "half")
    for phrase in ("in a circle", "in circles"):
        add(phrase, "circle")
    for phrase in ("an object", "something", "the thing"):
        add(phrase, "object")
    for number, name in enumerate(COUNTS):
        for phrase in (*COUNT_WORDS[0], *COUNT_WORDS[1]):
            add(phrase.format(name).strip("."), "count", number)
    words = EXTRA_FILLERS.split()
    for train, test in (LINEAR_VERBS, STEADILY, TIME_WORDS, BACKGROUND_WORDS, STRUCTURES, *ORDERS.values()):
        words += re.sub(r"\{\w*\}|[^a-z ]", " ", " ".join(train + test).replace("|", " ")).split()
    for word in words:
        if (word,) not in known:
            add(word, "filler")
    return known


LEXICON = _lexicon()
LONGEST = max(len(key) for key in LEXICON)


def parse(text: str, seconds: float = 16.0, aspect: float = 1.0) -> Scene:
    """The scene that a caption describes, with what the caption leaves open filled in so:

    starts in the middle, speed 0 = any, phases without times evenly long, a camera that is not told static, camera amounts
    in the middle of their range, background 0. ValueError says what a text lacks, or which of its words are unknown.
    """
    text = re.sub(r"[a-z]+", lambda m: SPELLINGS.get(m[0], m[0]), text.lower().replace("-", " "))
    sentences = [_acts(s) for s in re.split(r"[.!?;](?:\s|$)", text)]
    unknown = [value for sentence in sentences for kind, value in sentence if kind == "unknown"]
    if unknown:
        raise ValueError(f"unknown words in the caption: {', '.join(map(repr, unknown))}")
    told: dict[str, object] = {}
    drafts: list[_Draft] = []
    for sentence in sentences:
        told |= {kind: value for kind, value in sentence if kind in ("camera", "count", "empty")}
        acts = [act for act in sentence if act[0] not in told]
        # what is told before an object is named ("moving right, a red ...") belongs to that object
        first = next((i for i, (kind, _) in enumerate(acts) if kind in (*NOUNS, "object")), None)
        if first is not None:
            acts.insert(0, acts.pop(first))
        for kind, value in acts:
            if kind in (*NOUNS, "object") and (not drafts or drafts[-1].knows(kind)):
                drafts.append(_Draft())
            if not drafts:
                raise ValueError(f"the caption names no object before {value or kind!r}: {HINT}")
            drafts[-1].act(kind, value, seconds)
    if not drafts and "empty" not in told:
        raise ValueError(f"the caption names no object: {HINT}, or 'an empty scene'")
    if told.get("count", len(drafts)) != len(drafts):
        raise ValueError(f"the caption counts {told['count']} objects and describes {len(drafts)}")
    kind = told.get("camera", "static")
    camera = Camera(kind, sum(CAMERA_AMOUNTS[kind.split("-")[0]]) / 2)
    return Scene(tuple(d.finish(seconds, aspect) for d in drafts), camera, 0, seconds, aspect)


def _acts(sentence: str) -> list[tuple[str, object]]:
    """A sentence cut into known phrases, the longest first; unknown words stay as such."""
    acts = []
    words = re.findall(r"\d+(?:\.\d+)?|[^\W\d]+(?:'[a-z]+)?|\S", sentence)
    i = 0
    while i < len(words):
        for n in range(min(LONGEST, len(words) - i), 0, -1):
            known = LEXICON.get(tuple(words[i:i + n]))
            if known:
                break
        if known:
            acts.append(known)
        elif words[i][0].isdigit():
            acts.append(("time", float(words[i])))
        elif words[i] not in ",:":
            acts.append(("unknown", words[i]))
        i += n
    return [act for act in acts if act[0] not in ("filler", "bounce")]


class _Draft:
    """An object while its caption is read."""

    def __init__(self):
        self.shape = self.colour = self.size = self.last = ""
        self.growth, self.speed = "none", 0.0
        self.phases: list[list[str]] = []  # [motion, direction]
        self.events: list[int | str] = []  # what needs a time: a phase's index, "appear" or "vanish"
        self.times: list[float] = []

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape)))

    def knows(self, kind: str) -> bool:
        """Whether this act must speak of another object, as this one already has what it tells."""
        return all(getattr(self, k) for k in NOUNS) if kind == "object" else bool(getattr(self, kind))

    def act(self, kind: str, value, seconds: float) -> None:
        if kind in NOUNS:
            setattr(self, kind, value)
        elif kind in ("time", "half"):
            self.times.append(seconds / 2 if kind == "half" else value)
        elif kind == "speed":
            self.speed = SPEEDS[value]
        elif kind in ("grow", "shrink"):
            self.growth = kind
        elif kind in ("appear", "vanish", "between"):
            self.events += ["appear", "vanish"] if kind == "between" else [kind]
        elif kind in ("still", "stop"):
            self.begin("still", "")
        elif kind == "circle":
            if self.last != "turn":
                self.begin("circle", "")
        elif kind == "turn":
            if self.last == "circle":
                self.phases[-1][1] = value
                kind = "circle, turn"
            else:
                self.begin("circle", value)
        elif kind == "linear":
            if (self.last, self.phases[-1:]) != ("go", [["linear", value]]):  # "moves on to the right" is one phase
                self.begin("linear", value)
        elif kind in ("go", "pause"):
            ways = [direction for motion, direction in self.phases if motion == "linear"]
            if not ways:
                raise ValueError(f"the {self} moves on, but the caption tells no direction before that")
            if kind == "pause":
                self.begin("still", "")
            self.begin("linear", ways[-1])
        self.last = kind

    def begin(self, motion: str, direction: str) -> None:
        if self.phases:
            self.events.append(len(self.phases))
        self.phases.append([motion, direction])

    def finish(self, seconds: float, aspect: float) -> Object:
        for kind, table in NOUNS.items():
            if not getattr(self, kind):
                raise ValueError(f"the {self} has no {kind}: say one of {', '.join(table)}")
        if not self.phases:
            raise ValueError(f"the {self} has no motion: say for example 'moves to the right' or 'stays still'")
        if ["circle", ""] in self.phases:
            raise ValueError(f"the {self} circles: say clockwise or counter-clockwise")
        events = self.events
        if len(self.times) < len(events):  # phases may come without times, evenly long
            events = [e for e in events if isinstance(e, str)]
        if len(self.times) != len(events):
            raise ValueError(f"the {self} has {len(self.times)} times for {len(self.events)} events: say one for each")
        when = dict(zip(events, self.times, strict=True))
        appear, vanish = when.get("appear", 0.0), when.get("vanish", math.inf)
        even = even_starts(len(self.phases), min(vanish, seconds) - appear)
        starts = [appear, *(when.get(i, appear + even[i]) for i in range(1, len(even)))]
        order = [*starts, vanish if vanish < math.inf else seconds]
        if sorted(set(order)) != order or order[-1] > seconds:
            raise ValueError(f"the {self} needs times that rise from 0 to {seconds:g} seconds, got {self.times}")
        phases = tuple(Phase(start_s, motion, direction, 0.0 if motion == "still" else self.speed)
                       for start_s, (motion, direction) in zip(starts, self.phases, strict=True))
        return Object(self.shape, self.colour, self.size, (aspect / 2, 0.5), phases, appear, vanish, self.growth)
