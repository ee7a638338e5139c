"""Two Rooms of stable-worldmodel as a world for evaluation.closed_loop: an agent seen from above, a
wall with a door, a goal given by picture.

    rooms        the goal is where an episode was 25 steps of the environment later; 50 are given
    rooms-far    100 steps later; 150 are given

A trial succeeds, and ends, as soon as the agent is within 16 pixels of the goal: the environment's
own rule. `rooms` is the protocol of LeWM's released code and of the third version of its paper
(arXiv 2603.19312), `rooms-far` that of the first version.

A step of the environment is a line of a recording. Its action is mouse motion: how far the agent is
told to move, in pixels of the environment's 224 and at most 5 along each axis. The camera turns
with the mouse, as in every recording; nobody sees that."""

import importlib.util
import math
import os
import sys
import types

import numpy as np
from PIL import Image

from evaluation.closed_loop import Task, World
from files.vpt import DEGREES_PER_PIXEL

FPS = 20  # lines a second of a recording

# {task: steps of the environment from start to goal}
GOAL_AFTER = {"rooms": 25, "rooms-far": 100}
NEAR = {"pixels": 16}
TASKS = {"rooms": Task(NEAR, 50 / FPS), "rooms-far": Task(NEAR, 150 / FPS)}

# steps of an episode before a trial starts, at most
STEPS_BEFORE = 60

# of the policy that plays: std of the noise on a direction of length 1, and the share of steps that
# repeat the action before. stable-worldmodel's scripts/data/collect_tworooms.py has 3 and 0.1; with
# 2 goals are about as far away as users measured them in the published data (le-wm issue 101)
NOISE = 2.0
REPEATS = 0.1

# of the picture that a recording shows, which has 224 pixels a side
SIZE = 64

INSTALL = "pip install --no-deps stable-worldmodel==0.1.1, and pip install gymnasium loguru"


# --- the environment ---


def open_rooms():
    """The environment of stable-worldmodel. ValueError if it or what it needs is not installed."""
    # the package itself imports torchvision and data bases; its environment needs none of them
    name = "stable_worldmodel"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ValueError(f"stable-worldmodel is not installed: {INSTALL}")
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package
        try:
            importlib.import_module(f"{name}.utils")
        except ImportError as e:
            del sys.modules[name]
            raise ValueError(f"Two Rooms cannot be opened ({e}): {INSTALL}") from e

    # the file of the environment, without the one beside it that knows policies
    path = os.path.join(sys.modules[name].__path__[0], "envs", "two_room", "env.py")
    spec = importlib.util.spec_from_file_location("two_room_env", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        raise ValueError(f"Two Rooms cannot be opened ({e}): {INSTALL}") from e
    return module.TwoRoomEnv()


def speed_of(env):
    """Pixels that the agent moves in a step along each axis, at most."""
    return env.variation_space["agent"]["speed"].value.item()


def place_of(env):
    """(2,): where the agent is."""
    return env.agent_position.numpy().astype(float)


def picture(env):
    """What is seen: (SIZE, SIZE, 3) uint8."""
    image = Image.fromarray(env.render())
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def way(env):
    """(2,): from the agent to where it must go first: through the door if the goal is in the other
    room, and then to the goal."""
    place = place_of(env)
    goal = env.target_position.numpy().astype(float)
    wall = env.WALL_CENTER
    side = 1 if goal[0] > wall else -1
    beyond = 1.5 * env.BORDER_SIZE
    if side * (place[0] - wall) > beyond - 1:
        return goal - place

    # in the door, or in front of it: straight through; elsewhere to the front of it
    door = float(env.door_positions[0])
    if abs(place[1] - door) < 8:
        return np.array([wall + side * beyond, door]) - place
    if side * (place[0] - wall) > 0:
        return goal - place
    return np.array([wall - side * beyond, door]) - place


class Wanderer:
    """The player: goes to the goal by way of the door, with so much noise that most of its motion
    is random."""

    def __init__(self, rng):
        self.rng = rng
        self.action = None

    def act(self, env):
        """The next action (2,), from -1 to 1."""
        ahead = way(env)
        direction = ahead / max(np.hypot(*ahead), 1e-6)
        noisy = np.clip(direction + self.rng.normal(0, NOISE, 2), -1, 1)
        if self.action is None or self.rng.random() >= REPEATS:
            self.action = noisy
        return self.action


def play_step(env, player, rng):
    """One step of a Wanderer, and another goal where one is reached. Returns what it did, (2,)."""
    action = player.act(env)
    reached = env.step(action)[2]
    if reached:
        env.reset(seed=int(rng.integers(2**31)), options={"state": env.agent_position})
    return action


# --- the world ---


class Rooms(World):
    """The rooms in steps of `stride` lines. names: of the actions of a run."""

    name = "two rooms"
    tasks = TASKS

    def __init__(self, names, stride):
        self.names = names
        self.stride = stride
        self.env = open_rooms()

    def begin(self, task, seed, trial, look=True):
        # never an episode of prepare.rooms, whose recordings have generators of two numbers
        self.look = look
        rng = np.random.default_rng([seed, trial, 1])

        # an episode: somewhere on the way, and so many steps later
        self.env.reset(seed=int(rng.integers(2**31)))
        player = Wanderer(rng)
        starts = int(rng.integers(STEPS_BEFORE))
        for t in range(starts + GOAL_AFTER[task]):
            if t == starts:
                start = place_of(self.env)
            play_step(self.env, player, rng)
        goal = place_of(self.env)

        # what is seen there, and back to the start
        if look:
            self.goal = [picture(self.env)]
        self.env.reset(options={"variation": [], "state": start, "target_state": goal})
        self.ended = False
        self.angles = np.zeros(2)
        self.look_around()

    def look_around(self):
        if self.look:
            self.picture = picture(self.env)

    def act(self, action):
        # spread over the lines of the step; a trial that has succeeded is over
        motion = action[:2] / self.stride / speed_of(self.env)
        for _ in range(self.stride):
            if not self.ended:
                self.ended = self.env.step(motion)[2]
        self.angles = self.angles + np.radians(action[:2] * DEGREES_PER_PIXEL)
        self.look_around()

    def seen(self):
        return [self.picture]

    def state(self):
        return self.angles

    def distance(self):
        goal = self.env.target_position.numpy()
        return {"pixels": math.dist(place_of(self.env), goal)}

    def oracle(self):
        # as far as the step goes, and not further than the goal or the door
        farthest = self.stride * speed_of(self.env)
        ahead = way(self.env)
        action = np.zeros(len(self.names))
        action[:2] = ahead * min(1, farthest / max(np.abs(ahead).max(), 1e-6))
        return action


def check_rooms(state, path="this run"):
    """ValueError for a run that cannot be played in the rooms. state: of its checkpoint."""
    if state["dataset"] != "vpt":
        raise ValueError(f"{path} was trained on robot episodes: the rooms need a run on play")
    if state["frames_per_step"] != 1:
        raise ValueError(
            f"{path} has {state['frames_per_step']} frames a step: the rooms show one, train with"
            " --frames_per_step 1"
        )
    if FPS % state["fps"]:
        raise ValueError(
            f"{path} was trained with --fps {state['fps']:g}: the rooms need a rate that divides"
            f" {FPS} lines a second"
        )
