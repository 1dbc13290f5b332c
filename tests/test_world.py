"""The embedded world: kinematics, sampling, rendering and captions against the truth that a scene states."""

import itertools
import math
import re
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest

from latte import keyed
from latte.config import WorldConfig
from latte.world import caption as captions
from latte.world.caption import STRUCTURES, caption, parse
from latte.world.render import GREY, OCTAVES, TINT, coverage, render
from latte.world.scene import (
    CAMERA_AMOUNTS,
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    GROWTH_FACTOR,
    MIN_LEG,
    ORBIT,
    RADII,
    RGB,
    SHAPES,
    SIZES,
    SPEEDS,
    SPLITS,
    TURNS,
    Camera,
    Object,
    Phase,
    Scene,
    bounces,
    centres,
    even_starts,
    heading,
    held_out,
    on_screen,
    radii,
    sample_scene,
    stage,
    visible,
)

TIMES = np.arange(128) / 8
ONE = {"min_objects": 1, "max_objects": 1, "motions": ["linear"], "visibility": False, "growth": False, "cameras": ["static"]}
WORLDS = {"one": WorldConfig(**ONE), "whole": WorldConfig(), "full": WorldConfig(min_objects=3)}


REST = (Phase(0.0, "still"),)


def thing(shape="circle", colour="red", size="small", start=(0.5, 0.5), phases=REST, **more) -> Object:
    return Object(shape, colour, size, start, tuple(phases), **more)


@pytest.fixture(scope="module")
def scenes() -> dict[tuple[str, str], list[Scene]]:
    return {(name, split): [sample_scene(keyed.rng(1, "scene", name, i), cfg, split) for i in range(300)]
            for name, cfg in WORLDS.items() for split in SPLITS}


# ---- kinematics


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_linear_motion_is_a_straight_line_that_bounces(direction):
    obj = thing(start=(0.513, 0.487), phases=[Phase(0.0, "linear", direction, 0.1)])
    path = centres(obj, Scene((obj,)), TIMES)
    # no wall within 3 s of the start; after that each component of the velocity keeps its size, and a bounce turns it round
    np.testing.assert_allclose(path[:24], obj.start + heading(direction) * 0.1 * TIMES[:24, None], atol=1e-12)
    turning = np.abs(np.abs(np.diff(path, axis=0)) - np.abs(heading(direction)) * 0.1 / 8) > 1e-9
    assert turning.sum() == bounces(obj, Scene((obj,))) > 0
    assert path.min() >= RADII["small"] - 1e-9 and path.max() <= 1 - RADII["small"] + 1e-9


@pytest.mark.parametrize("turn", TURNS)
def test_circling_keeps_radius_speed_and_sense(turn):
    obj = thing(start=(0.3, 0.6), phases=[Phase(0.0, "circle", turn, 0.1)])
    fine = np.arange(0, 2 * math.pi * ORBIT / 0.1, 0.01)  # one turn
    path = centres(obj, Scene((obj,)), fine)
    middle = path.mean(0)
    np.testing.assert_allclose(np.linalg.norm(path - middle, axis=1), ORBIT, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(np.diff(path, axis=0), axis=1) / 0.01, 0.1, atol=1e-4)
    arm, step = (path - middle)[:-1], np.diff(path, axis=0)
    cross = arm[:, 0] * step[:, 1] - arm[:, 1] * step[:, 0]
    assert ((cross > 0) if turn == "clockwise" else (cross < 0)).all()  # y points down


def test_phases_follow_one_another_without_a_jump(scenes):
    fine = np.arange(0, 16, 1 / 64)
    for scene in scenes["full", "train"][:100]:
        for obj in scene.objects:
            fastest = max(p.speed for p in obj.phases)
            step = np.linalg.norm(np.diff(centres(obj, scene, fine), axis=0), axis=1)
            assert step.max() <= fastest / 64 + 1e-9
            for phase, following in itertools.pairwise([*obj.phases, Phase(16.0, "still")]):
                if phase.motion == "still":
                    during = (fine[1:] < following.start_s) & (fine[:-1] >= phase.start_s)
                    assert step[during].max() == 0


def test_position_is_a_function_of_time_alone():
    phases = Phase(0.0, "linear", "up", 0.1), Phase(5.0, "circle", "clockwise", 0.1), Phase(9.0, "still")
    obj = thing(start=(0.3, 0.4), phases=phases)
    scene = Scene((obj,), Camera("shake", 0.03, 5))
    whole = on_screen(obj, scene, TIMES)[0]
    for order in (TIMES[::-1], TIMES[[77, 3]], TIMES[100:]):
        np.testing.assert_allclose(on_screen(obj, scene, order)[0], whole[np.rint(order * 8).astype(int)], atol=1e-12)


def test_growth_and_visibility():
    obj = thing(growth="grow", appear_s=3.0, vanish_s=9.0)
    np.testing.assert_allclose(radii(obj, [0.0, 8.0, 16.0], 16.0), 0.08 * np.array([1, (1 + GROWTH_FACTOR["grow"]) / 2, 1.5]))
    assert visible(obj, [2.99, 3.0, 8.99, 9.0]).tolist() == [False, True, True, False]


@pytest.mark.parametrize("kind", CAMERAS)
def test_camera_moves_the_view_and_the_stage_stays_in_it(kind):
    amount = CAMERA_AMOUNTS[kind.split("-")[0]][1]
    camera, aspect = Camera(kind, amount, 3), 1.5
    x, y, zoom = camera.view(np.linspace(0, 16, 500), 16.0).T
    travel = {"pan-right": (x, amount), "pan-left": (x, -amount), "tilt-down": (y, amount), "tilt-up": (y, -amount)}
    if kind in travel:
        moved, total = travel[kind]
        assert math.isclose(moved[-1] - moved[0], total)
    if kind.startswith("zoom"):
        assert math.isclose(zoom[-1] / zoom[0], amount if kind == "zoom-in" else 1 / amount)
    if kind == "shake":
        assert 0.3 * amount < np.abs(x).max() <= amount and np.abs(np.diff(x)).max() < amount / 2
    low, high = stage(camera, aspect)
    tightest_low, tightest_high = np.array([-9.0, -9.0]), np.array([9.0, 9.0])
    for at_x, at_y, m in zip(x, y, zoom, strict=True):
        half, middle = np.array([aspect, 1]) / 2 / m, np.array([aspect / 2 + at_x, 0.5 + at_y])
        tightest_low, tightest_high = np.maximum(tightest_low, middle - half), np.minimum(tightest_high, middle + half)
    assert (low >= tightest_low - 1e-9).all() and (high <= tightest_high + 1e-9).all()
    assert kind == "shake" or np.allclose((low, high), (tightest_low, tightest_high))


def test_zooms_leave_sizes_in_their_class():
    edges = np.sqrt([RADII["small"] * RADII["medium"], RADII["medium"] * RADII["large"]])
    for kind, (i, size) in itertools.product(("zoom-in", "zoom-out"), enumerate(SIZES)):
        obj = thing(size=size)
        shown = on_screen(obj, Scene((obj,), Camera(kind, CAMERA_AMOUNTS["zoom"][1])), TIMES)[1]
        assert (np.searchsorted(edges, shown) == i).all()


# ---- sampling


def test_objects_stay_in_the_frame_and_clear_of_each_other(scenes):
    touching = total = 0
    for cfg, split in scenes:
        for scene in scenes[cfg, split]:
            spots = [(*on_screen(o, scene, TIMES), visible(o, TIMES)) for o in scene.objects]
            for centre, radius, seen in spots:
                assert (centre - radius[:, None])[seen].min() > -1e-9 and (centre + radius[:, None])[seen].max() < 1 + 1e-9
            total += len(spots) > 1
            touching += any((np.linalg.norm(a[0] - b[0], axis=1) < a[1] + b[1])[a[2] & b[2]].any()
                            for a, b in itertools.combinations(spots, 2))
    assert total > 600 and touching <= 0.005 * total


def test_scenes_are_legible(scenes):
    for (name, _), drawn in scenes.items():
        for scene in drawn:
            assert len({o.colour for o in scene.objects}) == len(scene.objects)
            for obj in scene.objects:
                assert obj.phases[0].start_s == obj.appear_s
                assert bounces(obj, scene) <= 8
                first, second = [*obj.phases, Phase(min(obj.vanish_s, 16.0), "still")][:2]
                if first.motion == "linear":
                    leg = min(MIN_LEG, first.speed * (second.start_s - first.start_s))
                    after = centres(obj, scene, np.array([first.start_s + leg / first.speed]))[0]
                    np.testing.assert_allclose(after, np.array(obj.start) + heading(first.direction) * leg, atol=1e-9)
        if name == "one":
            assert {(o.shape, o.size) for s in drawn for o in s.objects} == set(itertools.product(SHAPES, SIZES))
            assert {o.phases[0].direction for s in drawn for o in s.objects} == set(DIRECTIONS)
            assert {o.colour for s in drawn for o in s.objects} == set(COLOURS)
        if name == "whole":
            assert {len(s.objects) for s in drawn} == {0, 1, 2, 3} and {s.camera.kind for s in drawn} == set(CAMERAS)


def test_splits_share_no_combination_but_every_value(scenes):
    for cfg in WORLDS:
        assert not any(held_out(o) for s in scenes[cfg, "train"] for o in s.objects)
        assert all(any(map(held_out, s.objects)) for s in scenes[cfg, "test"] if s.objects)
    looks = list(itertools.product(SHAPES, COLOURS, SIZES, DIRECTIONS))
    kept = [held_out(thing(a, b, c, phases=[Phase(0.0, "linear", d, 0.1)])) for a, b, c, d in looks]
    assert 0.07 < np.mean(kept) < 0.13
    for i, j in itertools.combinations(range(4), 2):  # even every pair of values is in both splits
        pairs = [{(look[i], look[j]) for look, out in zip(looks, kept, strict=True) if out == side} for side in (True, False)]
        assert len(pairs[1]) == len(pairs[0] | pairs[1])


def test_scene_depends_on_its_generator_alone():
    first, again, other = (sample_scene(keyed.rng(7, "s", i), WORLDS["full"]) for i in (1, 1, 2))
    assert first == again != other


def test_many_objects_and_other_shapes_of_clip():
    crowd = WorldConfig(min_objects=9, max_objects=9)
    for split in SPLITS:
        scene = sample_scene(keyed.rng(2, split), crowd, split)
        assert len({(o.colour, o.shape) for o in scene.objects}) == 9 and len({o.colour for o in scene.objects}) == 8
    still = WorldConfig(**{**ONE, "min_objects": 7, "max_objects": 7, "motions": ["still"]})
    assert len(sample_scene(keyed.rng(3), still, "test").objects) == 7  # few combinations, yet a held-out one is found
    wide = sample_scene(keyed.rng(4), WORLDS["full"], seconds=4.0, aspect=16 / 9)
    for obj in wide.objects:
        centre, radius = on_screen(obj, wide, np.linspace(0, 4, 50))
        assert (centre[:, 0] + radius).max() <= 16 / 9 and all(p.start_s < 4 for p in obj.phases)
    one_look = WorldConfig(**{**ONE, "speeds": ["fast"], "backgrounds": 1})
    for i in range(5):
        scene = sample_scene(keyed.rng(i), one_look)
        assert scene.background == 0 and scene.objects[0].phases[0].speed == SPEEDS["fast"]


@pytest.mark.parametrize("key", ["motions", "cameras", "speeds"])
def test_unknown_settings_are_refused_by_name(key):
    for value in (["sideways"], []):
        with pytest.raises(ValueError, match=rf"data\.world\.{key}"):
            sample_scene(keyed.rng(0), WorldConfig(**{key: value}))
    with pytest.raises(ValueError, match="split"):
        sample_scene(keyed.rng(0), WorldConfig(), "validation")


# ---- rendering


def lab(rgb) -> np.ndarray:
    return cv2.cvtColor(np.array(rgb, np.float32).reshape(-1, 1, 3) / 255, cv2.COLOR_RGB2LAB)[:, 0]


def test_colours_are_far_apart_and_far_from_the_background():
    swing = sum(strength for _, strength in OCTAVES)
    greys = lab([TINT + np.float32(level) for level in np.arange(GREY - swing, GREY + swing + 1)])
    colours = lab([RGB[name] for name in COLOURS])
    apart = np.linalg.norm(colours[:, None] - np.concatenate([colours, greys]), axis=-1)
    assert apart[apart > 0].min() >= 25


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 64])
def test_shapes_have_their_centre_and_area_to_a_fraction_of_a_pixel(shape, size):
    areas = {"circle": math.pi * 0.86**2, "square": 2, "triangle": 0.75 * math.sqrt(3), "cross": 4 * 0.95 * 0.62 - 0.62**2,
             "ring": math.pi * (0.94**2 - 0.53**2), "star": 5 * 0.46 * math.sin(math.pi / 5)}
    rng = keyed.rng(0, "area", shape, size)
    pixels = np.arange(size) + 0.5
    for radius in size * np.array(list(RADII.values())):
        for x, y in rng.uniform(0.3 * size, 0.7 * size, (20, 2)):
            alpha = coverage(shape, pixels - x, (pixels - y)[:, None], radius)
            assert alpha.min() >= 0 and alpha.max() <= 1
            assert abs(alpha.sum() / radius**2 / areas[shape] - 1) < 0.12  # tips thinner than a pixel are not exact
            assert abs((alpha * pixels).sum() / alpha.sum() - x) < 0.1
            assert abs((alpha * pixels[:, None]).sum() / alpha.sum() - y) < 0.25


@pytest.mark.parametrize(("size", "share"), [(64, 1.0), (32, 0.99)])
def test_small_shapes_can_be_told_apart(size, share):
    """The nearest of templates at quarter-pixel offsets is the right shape, wherever between pixels the shape lies."""
    pixels, radius = np.arange(-8, 9), RADII["small"] * size

    def mask(shape, x, y):
        return coverage(shape, pixels - x, (pixels - y)[:, None], radius).ravel()

    steps = np.arange(-2, 2) / 4
    templates = np.array([[mask(s, x, y) for x in steps for y in steps] for s in SHAPES])
    rng = keyed.rng(0, "apart")
    right = [np.square(templates - mask(s, *rng.uniform(-0.5, 0.5, 2))).sum(-1).min(-1).argmin() == i
             for i, s in enumerate(SHAPES) for _ in range(50)]
    assert np.mean(right) >= share


def test_objects_are_drawn_where_the_scene_says(scenes):
    for scene in scenes["full", "train"][:12]:
        height, width = 64, 96
        scene = replace(scene, aspect=1.5)
        empty = render(replace(scene, objects=()), height, width, TIMES[::9])
        for obj in scene.objects:
            alone = render(replace(scene, objects=(obj,)), height, width, TIMES[::9])
            centre, _ = on_screen(obj, scene, TIMES[::9])
            seen = visible(obj, TIMES[::9])
            moved = alone.astype(float) - empty
            assert not moved[~seen].any()
            paint = np.array(RGB[obj.colour]) - empty.astype(float)
            alpha = (moved * paint).sum(-1) / np.square(paint).sum(-1)
            x = (alpha * (np.arange(width) + 0.5)).sum((1, 2))[seen] / alpha.sum((1, 2))[seen]
            y = (alpha * (np.arange(height) + 0.5)[:, None]).sum((1, 2))[seen] / alpha.sum((1, 2))[seen]
            np.testing.assert_allclose(x, centre[seen, 0] * height, atol=0.15)
            np.testing.assert_allclose(y, centre[seen, 1] * height, atol=0.3)


def test_every_frame_is_a_function_of_its_time_alone(scenes):
    for scene in scenes["full", "train"][:10]:
        clip = render(scene, 48, 40, TIMES)
        assert clip.shape == (128, 48, 40, 3) and clip.dtype == np.uint8
        for j in (0, 31, 127):
            np.testing.assert_array_equal(render(scene, 48, 40, TIMES[j:j + 1])[0], clip[j])
    assert render(Scene(()), 33, 71, np.array([])).shape == (0, 33, 71, 3)


def test_background_moves_with_the_camera():
    def ground(camera, second):
        return render(Scene((), camera, background=4), 64, 64, np.array([second]))[0].astype(int)

    # 16 pixels over the clip, so that whole pixels are shared by different times
    pan, tilt = ground(Camera("pan-right", 0.25), 0.0), ground(Camera("tilt-up", 0.25), 0.0)
    assert np.abs(ground(Camera("pan-right", 0.25), 16.0)[:, :-16] - pan[:, 16:]).max() <= 1
    assert np.abs(ground(Camera("tilt-up", 0.25), 16.0)[16:] - tilt[:-16]).max() <= 1
    assert np.abs(pan[:, 16:] - pan[:, :-16]).mean() > 4  # enough texture to tell
    near, far = (ground(Camera("zoom-in", 1.44), t).astype(np.float32) for t in (16.0, 0.0))
    scale = cv2.warpAffine(far, np.array([[1.44, 0, -0.44 * 31.5], [0, 1.44, -0.44 * 31.5]]), (64, 64), flags=cv2.INTER_CUBIC)
    assert np.abs(scale - near)[4:-4, 4:-4].max() < 3
    assert (ground(Camera(), 0.0) == ground(Camera(), 9.0)).all()
    shaken = [np.array([ground(Camera("shake", 0.04, seed), t) for t in TIMES[:16]]) for seed in (1, 2)]
    assert np.abs(shaken[0] - shaken[1]).max() > 3 and np.abs(np.diff(shaken[0], axis=0)).max() > 3


def test_all_sizes_show_the_same_picture(scenes):
    for scene in scenes["full", "train"][:6]:
        for objects, most in (((), 0.75), (scene.objects, 60)):  # of 255, where a corner meets a pixel: edges are ramps
            small, large = (render(replace(scene, objects=objects), n, n, TIMES[::40]) for n in (64, 192))
            mean = large.reshape(-1, 64, 3, 64, 3, 3).mean((2, 4))
            assert np.abs(mean - small).max() <= most
            assert np.abs(mean - small).mean() < 0.6


def test_rendering_is_fast(scenes):
    drawn = scenes["whole", "train"][:24]
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        for scene in drawn:
            render(scene, 64, 64, TIMES)
        best = min(best, time.process_time() - start)
    assert len(drawn) / best >= 40  # clips of 128 x 64 x 64 a second


# ---- captions


def told(obj: Object) -> tuple:
    phases = tuple((p.start_s, p.motion, p.direction) for p in obj.phases)
    return obj.shape, obj.colour, obj.size, obj.growth, obj.appear_s, obj.vanish_s, phases


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("split", SPLITS)
def test_captions_tell_the_truth_and_all_of_it(scenes, world, split):
    for i, scene in enumerate(scenes[world, split]):
        for k in range(2):
            text = caption(scene, keyed.rng(0, "caption", i, k), split)
            read = parse(text)
            assert [told(o) for o in read.objects] == [told(o) for o in scene.objects], text
            assert read.camera.kind == scene.camera.kind, text
            for mine, true in zip(read.objects, scene.objects, strict=True):
                assert all(p.speed in (0, q.speed) for p, q in zip(mine.phases, true.phases, strict=True)), text
            if re.search("bounc|rebound", text):
                assert any(bounces(o, scene) for o in scene.objects), text


def test_speed_and_static_camera_are_told_now_and_then(scenes):
    texts = [caption(s, keyed.rng(0, i), "train") for i, s in enumerate(scenes["one", "train"])]
    assert 0.3 < np.mean([parse(t).objects[0].phases[0].speed > 0 for t in texts]) < 0.7
    assert 0.05 < np.mean(["camera" in t for t in texts]) < 0.4
    assert all(re.fullmatch(r"([A-Z][^.]*\. )*[A-Z][^.]*\.", t) for t in texts)
    assert not any(re.search(r"\b(a [aeiou]|an [^aeiou])", t.lower()) for t in texts)


def synonyms(split: int) -> set[str]:
    tables = (captions.SHAPE_WORDS, captions.COLOUR_WORDS, captions.SIZE_WORDS, captions.DIRECTION_WORDS, captions.TURN_WORDS,
              captions.SPEED_WORDS, captions.VERBS, captions.CAMERA_WORDS, captions.ORDERS)
    lists = [words for table in tables for words in table.values()]
    lists += [captions.LINEAR_VERBS, captions.EMPTY_WORDS, captions.COUNT_WORDS, captions.TIME_WORDS, captions.HALF_WORDS,
              captions.BACKGROUND_WORDS, captions.STEADILY]
    return {form for words in lists for phrase in words[split] for form in phrase.split("|")}


def test_paraphrases_of_the_splits_are_disjoint(scenes):
    train, test = synonyms(0), synonyms(1)
    assert not train & test and not set(STRUCTURES[0]) & set(STRUCTURES[1])
    assert len(set(STRUCTURES[0])) >= 30 and len(set(STRUCTURES[1])) >= 10
    texts = {split: [caption(s, keyed.rng(0, split, i), split).lower() for world in WORLDS
                     for i, s in enumerate(scenes[world, split])] for split in SPLITS}

    def any_of(phrases) -> re.Pattern:
        words = "|".join(re.escape(p) for p in phrases if "{" not in p)
        return re.compile(rf"(?<![\w-])({words})(?![\w-])")

    names = {*SHAPES, *COLOURS, *SIZES, *TURNS}  # the plain names belong to both
    inside = {p for p in train if any_of([p]).search(" | ".join(test))}  # e.g. "right" is part of "upward to the right"
    for split, strange in (("train", any_of(test)), ("test", any_of(train - names - inside))):
        assert not [t for t in texts[split] if strange.search(t)]
        assert [t for t in texts[SPLITS[split == "train"]] if strange.search(t)]  # the search does find what there is
    # no training caption, whatever its words, has the frame of a test structure
    frames = [re.compile(".*".join(map(re.escape, re.split(r"\{\w*\}", s)))) for s in STRUCTURES[1]]
    one = [caption(s, keyed.rng(0, "frame", i), "train").lower() for i, s in enumerate(scenes["one", "train"])]
    assert not any(f.search(t) for f in frames for t in one)


def test_parse_fills_in_what_a_caption_leaves_open():
    scene = parse("First a big red disc moves up, then it stops, then it moves on. The camera zooms out", seconds=12.0)
    obj = scene.objects[0]
    assert [p.start_s for p in obj.phases] == even_starts(3, 12.0) == [0, 4, 8]
    assert [(p.motion, p.direction) for p in obj.phases] == [("linear", "up"), ("still", ""), ("linear", "up")]
    assert obj.phases[0].speed == 0 and obj.start == (0.5, 0.5) and scene.camera == Camera("zoom-out", 1.4)
    late = parse("a small blue star appears at 2.5 seconds and circles clockwise fast and vanishes halfway through").objects[0]
    assert (late.appear_s, late.vanish_s, late.phases) == (2.5, 8.0, (Phase(2.5, "circle", "clockwise", SPEEDS["fast"]),))
    assert parse("nothing but the background") == Scene(())
    assert parse("A small red-colored circle moving toward the left").objects[0].phases[0].direction == "left"


@pytest.mark.parametrize(("text", "says"), [
    ("", "no object"),
    ("the camera pans left", "no object"),
    ("moving right", "no object"),
    ("a purple dinosaur moves right", "'dinosaur'"),
    ("a red circle moves right", "red circle has no size"),
    ("a small circle moves right", "small circle has no colour"),
    ("a small red circle", "small red circle has no motion"),
    ("a small red circle circles", "clockwise or counter-clockwise"),
    ("a small red circle moves on", "no direction"),
    ("two objects. a small red circle moves right", "counts 2 objects and describes 1"),
    ("a small red circle moves right and vanishes", "0 times for 1 events"),
    ("a small red circle moves right and vanishes at 20 seconds", "0 to 16 seconds"),
    ("a small red circle appears at 9 seconds, moves right and vanishes at 4 seconds", "rise"),
])
def test_parse_says_what_is_wrong(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        parse(text)
