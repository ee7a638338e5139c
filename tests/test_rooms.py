"""Two Rooms of stable-worldmodel: what to install where it is absent; where it is there, recordings
are what happened, and trials can be done and are no recordings."""

import importlib.util
import io
import json

import av
import numpy as np
import pytest

from evaluation.closed_loop import oracle, play_trials
from evaluation.rooms import SIZE, TASKS, Rooms, check_rooms, open_rooms, place_of
from evaluation.trials import successes
from files.vpt import parse_ticks
from prepare.rooms import play
from tests.harness import fails

pytestmark = pytest.mark.usefixtures("forkserver")

INSTALLED = importlib.util.find_spec("stable_worldmodel") is not None
needs_rooms = pytest.mark.skipif(not INSTALLED, reason="stable-worldmodel is not installed")


@pytest.mark.skipif(INSTALLED, reason="stable-worldmodel is installed")
def test_what_to_install_is_said(tmp_path):
    """Bug: a traceback of an import, or shards of nothing, where the package is absent."""
    refused = fails(tmp_path, "prepare/rooms.py", "--out", tmp_path / "rooms")
    assert "pip install --no-deps stable-worldmodel==0.1.1" in refused.splitlines()[-1]
    assert not (tmp_path / "rooms").exists()


def test_runs_that_cannot_be_played_are_refused():
    """Bug: a run on two frames a step, or on a robot, is played with pictures it does not know."""
    state = {"dataset": "vpt", "fps": 4, "frames_per_step": 1}
    check_rooms(state)
    for change, sentence in [
        ({"dataset": "droid"}, "out/x was trained on robot episodes"),
        ({"frames_per_step": 2}, "out/x has 2 frames a step"),
        ({"fps": 3}, "out/x was trained with --fps 3"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            check_rooms(state | change, "out/x")


@needs_rooms
def test_a_recording_shows_what_its_lines_say():
    """Bug: x and y change places, a line goes with another frame, the motion has another scale."""
    video, lines = play(open_rooms(), 0, 0, 80)
    ticks = parse_ticks("\n".join(map(json.dumps, lines)).encode())
    assert ticks.rate == pytest.approx(20) and not ticks.flaw and not ticks.unknown

    # where the agent is: the middle of what is red, in pixels of the environment
    places = []
    with av.open(io.BytesIO(video)) as container:
        for frame in container.decode(video=0):
            rgb = frame.to_ndarray(format="rgb24").astype(float)
            red = np.clip(rgb[..., 0] - rgb[..., 1] - 40, 0, None)
            rows, columns = np.indices(red.shape)
            middle = np.array([(red * columns).sum(), (red * rows).sum()]) / red.sum()
            places.append(middle * 224 / SIZE)
    moved = np.diff(places, axis=0)
    assert len(places) == len(lines) == 80

    # away from walls it moves as it is told to
    told = ticks.motion[:-1, :2]
    right = np.abs(moved - told).max(1) < 1.5
    assert right.mean() > 0.8

    # and not as it was told one line later
    late = np.abs(moved[:-1] - told[1:]).max(1) < 1.5
    assert late.mean() < 0.5


@needs_rooms
def test_trials_in_the_rooms():
    """Bug: a step is not what a recording has; a trial is an episode of the training data; it goes
    on after its success; the door is not found."""
    world = Rooms(["dx", "dy", "yaw", "pitch"], 5)
    world.begin("rooms", 0, 3)
    assert world.goal[0].shape == world.seen()[0].shape == (SIZE, SIZE, 3)
    world.env.agent_position[:] = 60
    world.act(np.array([10.0, -5, 0, 0]))
    np.testing.assert_allclose(place_of(world.env), [70, 55], atol=1e-3)
    np.testing.assert_allclose(world.state(), np.radians([1.5, -0.75]))

    # recording 0 of seed 0 begins elsewhere than its trial 0
    world.env.reset(seed=int(np.random.default_rng([0, 0]).integers(2**31)))
    recorded = place_of(world.env)
    starts = []
    for task, number in (("rooms", 0), ("rooms-far", 0), ("rooms", 0)):
        world.begin(task, 0, number, look=False)
        starts.append(place_of(world.env))
    assert np.array_equal(starts[0], starts[2]) and not np.allclose(starts[0], recorded)

    for name, task in TASKS.items():
        tracks, _ = play_trials(world, name, oracle(), 0, 4, round(task.seconds * 4), name)
        near = successes(tracks, task.limits)
        assert near[:, -1].all() and not near[:, 0].all(), tracks
        for track in tracks["pixels"]:
            first = next(t for t, distance in enumerate(track[1:], 1) if distance < 16)
            assert len(set(track[first:])) == 1
