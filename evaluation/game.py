"""The game behind prepare.demo and plan.py: ViZDoom on Freedoom 2, headless, moved by the mouse and
keys of a VPT recording.

A tick is two of the engine's 35 tics a second. A pixel of mouse motion is 0.15 degrees; yaw grows
to the right, pitch downwards."""

import os
import struct

import av
import numpy as np
import vizdoom

from files.vpt import DEGREES_PER_PIXEL

FPS = 20  # ticks a second of a recording
TICS = 2  # of the engine, in a tick

# degrees; the software renderer stops at 32 upwards
PITCH_LIMIT = 31.0

MAPS = {"train": [*range(1, 25), 31, 32], "val": [*range(25, 31)]}
WAD = os.path.join(os.path.dirname(vizdoom.__file__), "freedoom2.wad")

# of recordings, unless asked for another
SIZE = "256x144"

# mouse buttons 0 and 1, and the number of weapons in the hotbar
MOUSE = ["attack", "use"]
SLOTS = 7

INPUTS = {
    "w": "MOVE_FORWARD",
    "s": "MOVE_BACKWARD",
    "a": "MOVE_LEFT",
    "d": "MOVE_RIGHT",
    "space": "JUMP",
    "left.shift": "CROUCH",
    "left.control": "SPEED",
    "attack": "ATTACK",
    "use": "USE",
}
BUTTONS = [
    "TURN_LEFT_RIGHT_DELTA",
    "LOOK_UP_DOWN_DELTA",
    *INPUTS.values(),
    *(f"SELECT_WEAPON{n + 1}" for n in range(SLOTS)),
]
VARIABLES = [
    "ANGLE",
    "PITCH",
    "POSITION_X",
    "POSITION_Y",
    "POSITION_Z",
    "HEALTH",
    "ARMOR",
    "KILLCOUNT",
]

# what the engine is not to do or to show
OFF = [
    "window_visible",
    "sound_enabled",
    "render_hud",
    "render_messages",
    "render_crosshair",
    "render_screen_flashes",
]

# kind of thing in a WAD: where a player of a deathmatch starts
DEATHMATCH_START = 11


# --- the engine ---


def start_points():
    """{map number: [(x, y), ...]}: the deathmatch starts of every map, from the WAD. They are free
    spots all over the map."""
    # a WAD is a header, lumps and a table of (position, size, name)
    points = {}
    with open(WAD, "rb") as f:
        _, lumps, table = struct.unpack("<4sii", f.read(12))
        f.seek(table)
        table = list(struct.iter_unpack("<ii8s", f.read(16 * lumps)))
        for (_, _, name), (position, size, _) in zip(table, table[1:]):
            if not name.startswith(b"MAP"):
                continue
            # the lump after a map's name has its things: x, y, angle, kind, flags
            f.seek(position)
            things = struct.iter_unpack("<5h", f.read(size))
            starts = [(x, y) for x, y, _, kind, _ in things if kind == DEATHMATCH_START]
            points[int(name[3:5])] = starts
    return points


def open_game(size, seed, folder):
    """A headless game, ready for new_episode. folder: for its settings and for what it caches of
    maps, because it writes them into the working directory."""
    # its files
    game = vizdoom.DoomGame()
    game.set_doom_config_path(os.path.join(folder, "vizdoom.ini"))
    game.set_doom_game_path(WAD)

    # the screen: twice the size where the engine can, because without antialiasing a texture is
    # noise
    twice = "X".join(str(2 * int(n)) for n in size.split("x"))
    once = getattr(vizdoom.ScreenResolution, f"RES_{size.upper()}")
    game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{twice}", once))
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    for setting in OFF:
        getattr(game, f"set_{setting}")(False)

    # what it takes and tells
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in BUTTONS])
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in VARIABLES])
    game.set_doom_skill(1)  # the fewest monsters: at close quarters they push the player about
    game.set_seed(seed)
    game.add_game_args("+freelook 1 +sv_infiniteammo 1 +neverswitchonpickup 1 +con_midtime 0")

    # the engine writes into the working directory while it starts
    here = os.getcwd()
    os.chdir(folder)
    try:
        game.init()
    finally:
        os.chdir(here)
    return game


def begin(game, seed, map_number, point):
    """A new episode at a point (x, y) of a map; nothing can kill the player."""
    game.set_seed(seed)
    game.set_doom_map(f"map{map_number:02d}")
    game.new_episode()
    for command in ("iddqd", "give weapons", "give ammo", "give keys", "warp {} {}".format(*point)):
        game.send_game_command(command)


def tick(game, dx, dy, pressed, slot=None):
    """One line of a recording: mouse motion in pixels, names of INPUTS that are pressed, a hotbar
    slot to change to."""
    action = dict.fromkeys(BUTTONS, 0.0)
    # the engine turns by this much every tic
    action["TURN_LEFT_RIGHT_DELTA"] = dx * DEGREES_PER_PIXEL / TICS
    action["LOOK_UP_DOWN_DELTA"] = -dy * DEGREES_PER_PIXEL / TICS
    for name in pressed:
        if name in INPUTS:
            action[INPUTS[name]] = 1.0
    if slot is not None:
        action[f"SELECT_WEAPON{slot + 1}"] = 1.0
    game.make_action(list(action.values()), TICS)


def picture(state, width, height):
    """What the recording shows of the screen: an av.VideoFrame, yuv420p."""
    frame = av.VideoFrame.from_ndarray(state.screen_buffer, format="rgb24")

    # scaled as VPT's 1280x720 to 640x360
    return frame.reformat(width, height, "yuv420p", interpolation="AREA")


# --- a player ---


class Player:
    """The game in steps of a clip: `frames` pictures a step, one every `stride` ticks.

    After each step: z, features of the step, as `features` (a function of [av.VideoFrame]) makes
    them; yaw and pitch in degrees; place (x, y) in map units. A block is 32 units wide."""

    def __init__(self, game, frames, stride, features):
        self.game = game
        self.frames = frames
        self.stride = stride
        self.features = features
        self.width, self.height = map(int, SIZE.split("x"))

    def step(self, dx=0, dy=0, keys=()):
        """Mouse motion in pixels, spread over the ticks of the step, and keys that are pressed for
        all of it."""
        # a VPT recording names the mouse buttons by number
        ticks = self.frames * self.stride
        names = {"mouse.0": MOUSE[0], "mouse.1": MOUSE[1]}
        pressed = [names.get(name, name) for name in keys]

        seen = []
        for t in range(ticks):
            # rounded sums: no motion is lost
            x = round(dx * (t + 1) / ticks) - round(dx * t / ticks)
            y = round(dy * (t + 1) / ticks) - round(dy * t / ticks)
            tick(self.game, x, y, pressed)
            if (t + 1) % self.stride == 0:
                seen.append(picture(self.game.get_state(), self.width, self.height))
        # what a policy sees, and what only the judge of a trial knows
        self.z = self.features(seen)
        v = dict(zip(VARIABLES, self.game.get_state().game_variables.tolist()))
        self.yaw = -v["ANGLE"]
        self.pitch = v["PITCH"]
        self.place = np.array([v["POSITION_X"], v["POSITION_Y"]])

    def begin(self, rng, maps):
        """A random place of a random map, looking anywhere, at rest."""
        # a free spot of a map
        number = int(rng.choice(maps))
        points = start_points()[number]
        seed = int(rng.integers(2**31))
        begin(self.game, seed, number, points[rng.integers(len(points))])

        # land, turn and come to rest
        for dx in (0, 0, 0, 0, 0, rng.uniform(-1200, 1200), 0, 0):
            self.step(dx)

    def turn_away(self, rng):
        """A view 15 to 40 degrees to a side: its features, and the function that returns how far
        off the player looks, in degrees."""
        # look at the goal, then back
        dx = rng.choice([-1, 1]) * rng.uniform(15, 40) / DEGREES_PER_PIXEL
        for move in (dx, 0, 0):
            self.step(move)
        z, yaw = self.z, self.yaw
        for move in (-dx, 0, 0):
            self.step(move)
        return z, lambda: abs((self.yaw - yaw + 180) % 360 - 180)

    def walk_away(self, rng):
        """The view from a place some blocks ahead: its features, and the function that returns how
        far the player is from it, in map units. (None, None) where there is no way ahead."""
        for _ in range(50):
            # walk, look, and return
            start = self.place
            for _ in range(6):
                self.step(keys=["w"])
            for _ in range(3):
                self.step()
            z, goal = self.z, self.place
            self.game.send_game_command("warp {:.0f} {:.0f}".format(*start))
            for _ in range(3):
                self.step()

            # a goal must be some way off, and the way back must have worked
            walked = np.hypot(*(goal - start))
            off = np.hypot(*(self.place - start))
            if walked > 160 and off < 8:
                return z, lambda goal=goal: float(np.hypot(*(self.place - goal)))

            # a wall is in the way: turn
            for dx in (rng.uniform(300, 900), 0, 0):
                self.step(dx)
        return None, None

    def trial(self, task, rng, maps, act, steps):
        """One trial of a task ("turn" or "walk"): act(goal's features) does a step. -> distance to
        the goal (degrees, or map units) after 0, 1, ... steps."""
        # a place from which the task can be done
        goal = None
        while goal is None:
            self.begin(rng, maps)
            goal, distance = self.turn_away(rng) if task == "turn" else self.walk_away(rng)

        # the distance after each step
        track = [distance()]
        for _ in range(steps):
            act(goal)
            track.append(distance())
        return track
