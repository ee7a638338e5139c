"""The simulated arm as a world: trials begin alike, the tasks can be done, steps are those of
recordings, and runs of train_lora.py plan in it; the energy around an action."""

import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from data import ActionScaler
from droid import ASPECTS, POSE, crop_resize, pose_actions
from evaluation.closed_loop import oracle, play_trials
from evaluation.landscape import POINTS, distances, landscape, motion_pairs
from evaluation.robot import TASKS, Arm, check_arm, stride_of_arm
from evaluation.runs import features_of_pictures, load_run
from evaluation.trials import successes
from model import encode_steps, normalize_features
from tests.harness import fails, needs_mujoco, run
from weights import open_encoder

pytestmark = pytest.mark.usefixtures("forkserver")


@pytest.fixture(scope="module")
def world():
    needs_mujoco()
    return Arm("a", "exterior_1", 15, 0.2)


# --- the world ---


def test_a_step_of_the_arm_is_a_step_of_a_recording(world):
    """Bug: the tool moves by less than the action, along another axis or turns the wrong way; a lag
    adds up; the gripper opens where it should close."""
    world.begin("reach", 0, 0)
    action = np.array([0.03, -0.05, 0.04, 0.1, -0.1, 0.2, 0.5])
    states = [world.state()]
    for sign in (1, -1, 1):
        world.act(sign * action * [1, 1, 1, 0, 0, 0, 1])
        states.append(world.state())
    moved = pose_actions(np.array(states))
    np.testing.assert_allclose(moved[:, :3], np.outer([1, -1, 1], action[:3]), atol=0.004)
    np.testing.assert_allclose(moved[:, 6], [0.5, -0.5, 0.5], atol=0.02)

    before = world.state()
    world.act(action * [0, 0, 0, 1, 1, 1, 0])
    after = world.state()
    turn = Rotation.from_euler("xyz", after[3:6]) * Rotation.from_euler("xyz", before[3:6]).inv()
    np.testing.assert_allclose(turn.as_euler("xyz"), action[3:6], atol=0.02)

    # it stays above the table
    for _ in range(4):
        world.act(np.array([0, 0, -0.2, 0, 0, 0, 0]))
    assert 0.02 < world.tool()[2] < 0.05


@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_does_the_task(world, name):
    """Bug: a goal that cannot be reached, or that is reached at the start; policies begin in other
    places; one that does not look begins elsewhere."""
    limits = TASKS[name].limits
    tracks, _ = play_trials(world, name, oracle(), 0, 4, 3, name)
    near = successes(tracks, limits)
    assert not near[:, 0].any() and near[:, -1].all(), tracks

    # again, with pictures: the goal is another one, and the scene is the same
    world.begin(name, 0, 2)
    assert world.distance()["cm"] == pytest.approx(tracks["cm"][2][0], abs=1e-3)
    changed = (world.seen()[0] != world.goal[0]).any(-1).mean()
    assert 0.005 < changed < 0.5
    world.begin(name, 1, 2)
    assert abs(world.distance()["cm"] - tracks["cm"][2][0]) > 0.01

    # nobody pushes, nothing moves
    world.begin(name, 0, 1, look=False)
    start = world.distance()["cm"]
    world.act(np.zeros(7))
    assert world.distance()["cm"] == pytest.approx(start, abs=0.5)


def test_runs_that_cannot_move_the_arm_are_refused():
    """Bug: a run on play, or of other actions, plans with what it takes for metres."""
    with pytest.raises(ValueError, match="out/x was trained on play: the arm needs a run on robot"):
        check_arm({"dataset": "vpt", "action_names": POSE}, "out/x")
    with pytest.raises(ValueError, match="has actions speed: the arm knows differences of the po"):
        check_arm({"dataset": "droid", "action_names": ["speed"]})
    assert stride_of_arm({"stride": None, "fps": 4.0}) == 4
    assert stride_of_arm({"stride": 15, "fps": 4.0}) == 15


# --- energies around an action ---


def test_the_valley_is_where_the_energy_says():
    """Bug: rows and columns change places, units or scaling are wrong, other dims move too."""
    scaler = ActionScaler(np.full(7, 0.01), np.full(7, 0.0025), np.full(7, 0.05), 1, {})
    target = torch.tensor([0.12, -0.04, 0.08, 0.1, 0.2, 0.3, 0.5])
    scaled = ((target - 0.01) / 0.05).float()

    def cost(candidates):
        assert candidates.shape == (POINTS**2, 1, 7)
        return (candidates[:, 0] - scaled).abs().sum(1)

    pairs = motion_pairs(True, 0.2, None)
    found = [landscape(cost, scaled, pair, scaler) for pair in pairs]
    for one, wanted in zip(found, ((12, -4), (12, 8))):
        assert one.recorded == pytest.approx(wanted, abs=1e-4)
        assert one.lowest == pytest.approx(wanted, abs=40 / (POINTS - 1))
        assert one.energies.min() < 1.2
    off, still = distances(found)
    assert (off < 4).all() and still == pytest.approx([np.hypot(12, 4), np.hypot(12, 8)], abs=1e-3)

    # play: the mouse's pixels and the angle of the camera move together
    (pair,) = motion_pairs(False, None, np.array([50.0, 50.0]))
    unscaled = ActionScaler(np.zeros(4), np.ones(4), np.ones(4), 1, {})
    action = torch.tensor([100.0, -40.0, np.radians(15), np.radians(-6)]).float()

    def off_the_camera(candidates):
        tied = candidates[:, 0, 2:] - torch.deg2rad(candidates[:, 0, :2] * 0.15)
        assert tied.abs().max() < 1e-5
        return torch.arange(len(candidates)).float()

    # the first candidate is the lower left corner
    one = landscape(off_the_camera, action, pair, unscaled)
    assert one.recorded == pytest.approx((15, -6), abs=1e-4)
    assert one.lowest == (one.values[0][0], one.values[1][0])


# --- the programs ---


@pytest.fixture(scope="module")
def base(tmp_path_factory, forkserver):
    """A run on two short episodes of the arm."""
    folder = tmp_path_factory.mktemp("arm")
    short = "--steps 30 30 --shards 1 --workers 1 --out"
    run(folder, "prepare/robot.py", "--episodes 2", short, folder / "robot")
    data = ["--data", folder / "robot" / "*.tfrecord*"]
    scaler = ["--output", folder / "s.safetensors", "--stride 4 --num_workers 0"]
    run(folder, "fit_scaler.py", "--dataset droid", *data, *scaler)
    size = "--pred_dim 48 --pred_depth 1 --pred_heads 3 --encoder vit_tiny --crop_size 32"
    clip = "--stride 4 --frames_per_clip 3 --crop square --idle_filter off --batch_size 2"
    plan = "--base none --full --max_steps 1 --val_fraction 0.5 --num_workers 0 --grad_accum 1"
    flags = [*data, "--scaler", folder / "s.safetensors", size, clip, plan]
    run(folder, "train_lora.py", *flags, "--out_dir", folder / "out")
    return folder


def test_pictures_are_cut_as_those_of_episodes(base):
    """Bug: what the planner sees is cut as play is: other pixels than those of training."""
    one = load_run(str(base / "out"))
    picture = np.random.default_rng(0).integers(256, size=(180, 320, 3), dtype=np.uint8)
    z = features_of_pictures(one)([picture])
    video = crop_resize([picture], 32, *ASPECTS["square"])[None]
    encoder = open_encoder("vit_tiny", 32, 3)
    with torch.no_grad():
        wanted = normalize_features(encode_steps(encoder, video, "frame", 1))[0, 0]
    torch.testing.assert_close(z, wanted, atol=1e-5, rtol=1e-5)


def test_runs_play_the_arm(base):
    """Bug: a run of train_lora.py is refused, plays the game's tasks, or a plan moves the gripper;
    a task of the other world is played."""
    quick = "--trials 2 --num_samples 4 --num_elites 2 --iterations 1 --horizon 1 --tasks"
    flags = ["--checkpoint", base / "out", quick]
    text = run(base, "evaluation/benchmark.py", *flags, "reach --arm b --out", base / "b.json")
    (row,) = [line for line in text.splitlines() if line.startswith("oracle ")]
    assert row.split()[1] == "100%"
    results = json.loads((base / "b.json").read_text())
    assert results["settings"]["world"] == "arm b"
    assert results["settings"]["maxnorm"] == pytest.approx(0.2 * 4 / 15)
    assert results["tasks"]["reach"]["steps"] == 19
    assert list(results["tasks"]["reach"]["policies"])[-1] == f"plan {base / 'out'}"

    refused = fails(base, "evaluation/benchmark.py", *flags, "turn --out", base / "c.json")
    assert "--tasks turn is not in the world of" in refused
    assert "reach push" in refused


def test_the_landscape_is_drawn(base):
    """Bug: --landscape plans too, or draws nothing."""
    flags = ["--checkpoint", base / "out", "--landscape 2 --maxnorm 0.2"]
    text = run(base, "plan.py", *flags)
    assert "x and y: the lowest energy is" in text and "x and z: the lowest" in text
    assert (base / "out" / "plan-landscape.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((base / "out" / "plan-landscape.json").read_text())
    assert [len(row["off"]) for row in report["landscape"]] == [2, 2] and "recorded" not in report
    refused = fails(base, "plan.py", *flags, "--play turn")
    assert "leave --start and --play out" in refused
