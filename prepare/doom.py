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

FPS, TICS, PITCH_LIMIT = 20, 2, 31.0  # the software renderer stops at 32 upwards
MAPS = {"train": [*range(1, 25), 31, 32], "val": [*range(25, 31)]}
SIZE = "256x144"  # of recordings, unless asked for another
WAD = os.path.join(os.path.dirname(vizdoom.__file__), "freedoom2.wad")
MOUSE, SLOTS = ["attack", "use"], 7
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


def start_points():
    """{map number: [(x, y), ...]}: the deathmatch starts of every map, from the WAD: free spots
    spread over the whole map."""
    points = {}
    with open(WAD, "rb") as f:
        _, lumps, table = struct.unpack("<4sii", f.read(12))
        f.seek(table)
        table = list(struct.iter_unpack("<ii8s", f.read(16 * lumps)))
        for (_, _, name), (position, size, _) in zip(table, table[1:]):
            if name.startswith(
                b"MAP"
            ):  # the lump after a map's name is its things: x, y, angle, type, flags
                f.seek(position)
                points[int(name[3:5])] = [
                    (x, y)
                    for x, y, _, kind, _ in struct.iter_unpack("<5h", f.read(size))
                    if kind == 11
                ]
    return points


def open_game(size, seed, folder):
    """A headless game, ready for new_episode. folder: for its settings and what it caches of maps,
    which it writes where it starts."""
    game = vizdoom.DoomGame()
    game.set_doom_config_path(os.path.join(folder, "vizdoom.ini"))
    game.set_doom_game_path(WAD)
    twice = "RES_" + "X".join(
        str(2 * int(n)) for n in size.split("x")
    )  # where the engine can: without antialias a texture is noise
    game.set_screen_resolution(
        getattr(
            vizdoom.ScreenResolution,
            twice,
            getattr(vizdoom.ScreenResolution, f"RES_{size.upper()}"),
        )
    )
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    for off in (
        "window_visible",
        "sound_enabled",
        "render_hud",
        "render_messages",
        "render_crosshair",
        "render_screen_flashes",
    ):
        getattr(game, f"set_{off}")(False)
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in BUTTONS])
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in VARIABLES])
    game.set_doom_skill(1)  # the fewest monsters: at close quarters they push the player about
    game.set_seed(seed)
    game.add_game_args("+freelook 1 +sv_infiniteammo 1 +neverswitchonpickup 1 +con_midtime 0")
    here = os.getcwd()
    os.chdir(folder)
    try:
        game.init()
    finally:
        os.chdir(here)
    return game


def begin(game, seed, map_number, point):
    """A new episode at a point (x, y) of a map, in which nothing can kill the player."""
    game.set_seed(seed)
    game.set_doom_map(f"map{map_number:02d}")
    game.new_episode()
    for command in ("iddqd", "give weapons", "give ammo", "give keys", "warp {} {}".format(*point)):
        game.send_game_command(command)


def tick(game, dx, dy, held, slot=None):
    """One line of a recording: mouse motion in pixels, names of INPUTS that are held, a hotbar slot
    to change to."""
    action = dict.fromkeys(BUTTONS, 0.0)
    action["TURN_LEFT_RIGHT_DELTA"] = (
        dx * DEGREES_PER_PIXEL / TICS
    )  # the engine turns by this much every tic
    action["LOOK_UP_DOWN_DELTA"] = -dy * DEGREES_PER_PIXEL / TICS
    action.update({INPUTS[name]: 1.0 for name in held if name in INPUTS})
    if slot is not None:
        action[f"SELECT_WEAPON{slot + 1}"] = 1.0
    game.make_action(list(action.values()), TICS)


def picture(state, width, height):
    """What the recording shows of the screen: an av.VideoFrame, yuv420p."""
    frame = av.VideoFrame.from_ndarray(state.screen_buffer, format="rgb24")
    return frame.reformat(
        width, height, "yuv420p", interpolation="AREA"
    )  # as VPT's 1280x720 to 640x360


class Player:
    """The game in steps of a clip: `frames` pictures a step, one every `stride` ticks. z: features
    of the last step, as `features` (a function of [av.VideoFrame]) makes them; yaw and pitch in
    degrees, place (x, y) in map units, of which a block has 32."""

    def __init__(self, game, frames, stride, features):
        self.game, self.frames, self.stride, self.features = game, frames, stride, features
        self.width, self.height = map(int, SIZE.split("x"))

    def step(self, dx=0, dy=0, held=()):
        """Mouse motion in pixels, spread over the ticks of the step, and keys held for all of
        it."""
        seen, ticks = [], self.frames * self.stride
        held = [MOUSE[int(n[-1])] if n in ("mouse.0", "mouse.1") else n for n in held]
        for t in range(ticks):
            tick(
                self.game,
                *(round(v * (t + 1) / ticks) - round(v * t / ticks) for v in (dx, dy)),
                held,
            )
            if (t + 1) % self.stride == 0:
                seen.append(picture(self.game.get_state(), self.width, self.height))
        self.z = self.features(seen)
        v = dict(zip(VARIABLES, self.game.get_state().game_variables.tolist()))
        self.yaw, self.pitch, self.place = (
            -v["ANGLE"],
            v["PITCH"],
            np.array([v["POSITION_X"], v["POSITION_Y"]]),
        )

    def begin(self, rng, maps):
        """A random place of a random map, looking anywhere, at rest."""
        points, number = start_points(), int(rng.choice(maps))
        begin(
            self.game,
            int(rng.integers(2**31)),
            number,
            points[number][rng.integers(len(points[number]))],
        )
        for dx in (0, 0, 0, 0, 0, rng.uniform(-1200, 1200), 0, 0):
            self.step(dx)

    def turn_away(self, rng):
        """A view 15 to 40 degrees to a side: its features, and the function that says how far off
        the player looks, in degrees."""
        dx = rng.choice([-1, 1]) * rng.uniform(15, 40) / DEGREES_PER_PIXEL
        for move in (dx, 0, 0):
            self.step(move)
        z, yaw = self.z, self.yaw
        for move in (-dx, 0, 0):
            self.step(move)
        return z, lambda: abs((self.yaw - yaw + 180) % 360 - 180)

    def walk_away(self, rng):
        """The view from a place some blocks ahead: its features, and the function that says how far
        the player is from it, in map units."""
        for _ in range(50):
            start = self.place
            for _ in range(6):
                self.step(held=["w"])
            for _ in range(3):
                self.step()
            z, goal = self.z, self.place
            self.game.send_game_command("warp {:.0f} {:.0f}".format(*start))
            for _ in range(3):
                self.step()
            if np.hypot(*(goal - start)) > 160 and np.hypot(*(self.place - start)) < 8:
                return z, lambda goal=goal: float(np.hypot(*(self.place - goal)))
            for dx in (rng.uniform(300, 900), 0, 0):
                self.step(dx)
        return None, None  # walled in: another place must be begun at

    def trial(self, task, rng, maps, act, steps):
        """One trial of a task: act(goal's features) does a step. -> distance to the goal (degrees,
        or map units) after 0, 1, ... steps."""
        goal = None
        while goal is None:
            self.begin(rng, maps)
            goal, distance = self.turn_away(rng) if task == "turn" else self.walk_away(rng)
        track = [distance()]
        for _ in range(steps):
            act(goal)
            track.append(distance())
        return track
