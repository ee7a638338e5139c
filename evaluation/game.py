"""The game behind prepare.demo and evaluation.doom: ViZDoom on Freedoom 2, headless, moved by
the mouse and keys of a VPT recording.

A tick is two of the engine's 35 tics a second. A pixel of mouse motion is 0.15 degrees; yaw grows
to the right, pitch downwards."""

import os
import struct

import av
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


def open_game(size, seed, folder, monsters=True):
    """A headless game, ready for new_episode. folder: for its settings and for what it caches of
    maps, because it writes them into the working directory. monsters=False leaves them out."""
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
    if not monsters:
        game.add_game_args("-nomonsters")

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


def tick(game, dx, dy, pressed, slot=None, look=True):
    """One line of a recording: mouse motion in pixels, names of INPUTS that are pressed, a hotbar
    slot to change to. look=False draws no picture, which takes most of the time."""
    action = dict.fromkeys(BUTTONS, 0.0)
    # the engine turns by this much every tic
    action["TURN_LEFT_RIGHT_DELTA"] = dx * DEGREES_PER_PIXEL / TICS
    action["LOOK_UP_DOWN_DELTA"] = -dy * DEGREES_PER_PIXEL / TICS
    for name in pressed:
        if name in INPUTS:
            action[INPUTS[name]] = 1.0
    if slot is not None:
        action[f"SELECT_WEAPON{slot + 1}"] = 1.0
    game.set_action(list(action.values()))
    game.advance_action(TICS, look)


def picture(state, width, height):
    """What the recording shows of the screen: an av.VideoFrame, yuv420p."""
    frame = av.VideoFrame.from_ndarray(state.screen_buffer, format="rgb24")

    # scaled as VPT's 1280x720 to 640x360
    return frame.reformat(width, height, "yuv420p", interpolation="AREA")
