"""The judge against truths it does not see: true clips, soft and noisy ones, planted faults, wrong scenes, and its command."""

import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest

from latte import keyed, video
from latte.config import WorldConfig
from latte.world import selfcheck
from latte.world.caption import caption, parse
from latte.world.judge import judge, main
from latte.world.render import render
from latte.world.scene import CAMERAS, Camera, Object, Phase, Scene, centres, radii, sample_scene
from latte.world.verdict import FLOORS, compare, observe
from latte.world.vision import follow, name_camera, register, segment

TIMES = np.arange(128) / 8
ONE = WorldConfig(min_objects=1, max_objects=1, motions=["linear"], visibility=False, growth=False, cameras=["static"])
WORLD = WorldConfig()
RIGHT = Phase(0.0, "linear", "right", 0.1)


def scene_of(key, cfg=WORLD):
    return sample_scene(keyed.rng(7, "test judge", key), cfg)


@pytest.fixture(scope="module")
def true_clips():
    """(scene, observation, verdict) of 40 scenes of the default world."""
    found = []
    for i in range(40):
        scene = scene_of(i)
        seen = observe(render(scene, 64, 64, TIMES), 8, scene.seconds)
        found.append((scene, seen, compare(seen, scene)))
    return found


def test_true_clips_pass(true_clips):
    failed = [(i, verdict.scores, verdict.worst) for i, (_, _, verdict) in enumerate(true_clips) if not verdict.joint]
    assert not failed
    assert all(verdict.permanence == (1.0,) * 128 for _, _, verdict in true_clips)
    errors = [verdict.velocity_error for scene, _, verdict in true_clips if scene.objects]
    assert max(errors) < 0.06  # pixels a frame; the slowest objects go 0.4
    assert {scene.camera.kind for scene, _, _ in true_clips} == set(CAMERAS)
    assert {len(scene.objects) for scene, _, _ in true_clips} == {0, 1, 2, 3}


def test_what_is_seen_is_where_it_is(true_clips):
    """Paths, radii and the camera's view are the truth's within a tenth of a pixel or so."""
    for scene, seen, verdict in true_clips:
        assert np.abs(seen.view - scene.camera.view(TIMES, scene.seconds)).max() < 0.006
        for i, j in verdict.pairs:
            want, one = scene.objects[i], seen.objects[j]
            assert np.abs(one.path - centres(want, scene, TIMES))[one.seen].max() < 0.008
            assert np.abs(np.log(one.radius / radii(want, TIMES, scene.seconds)))[one.seen].max() < 0.08


@pytest.mark.parametrize(("size", "frames", "fps"), [(32, 128, 8), (32, 16, 8), (64, 16, 8), (48, 40, 8), (32, 16, 1), (64, 32, 2)])
def test_one_moving_object_passes_at_any_size_length_and_rate(size, frames, fps):
    for i in range(6):
        scene = scene_of(i, ONE)
        verdict = judge(render(scene, size, size, np.arange(frames) / fps), scene, fps)
        assert verdict.joint, (i, verdict.scores, verdict.worst)


def test_a_wide_frame_and_nine_objects_pass():
    wide = sample_scene(keyed.rng(7, "wide"), WorldConfig(min_objects=2), aspect=1.5)
    assert judge(render(wide, 64, 96, TIMES), wide).joint
    many = scene_of("nine", WorldConfig(min_objects=9, max_objects=9, motions=["still"], visibility=False, cameras=["static"]))
    verdict = judge(render(many, 96, 96, TIMES[:32]), many)
    assert verdict.scores["count"] == verdict.scores["colour"] == 1


def worn(frames, rng, blur=0.0, noise=0.0, tint=0.0):
    """A clip as a model might draw it: soft, noisy, its colours a little off."""
    worn = frames.astype(np.float32)
    if blur:
        worn = np.stack([cv2.GaussianBlur(frame, (0, 0), blur) for frame in worn])
    worn = worn * rng.uniform(1 - tint, 1 + tint / 2, 3) + rng.normal(size=frames.shape) * noise
    return worn.clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("wear", [dict(blur=1.0), dict(noise=8.0), dict(tint=0.12), dict(blur=0.7, noise=6.0, tint=0.1)], ids=str)
def test_soft_noisy_and_tinted_clips_pass(wear):
    for i in range(4):
        scene, rng = scene_of(100 + i, ONE), np.random.default_rng(i)
        verdict = judge(worn(render(scene, 64, 64, TIMES), rng, **wear), scene)
        assert verdict.joint, (i, verdict.scores, verdict.worst)


def test_positions_do_not_count(true_clips):
    for scene, seen, verdict in true_clips[:10]:
        moved = replace(scene, objects=tuple(replace(one, start=(0.5, 0.5)) for one in reversed(scene.objects)), background=1)
        assert compare(seen, moved).scores == verdict.scores


def test_direction_is_read_from_the_whole_path():
    """Just before a wall: nearly all of the clip goes the other way, and what is told is where it set out."""
    for frames, start in ((128, 0.74), (128, 0.2), (64, 0.7)):
        scene = Scene((Object("circle", "red", "medium", (start, 0.4), (RIGHT,)),))
        clip = render(scene, 64, 64, TIMES[:frames])
        assert judge(clip, scene).joint
        turned = replace(scene, objects=(replace(scene.objects[0], phases=(replace(RIGHT, direction="left"),)),))
        assert judge(clip, turned).scores["motion"] == 0


def test_follow_undoes_bounces_exactly():
    obj = Object("circle", "red", "large", (0.45, 0.4), (Phase(0.0, "linear", "down-right", 0.1),))
    scene = Scene((obj,), Camera("pan-left", 0.3))
    path = centres(obj, scene, TIMES)
    margin = 0.19
    straight, signs, legs = follow(path, 8, np.array([[0.15 + margin, margin], [0.85 - margin, 1 - margin]]))
    assert len(legs) == 1 and legs[0].motion == "linear"
    np.testing.assert_allclose(straight, path[0] + np.outer(TIMES, [0.1 / math.sqrt(2)] * 2), atol=2e-3)
    assert (signs == -1).any(0).all()  # it did bounce on both axes


@pytest.mark.parametrize("kind", CAMERAS)
def test_the_camera_is_followed_between_objects(kind):
    amount = {"static": 0.0, "zoom": 1.4, "shake": 0.035}.get(kind.split("-")[0], 0.3)
    objects = tuple(Object("square", c, "large", (x, x), (Phase(0.0, "still"),)) for c, x in (("green", 0.35), ("white", 0.65)))
    scene = Scene(objects, Camera(kind, amount, 5), background=3)
    clip = render(scene, 64, 64, TIMES)
    view, rest, explained = register(clip, segment(clip))
    camera, view = name_camera(view, explained, 8, 16.0)
    assert camera.kind == kind and (kind == "shake" or abs(camera.amount - amount) < 0.01)
    assert np.abs(view - scene.camera.view(TIMES, 16.0)).max() < 0.006
    assert rest.max() < 0.5  # grey levels


def test_permanence_falls_where_the_object_does():
    scene = Scene((Object("circle", "red", "large", (0.3, 0.4), (RIGHT,)),
                   Object("star", "blue", "large", (0.6, 0.75), (Phase(0.0, "still"),))))
    clip = render(scene, 64, 64, TIMES)
    clip[64:] = render(replace(scene, objects=scene.objects[1:]), 64, 64, TIMES)[64:]
    verdict = judge(clip, scene)
    assert verdict.permanence[60] == 1 and verdict.permanence[70] == verdict.permanence[-1] == 0.5
    assert verdict.count[60] == 2 and verdict.count[70] == 1
    assert verdict.scores["events"] == 0.5 and verdict.scores["count"] == 0 and not verdict.joint


FAULT_SCENE = Scene((Object("circle", "red", "medium", (0.25, 0.3), (RIGHT,)),
                     Object("square", "cyan", "large", (0.6, 0.7), (replace(RIGHT, direction="left", speed=0.05),))), background=2)


@pytest.mark.parametrize("fault", selfcheck.FAULTS)
def test_a_planted_fault_lowers_its_own_score(fault):
    clean = judge(render(FAULT_SCENE, 64, 64, TIMES), FAULT_SCENE)
    assert clean.joint
    for key in range(2):
        clip = selfcheck.plant(fault, FAULT_SCENE, 64, 128, keyed.rng(key, fault))
        verdict = judge(clip, FAULT_SCENE)
        assert selfcheck.own_score(verdict, fault) < selfcheck.own_score(clean, fault) - 0.05
        assert selfcheck.caught(verdict, fault) and not verdict.joint


def test_a_play_without_a_fault_is_the_clip():
    """So what a planted fault lowers, it lowers by the fault alone."""
    scene = scene_of(3, WorldConfig(min_objects=3))
    played = selfcheck.Play.of(scene, TIMES, keyed.rng(0)).render(64, 64)
    assert np.abs(played.astype(int) - render(scene, 64, 64, TIMES)).max() <= 2


def test_wrong_scenes_score_at_chance(true_clips):
    """What the clips of other scenes score is what the sampler's distribution says, within five standard errors."""
    n = len(true_clips)
    table = selfcheck.chance_table([[compare(true_clips[(i + k) % n][1], scene).scores for k in (1, 2, 3)]
                                    for i, (scene, _, _) in enumerate(true_clips)], seed=0, frames=128, pool=240)
    assert set(table) == {"count", "shape", "colour", "size", "motion", "speed", "events", "growth", "camera"}
    for name, row in table.items():
        assert abs(row["measured"] - row["analytic"]) < 5 * row["standard_error"], (name, row)
        assert row["standard_error"] < 0.1
    assert abs(table["camera"]["analytic"] - 1 / 8) < 0.03  # eight kinds, drawn evenly
    assert table["count"]["analytic"] < 1 / 4  # four numbers, drawn evenly; and at the right times


def test_truths_score_full_against_themselves(true_clips):
    for scene, _, _ in true_clips:
        assert set(selfcheck.truth_scores(scene, scene, 128).values()) == {1.0}


def test_an_empty_scene_and_an_empty_clip():
    empty, full = Scene(()), Scene((Object("ring", "green", "small", (0.5, 0.5), (Phase(0.0, "still"),)),))
    clip = render(empty, 64, 64, TIMES[:32])
    assert judge(clip, empty).joint
    verdict = judge(clip, full)
    assert verdict.scores["count"] == verdict.scores["shape"] == 0 and verdict.permanence[-1] == 0
    assert math.isnan(verdict.velocity_error) and verdict.to_json()["velocity_error"] is None
    assert judge(render(full, 64, 64, TIMES[:32]), empty).scores["count"] == 0


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_very_short_clips_are_judged_by_what_they_show(frames):
    scene = scene_of(0, ONE)
    scores = judge(render(scene, 64, 64, TIMES[:frames]), scene).scores
    assert all(scores[name] == 1 for name in ("count", "shape", "colour", "size", "camera"))


@pytest.mark.parametrize(("shape", "dtype"), [((4, 8, 8, 3), np.float32), ((8, 8, 3), np.uint8), ((0, 8, 8, 3), np.uint8)])
def test_what_is_no_clip_is_refused(shape, dtype):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[f h w 3\]"):
        judge(np.zeros(shape, dtype), Scene(()))


def test_noise_is_no_scene():
    """What an untrained model draws: it must be refused, and quickly, however many specks it has."""
    rng = np.random.default_rng(0)
    dull = rng.normal(66, 12, (64, 64, 64, 3)).clip(0, 255).astype(np.uint8)
    assert judge(dull, Scene(())).scores["count"] == 1
    for spread in (60, 1000):
        verdict = judge(rng.normal(128, spread, (64, 64, 64, 3)).clip(0, 255).astype(np.uint8), Scene(()))
        assert not verdict.joint and verdict.scores["background"] == 0


def test_the_command_judges_a_file(tmp_path, capsys):
    scene = scene_of(5, ONE)
    video.write(tmp_path / "clip.mp4", render(scene, 64, 64, TIMES), 8)
    prompt = caption(scene, keyed.rng(0), "test")
    assert main([str(tmp_path / "clip.mp4"), "--prompt", prompt]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["joint"] and len(told["permanence"]) == 128 and set(told["steadiness"]) == set(FLOORS)
    assert told["observed"]["objects"][0]["colour"] == scene.objects[0].colour == parse(prompt).objects[0].colour
    other = "a small white cross circles clockwise." if scene.objects[0].shape != "cross" else "a small white star stays still."
    assert main([str(tmp_path / "clip.mp4"), "--prompt", other]) == 0
    assert not json.loads(capsys.readouterr().out)["joint"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["missing.mp4", "--prompt", "a small red circle moves right."], "missing.mp4: no such video file"),
    (["clip.mp4", "--prompt", "a small red gnu moves right."], "gnu"),
    (["clip.mp4", "--prompt", ""], "names no object"),
    (["broken.mp4", "--prompt", "a small red circle moves right."], "broken.mp4"),
    (["clip.mp4"], "--prompt"),
    ([], "--selfcheck N"),
    (["--selfcheck", "1"], "at least 2 clips"),
])
def test_the_command_says_what_is_wrong_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    video.write(tmp_path / "clip.mp4", np.zeros((8, 16, 16, 3), np.uint8), 8)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and words in err and err.startswith("error: ") and err.count("\n") == 1


def test_the_self_check_reports_it_all(capsys):
    assert main(["--selfcheck", "2", "--seed", "3", "--size", "32"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"joint_pass", "scores", "steadiness", "permanence", "velocity_error", "faults", "chance"} <= set(told)
    assert told["clips"] == 2 and told["seconds_per_clip"]["mean"] > 0
