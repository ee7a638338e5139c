"""ViZDoom as a world for evaluation.closed_loop: held-out maps without monsters, goals by picture.

    turn            the same place, 15 to 40 degrees to a side
    walk            a place straight ahead, 5 to 13 blocks away
    turn-and-walk   the same, but the player looks 15 to 40 degrees to a side of it
    find-again      the view before six random steps

A block is 32 map units wide. A player at full speed walks 66 of them in 0.2 s and, when the key is
released, slides on for about 95."""

import contextlib
import math
import tempfile

import numpy as np
import vizdoom

from evaluation.closed_loop import Task, World
from evaluation.game import (
    FPS,
    MAPS,
    MOUSE,
    SIZE,
    TICS,
    begin,
    open_game,
    picture,
    start_points,
    tick,
)
from files.vpt import DEGREES_PER_PIXEL

# success: nearer than this at the end; 64 map units are two blocks
ANGLE = {"degrees": 10}
PLACE = {"map units": 64}
TASKS = {
    "turn": Task(ANGLE, 1.6),
    "walk": Task(PLACE, 3.2, ("key.w",)),
    "turn-and-walk": Task(PLACE | ANGLE, 4.0, ("key.w",)),
    "find-again": Task(PLACE | ANGLE, 4.0, ("key.w", "key.s")),
}

# ticks until a player who has landed, walked or turned stands still
SETTLE = 20

# of a goal to walk to: ticks with the key held, and how far that must lead
WALK_TICKS = 24
WALK_LEAST = 160
ASIDE_MOST = 32

# of find-again: random steps of so many ticks, and how far they may lead. A player climbs 24
RANDOM_STEPS = 6
RANDOM_TICKS = 4
RANDOM_STD = 100.0  # pixels of mouse motion
FARTHEST = 400
CLIMB = 24

# how a player moves: a key adds to the speed in every tic, in map units, and friction takes away.
# A turn of the oracle is at most so many degrees a step, as those of a search
PUSH = 0.78
FRICTION = 0.90625
FASTEST_TURN = 45.0


def angle_between(a, b):
    """Degrees from b to a, in [-180, 180)."""
    return (a - b + 180) % 360 - 180


class Doom(World):
    """The game in steps of a clip: `frames` pictures a step, one every `stride` ticks.

    engine: of open_game. names: of the actions. After each step yaw and pitch are in degrees, yaw
    growing to the right, and place (x, y) is in map units."""

    name = "doom"
    tasks = TASKS

    def __init__(self, engine, names, frames, stride):
        self.engine = engine
        self.names = names
        self.frames = frames
        self.stride = stride
        self.width, self.height = map(int, SIZE.split("x"))
        self.points = start_points()
        self.look = True

    # --- moving ---

    def step(self, dx=0, dy=0, keys=(), ticks=None):
        """Mouse motion in pixels, spread over the ticks of the step, and keys that are pressed for
        all of it. With `ticks` it is no step of a clip, and nothing is seen."""
        # a VPT recording names the mouse buttons by number
        names = {"mouse.0": MOUSE[0], "mouse.1": MOUSE[1]}
        pressed = [names.get(name, name) for name in keys]
        looks = self.look and ticks is None
        ticks = ticks or self.frames * self.stride

        pictures = []
        for t in range(1, ticks + 1):
            # rounded sums: no motion is lost
            x = round(dx * t / ticks) - round(dx * (t - 1) / ticks)
            y = round(dy * t / ticks) - round(dy * (t - 1) / ticks)

            # positions can be read only after a tick that is drawn: at least the last one
            shown = looks and t % self.stride == 0
            tick(self.engine, x, y, pressed, look=shown or t == ticks)
            if shown:
                pictures.append(picture(self.engine.get_state(), self.width, self.height))
        self.pictures = pictures

        # what only the judge of a trial knows
        self.yaw = -self.variable("ANGLE")
        self.pitch = self.variable("PITCH")
        self.place = np.array([self.variable("POSITION_X"), self.variable("POSITION_Y")])
        self.height_of_floor = self.variable("POSITION_Z")

    def variable(self, name):
        """A number that the engine knows about the player."""
        return self.engine.get_game_variable(getattr(vizdoom.GameVariable, name))

    def turn(self, degrees):
        """Turn in place, at rest."""
        self.step(degrees / DEGREES_PER_PIXEL, ticks=SETTLE)

    def return_to(self, place):
        """Put the player back to a place, at rest. Whether it arrived there."""
        self.engine.send_game_command("warp {:.0f} {:.0f}".format(*place))
        self.step(ticks=SETTLE)
        return math.dist(self.place, place) < 8

    # --- trials ---

    def begin(self, task, seed, trial, look=True):
        self.task = task
        self.look = look
        rng = np.random.default_rng([seed, trial])
        prepare = {
            "turn": self.prepare_turn,
            "walk": self.prepare_walk,
            "turn-and-walk": self.prepare_walk,
            "find-again": self.prepare_random,
        }

        # a place from which the task can be done
        ready = False
        while not ready:
            self.start(rng, MAPS["val"])
            ready = prepare[task](rng)
        self.step()

    def start(self, rng, maps):
        """A random place of a random map, looking anywhere, at rest."""
        number = int(rng.choice(maps))
        seed = int(rng.integers(2**31))
        points = self.points[number]
        begin(self.engine, seed, number, points[rng.integers(len(points))])

        # land, turn and come to rest
        self.step(ticks=SETTLE)
        self.turn(rng.uniform(-180, 180))

    def remember_goal(self):
        """The goal is what is seen here."""
        self.step()
        self.goal = self.pictures
        self.goal_yaw = self.yaw
        self.goal_place = self.place

    def prepare_turn(self, rng):
        """A view to a side."""
        # look at the goal, then back
        degrees = rng.choice([-1, 1]) * rng.uniform(15, 40)
        self.turn(degrees)
        self.remember_goal()
        self.turn(-degrees)
        return True

    def prepare_walk(self, rng):
        """The view from a place ahead. Whether there is a way."""
        for _ in range(20):
            # walk to the goal: some way off, and straight ahead
            start = self.place
            self.step(keys=["w"], ticks=WALK_TICKS)
            self.step(ticks=SETTLE)
            away = self.place - start
            ahead = np.array([math.cos(math.radians(self.yaw)), -math.sin(math.radians(self.yaw))])
            aside = abs(away[0] * ahead[1] - away[1] * ahead[0])
            if away @ ahead > WALK_LEAST and aside < ASIDE_MOST:
                self.remember_goal()
                returned = self.return_to(start)
                if returned and self.task == "turn-and-walk":
                    self.turn(rng.choice([-1, 1]) * rng.uniform(15, 40))
                return returned

            # a wall is in the way: turn
            if not self.return_to(start):
                return False
            self.turn(rng.uniform(45, 135))
        return False

    def prepare_random(self, rng):
        """The view here, before some random steps. Whether they lead away, and not too far."""
        self.remember_goal()
        floor = self.height_of_floor
        for _ in range(RANDOM_STEPS):
            dx = rng.normal(0, RANDOM_STD)
            key = rng.choice(["w", "w", "s", "none"])
            self.step(dx, keys=[key], ticks=RANDOM_TICKS)
        self.step(ticks=SETTLE)

        # back must be possible, and necessary
        distance = self.distance()
        climbs = abs(self.height_of_floor - floor) > CLIMB
        is_there = distance["degrees"] < 15 and distance["map units"] < 1.5 * PLACE["map units"]
        return not climbs and not is_there and distance["map units"] < FARTHEST

    # --- what the harness asks for ---

    def act(self, action):
        # the camera follows the mouse; a key is pressed where its value is 1
        dx, dy = np.round(action[:2])
        pressed = [n for n, x in zip(self.names, action) if x == 1]
        keys = [n.removeprefix("key.") for n in pressed if n.startswith(("key.", "mouse."))]
        self.step(dx, dy, keys)

    def seen(self):
        return self.pictures

    def state(self):
        return np.radians([self.yaw, self.pitch])

    def distance(self):
        every = {
            "degrees": abs(angle_between(self.goal_yaw, self.yaw)),
            "map units": math.dist(self.goal_place, self.place),
        }
        return {unit: every[unit] for unit in self.tasks[self.task].limits}

    def oracle(self):
        # at the place it stays, and looks as the picture does
        yaw = self.goal_yaw
        keys = [""]

        # far away it looks to the place, or walks backwards
        task = self.tasks[self.task]
        away = self.goal_place - self.place
        if task.keys and np.hypot(*away) > 0.75 * PLACE["map units"]:
            yaw = -math.degrees(math.atan2(away[1], away[0]))
            keys += task.keys
            if "key.s" in keys and abs(angle_between(yaw, self.yaw)) > 90:
                yaw += 180
        turn = np.clip(angle_between(yaw, self.yaw), -FASTEST_TURN, FASTEST_TURN)

        # the key, or none, after which it comes to rest nearest to the place
        key = min(keys, key=lambda key: self.miss(turn, key))
        action = np.zeros(len(self.names))
        action[0] = turn / DEGREES_PER_PIXEL
        if key:
            action[self.names.index(key)] = 1
        return action

    def miss(self, turn, key):
        """How far from the goal the player comes to rest who turns by so many degrees while a key
        is held for one step."""
        facing = math.radians(self.yaw + turn)
        push = {"": 0, "key.w": PUSH, "key.s": -PUSH}[key]
        push = push * np.array([math.cos(facing), -math.sin(facing)])
        place = self.place
        speed = np.array([self.variable("VELOCITY_X"), self.variable("VELOCITY_Y")])
        for _ in range(self.frames * self.stride * TICS):
            place = place + speed + push
            speed = (speed + push) * FRICTION

        # a slide with friction is a geometric series
        return math.dist(place + speed / (1 - FRICTION), self.goal_place)


def check_playable(state, path="this run"):
    """ValueError for a run that cannot be played in the game. state: of its checkpoint."""
    if state["dataset"] != "vpt":
        raise ValueError(f"{path} was trained on robot episodes: the game needs a run on play")
    if state["encode"] != "tubelet":
        raise ValueError(
            f"{path} was trained with --encode {state['encode']}: the game needs --encode tubelet,"
            " because it shows the pictures of one step at a time"
        )
    if FPS % state["fps"]:
        raise ValueError(
            f"{path} was trained with --fps {state['fps']:g}: the game needs a rate that divides"
            f" {FPS} frames a second"
        )


@contextlib.contextmanager
def open_doom(state, seed):
    """The game for a run with this checkpoint -> Doom. ValueError for a run that it does not
    serve."""
    check_playable(state)

    # the engine writes its settings and caches into a folder, which nobody needs afterwards
    with tempfile.TemporaryDirectory() as folder:
        engine = open_game(SIZE, seed, folder, monsters=False)
        with contextlib.closing(engine):
            stride = round(FPS / state["fps"])
            yield Doom(engine, state["action_names"], state["frames_per_step"], stride)
