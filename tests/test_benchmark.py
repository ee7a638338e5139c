"""evaluation.benchmark, and the game as a world: trials begin alike, the tasks can be done, results
are kept; runs of train_lewm.py plan, with patch tokens and with one vector a step."""

import json
import os
import re

import numpy as np
import pytest

from evaluation.closed_loop import oracle, play_trials
from evaluation.doom import TASKS, angle_between, check_playable, open_doom
from evaluation.trials import paired_difference, successes, wilson
from files.vpt import ACTION_SPACES
from tests.harness import ROOT, fails, run

pytestmark = pytest.mark.usefixtures("forkserver")

CUT = {"dataset": "vpt", "encode": "tubelet", "fps": 10, "frames_per_step": 2}
QUICK = "--trials 1 --num_samples 4 --num_elites 2 --iterations 1 --horizon 1"


@pytest.fixture(scope="module")
def world():
    with open_doom(CUT | {"action_names": ACTION_SPACES[36]}, 0) as world:
        yield world


# --- what trials say ---


def test_intervals_of_success():
    """Bug: 0 of 10 has no width, an interval leaves 0 to 1, trials are not paired."""
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 29 of 29
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1), abs=1e-4)

    # a policy that is better in 10 of 100 trials, whichever the other 90 are
    hard = np.arange(100) % 2 == 0
    better = hard | (np.arange(100) % 10 == 1)
    difference, low, high = paired_difference(better, hard)
    assert difference == pytest.approx(0.1) and 0.03 < low < 0.06 and 0.14 < high < 0.18
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(better, hard[1:])

    # near in every unit, not in one of them
    tracks = {"degrees": [[20, 5], [20, 5]], "map units": [[70, 80], [70, 10]]}
    near = successes(tracks, {"degrees": 10, "map units": 64})
    assert near.tolist() == [[False, False], [False, True]]


# --- the game ---


def test_a_step_in_the_game_is_a_step_of_a_recording(world):
    """Bug: the mouse turns the wrong way or by another angle, motion is lost in rounding, a picture
    too few."""
    world.begin("walk", 0, 0)
    yaw = world.yaw
    action = np.zeros(36)
    action[0] = 101
    world.act(action)
    assert angle_between(world.yaw, yaw) == pytest.approx(101 * 0.15, abs=0.1)
    assert len(world.seen()) == len(world.goal) == 2
    assert world.state()[0] == pytest.approx(np.radians(world.yaw))

    # a key moves, back to where it looked
    action[0] = -101
    action[ACTION_SPACES[36].index("key.w")] = 1
    before = world.distance()["map units"]
    for turn in (-101, 0, 0):
        action[0] = turn
        world.act(action)
    assert angle_between(world.yaw, yaw) == pytest.approx(0, abs=0.1)
    assert world.distance()["map units"] < before - 20


@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_does_the_task(world, name):
    """Bug: a goal that cannot be reached, or that is reached at the start; policies begin in other
    places; one that does not look begins elsewhere."""
    task = TASKS[name]
    tracks, _ = play_trials(world, name, oracle(), 0, 3, round(task.seconds / 0.2), name)
    near = successes(tracks, task.limits)
    assert not near[:, 0].any() and near[:, -1].all(), tracks

    # again, with pictures
    world.begin(name, 0, 2)
    for unit, distance in world.distance().items():
        assert distance == pytest.approx(tracks[unit][2][0], abs=1e-2)
    world.begin(name, 1, 2)
    unit = next(iter(tracks))
    assert abs(world.distance()[unit] - tracks[unit][2][0]) > 0.1


def test_runs_that_cannot_be_played_are_refused():
    """Bug: one sentence for three mistakes, after minutes of opening a large encoder."""
    for change, sentence in [
        ({"dataset": "droid"}, "out/x was trained on robot episodes: the game needs a run on play"),
        ({"encode": "clip"}, "out/x was trained with --encode clip: the game needs --encode tubel"),
        ({"fps": 6}, "out/x was trained with --fps 6: the game needs a rate that divides 20"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            check_playable(CUT | change, "out/x")
    check_playable(CUT)


# --- the program ---


@pytest.fixture(scope="module")
def lewm(tmp_path_factory, shards, forkserver):
    """Runs of train_lewm.py that were moved after training: patch tokens and one vector a step."""
    folder = tmp_path_factory.mktemp("lewm")
    scaler = folder / "scaler.pkl"
    data = ["--data", shards / "shard-000001.tar", "--val_data", shards / "shard-000000.tar"]
    run(folder, "fit_scaler.py", *data[:2], "--output", scaler, "--fps 5 --num_workers 0")
    size = "--crop_size 32 --pred_dim 48 --pred_depth 2 --pred_heads 3 --batch_size 4"
    plan = "--epochs 2 --warmup 0 --anneal 0 --ipe 1 --num_workers 0 --val_clips 0"
    for pool in ("none", "mean"):
        flags = [*data, "--scaler", scaler, size, plan, "--pool", pool]
        run(folder, "train_lewm.py", *flags, "--save_every_freq 1 --out_dir", folder / "trained")
        (folder / "trained").rename(folder / pool)
    return folder


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_runs_of_train_lewm_plan(lewm, tmp_path, shards, pool):
    """Bug: the encoder is looked for where the run was trained, or is that of a later step; one
    vector a step has no grid."""
    first = lewm / pool / "checkpoint-epoch001.pth.tar"
    held = ["--data", shards / "shard-000000.tar"]
    short = "--clips 2 --horizon 1 --num_samples 4 --num_elites 2 --out"
    run(tmp_path, "plan.py", "--checkpoint", first, *held, short, tmp_path / "p.json")
    rows = json.loads((tmp_path / "p.json").read_text())["recorded"]
    assert [row["dim"] for row in rows] == ["yaw", "pitch"] and rows[0]["plan"] > 0

    short = "--play turn --trials 1 --steps 2 --horizon 1 --num_samples 4 --num_elites 2 --out"
    run(tmp_path, "plan.py", "--checkpoint", first, short, tmp_path / "g.json")
    tracks = json.loads((tmp_path / "g.json").read_text())["distances"]
    assert tracks["plan"][0][0] == pytest.approx(tracks["copy"][0][0], abs=1e-2)


def test_the_world_of_the_docs_is_played(lewm, capsys):
    """Bug: the world of docs/evaluate.md does not run, or is one that nobody can solve, or that
    differs from policy to policy."""
    with open(os.path.join(ROOT, "docs", "evaluate.md")) as f:
        blocks = re.findall(r"```python\n(.*?)```", f.read(), re.S)
    code = next(block for block in blocks if "class Wall" in block)
    small = code.replace("out/ac", str(lewm / "none")).replace("trials=20", "trials=3")
    scope = {}
    exec(small, scope)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("]")]
    rates = {row[0]: row[1] for row in rows}
    assert list(rates) == ["plan", "random", "rest", "oracle"]
    assert rates["oracle"] == "100%" and rates["rest"] == "0%"

    # to the right is positive, for the mouse as for the picture
    world = scope["world"]
    world.begin("turn", 0, 0)
    before = world.seen()[-1]
    action = np.zeros(len(world.names))
    action[0] = 10 / 0.15
    world.act(action)
    assert np.array_equal(world.seen()[-1][:, :140], before[:, 20:])


def test_the_benchmark_keeps_what_it_played(lewm, tmp_path):
    """Bug: a rerun plays again, or mixes results of other flags or another model; two files of
    other trials are compared."""
    out = tmp_path / "a.json"
    base = [QUICK, "--tasks turn --out", out]
    text = run(tmp_path, "evaluation/benchmark.py", "--checkpoint", lewm / "none", *base)
    (row,) = [line for line in text.splitlines() if line.startswith("oracle ")]
    assert row.split()[1] == "100%"
    policies = json.loads(out.read_text())["tasks"]["turn"]["policies"]
    assert len(policies) == 5
    starts = [p["tracks"]["degrees"][0][0] for p in policies.values()]
    assert starts == pytest.approx([starts[0]] * 5, abs=1e-2)

    # a second run adds its plan, and nothing else is played
    changed = json.loads(out.read_text())
    changed["tasks"]["turn"]["policies"]["rest"]["seconds"] = 1234.0
    out.write_text(json.dumps(changed))
    both = ["--checkpoint", lewm / "none", lewm / "mean"]
    text = run(tmp_path, "evaluation/benchmark.py", *both, *base)
    assert "1234.00" in text
    assert len(json.loads(out.read_text())["tasks"]["turn"]["policies"]) == 6

    refused = fails(tmp_path, "evaluation/benchmark.py", *both, *base, "--seed 1")
    assert "was played with seed 0, now 1: give another --out" in refused
    other = tmp_path / "b.json"
    flags = [QUICK, "--tasks turn --seed 1 --out", other]
    run(tmp_path, "evaluation/benchmark.py", "--checkpoint", lewm / "mean", *flags)
    refused = fails(tmp_path, "evaluation/benchmark.py", "--compare", out, other)
    assert "only the same trials can be compared" in refused

    refused = fails(tmp_path, "evaluation/benchmark.py", "--compare", out, tmp_path / "no.json")
    assert "no.json: no such file of evaluation.benchmark" in refused

    text = run(tmp_path, "evaluation/benchmark.py", "--compare", out, out)
    assert text.count("= +0 points [+0, +0]") >= 2
