"""What a VPT recording is: JSONL lines -> ticks -> (action, state) of a step, mp4 -> frames, and
both -> a clip.

A *tick* is one line of a recording (1/20 s in VPT). Line t goes with frame t; its effect is visible
in frame t+1. A *step* is what the predictor sees at once; `ends[t]` is the last frame step t shows.
Action t sums every tick from ends[t] until ends[t+1], state t is taken at ends[t]. Angles are
radians, yaw to the right and pitch downwards are positive, mouse motion is in pixels of a 1280x720
window."""

import difflib
import functools
import io
import json
import math
import os
import re
import struct
import sys
import zlib
from typing import NamedTuple

import av
import numpy as np
import orjson
import torch
from av.sidedata.sidedata import Type as SideData

CONTINUOUS = ["mouse_dx", "mouse_dy", "yaw_diff", "pitch_diff"]
UNITS = ["pixels", "pixels", "radians", "radians"]
HOTBAR = [f"key.{n}" for n in range(1, 10)]
MOVES = [f"key.{n}" for n in ["w", "a", "s", "d", "space", "q", "f", "e", "escape", "left.shift"]]
BUTTONS = ["mouse.0", "mouse.1", "mouse.2"]
SLOTS = [f"slot.{n}" for n in range(1, 10)]
ACTION_SPACES = {
    13: CONTINUOUS + HOTBAR,  # the guides' reduced space
    36: (
        CONTINUOUS + HOTBAR + MOVES + ["key.left.control"] + BUTTONS + SLOTS
    ),  # VPT's 20 keys, 3 buttons, 9 slots
    38: (
        CONTINUOUS
        + HOTBAR
        + MOVES
        + ["key.right.shift", "key.left.control"]
        + BUTTONS
        + SLOTS
        + ["gui_open"]
    ),  # the guides' table
}
BITS = (
    HOTBAR + MOVES + ["key.left.control", "key.right.shift"] + BUTTONS + ["gui_open"]
)  # bit i of Ticks.keys
KEY_BIT = {
    "key.keyboard." + name[4:]: 1 << i for i, name in enumerate(BITS) if name.startswith("key.")
}
BUTTON_BIT = {
    n: 1 << BITS.index(f"mouse.{n}") for n in range(3)
}  # ids above 2 occur in real files and are ignored
GUI = 1 << BITS.index("gui_open")
DEGREES_PER_PIXEL = 0.15  # 360/2400, VPT's CAMERA_SCALER
SLACK = 5  # lines and frames of a real recording may differ by a few


def wrap(angle):
    """Radians to (-pi, pi]."""
    return np.pi - (np.pi - angle) % (2 * np.pi)


def nearest(name, names):
    """The name among `names` that is spelt most like `name`, or ''."""
    found = difflib.get_close_matches(name, names, 1, 0.5)
    return found[0] if found else ""


def check_spaces(spaces):
    """ValueError if an action space has a dimension that nothing fills, or one twice."""
    for number, names in spaces.items():
        if names[:4] != CONTINUOUS:
            raise ValueError(
                f"action space {number} starts with {names[:4]}: the first four dimensions of"
                f" every action space are {CONTINUOUS}"
            )
        for name in names[4:]:
            if name not in BITS + SLOTS:
                closest = nearest(name, BITS + SLOTS)
                hint = f" (nearest: {closest})" if closest else ""
                raise ValueError(
                    f"action space {number} names {name!r}{hint}, which no line of a recording"
                    f" fills: the names are those of CONTINUOUS, BITS and SLOTS in files/vpt.py"
                )
            if names.count(name) > 1:
                raise ValueError(f"action space {number} names {name!r} twice")


check_spaces(ACTION_SPACES)


# --- names of keys and buttons ---

# Minecraft's other key names. A recording may hold them; no action space has them.
OTHER_KEYS = [
    *"bcghijklmnoprtuvxyz0",
    *[f"f{n}" for n in range(1, 26)],
    *[f"keypad.{n}" for n in range(10)],
    *[f"keypad.{n}" for n in "add decimal divide enter equal multiply subtract".split()],
    *[f"left.{n}" for n in "alt bracket win".split()],
    *[f"right.{n}" for n in "alt bracket control win".split()],
    *"apostrophe backslash comma equal grave.accent minus period semicolon slash".split(),
    *"up down left right page.up page.down home end insert delete backspace".split(),
    *"enter tab menu pause print.screen scroll.lock caps.lock num.lock".split(),
    *"world.1 world.2 unknown".split(),
]
SIDED = {"shift": "shift", "control": "control", "ctrl": "control", "alt": "alt"}
ALIASES = {
    "esc": "escape",
    "return": "enter",
    "spacebar": "space",
    "bksp": "backspace",
    "del": "delete",
    "ins": "insert",
    "pgup": "page.up",
    "pgdn": "page.down",
    "arrowup": "up",
    "arrowdown": "down",
    "arrowleft": "left",
    "arrowright": "right",
}
SIGNS = {
    " ": "space",
    "'": "apostrophe",
    "\\": "backslash",
    ",": "comma",
    "=": "equal",
    "`": "grave.accent",
    "-": "minus",
    ".": "period",
    ";": "semicolon",
    "/": "slash",
    "[": "left.bracket",
    "]": "right.bracket",
    "\t": "tab",
}
# What a name may mean that is another program's word for it: only suggested.
MEANINGS = {
    "forward": "key.keyboard.w",
    "back": "key.keyboard.s",
    "backward": "key.keyboard.s",
    "jump": "key.keyboard.space",
    "sneak": "key.keyboard.left.shift",
    "shift": "key.keyboard.left.shift",
    "sprint": "key.keyboard.left.control",
    "control": "key.keyboard.left.control",
    "ctrl": "key.keyboard.left.control",
    "inventory": "key.keyboard.e",
    "drop": "key.keyboard.q",
    "swaphands": "key.keyboard.f",
    "keys": "keyboard.keys",
    "buttons": "mouse.buttons",
    "attack": "button 0",
    "use": "button 1",
    "pickitem": "button 2",
}


def key_spellings():
    """Letters and digits of every spelling that can only mean one key -> that key's name in
    Minecraft, without "key.keyboard."."""
    known = [name.removeprefix("key.keyboard.") for name in KEY_BIT] + OTHER_KEYS
    out = {name.replace(".", ""): name for name in known}
    out |= {"key" + name: name for name in known if len(name) == 1}  # as browsers write it
    out |= {"digit" + str(n): str(n) for n in range(10)}
    out |= {"numpad" + str(n): f"keypad.{n}" for n in range(10)}
    for short, name in SIDED.items():
        for side in ("left", "right"):
            for spelling in (side + short, short + side, side[0] + short, short + side[0]):
                out[spelling] = f"{side}.{name}"
    return out | ALIASES


def button_spellings():
    """The same for the buttons of the mouse -> their number."""
    out = {}
    for number, name in enumerate(("left", "right", "middle")):
        words = ("", "mouse", "button", "mousebutton", "click")
        out |= {name + word: number for word in words} | {word + name: number for word in words}
        out[name[0] + "mb"] = number
    return out | {str(n): n for n in range(8)} | {f"mouse.{n}": n for n in range(8)}


KEY_SPELLINGS = key_spellings()
BUTTON_SPELLINGS = button_spellings()


@functools.lru_cache(10_000)
def key_bit(name):
    """The bit of a key in any unambiguous spelling ("w", "key.w", "KeyW", "left_shift"); 0 for a
    key that no action space has, None for a name that nobody knows."""
    if name in SIGNS:
        name = SIGNS[name]
    words = re.findall(r"[^\W_]+", name.lower())
    while len(words) > 1 and words[0] in ("key", "keyboard", "keys", "glfw", "minecraft", "vk"):
        words = words[1:]
    known = KEY_SPELLINGS.get("".join(words))
    return None if known is None else KEY_BIT.get("key.keyboard." + known, 0)


def button_number(name):
    """The number of a mouse button in any unambiguous spelling, or None. Text such as "button1" is
    not one: some count from 0, others from 1."""
    if isinstance(name, bool):
        return None
    if isinstance(name, (int, float)):
        return int(name) if name in range(8) else None
    if not isinstance(name, str):
        return None
    name = name.strip().lower()
    if re.fullmatch(r"[0-7]\.0", name):
        name = name[0]
    if name in BUTTON_SPELLINGS:
        return BUTTON_SPELLINGS[name]
    words = re.findall(r"[^\W_]+", name)
    if words[:2] == ["key", "mouse"] and words[2:] in (["4"], ["5"], ["6"], ["7"], ["8"]):
        return int(words[2]) - 1  # Minecraft's name for those without a name
    if words[:2] == ["key", "mouse"]:
        words = words[1:]
    return BUTTON_SPELLINGS.get("".join(words))


def valid_text(text):
    """Text less the halves of characters that JSON may hold and no file can ("\\ud83d")."""
    return text.encode("utf-8", "replace").decode()


def as_json(value):
    """A value of a line as it is written there."""
    return valid_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def unknown_label(kind, name, known):
    """How a name that nobody knows is reported, with the nearest known one."""
    text = valid_text(name) if isinstance(name, str) else as_json(name)
    plain = "".join(re.findall(r"[^\W_]+", text.lower()))
    short = plain.removeprefix("key").removeprefix("board")
    closest = MEANINGS.get(plain) or MEANINGS.get(short, "")
    if not closest and len(known) == 1:
        closest = known[0]
    if not closest and isinstance(name, str):
        spellings = {re.sub(r"[\W_]|key\.keyboard\.", "", x.lower()): x for x in known}
        closest = spellings.get(nearest(short.removeprefix("keyboard"), list(spellings)), "")
    shown = text if len(text) <= 40 else text[:37] + "..."
    return f'{kind} "{shown}"' + (f' (nearest known name: "{closest}")' if closest else "")


def name_warnings(unknown):
    """{label: lines} of Ticks.unknown, of one recording or added up -> a sentence each."""
    out = [
        f"{label} on {lines:,} line{'s' if lines > 1 else ''}: nobody knows this name, so it counts"
        " as no input"
        for label, lines in sorted(unknown.items(), key=lambda x: (-x[1], x[0]))
    ]
    return out[:10] + ([f"{len(out) - 10} more names are not known"] if len(out) > 10 else [])


# --- lines to ticks ---

MOUSE_FIELDS = "dx dy x y scaledX scaledY dwheel buttons newButtons".split()
KEYBOARD_FIELDS = "keys newKeys chars".split()
FIELDS = (
    "mouse keyboard isGuiOpen isGuiInventory hotbar yaw pitch camera xpos ypos zpos tick milli"
    " timestamp inventory serverTick serverTickDurationMs stats"
).split()
TRUE = ("true", "1", "1.0", "yes", "y", "on", "t")
FALSE = ("false", "0", "0.0", "no", "n", "off", "f", "", "none", "null")
TIMES = ["tick", "milli", "timestamp"]
COLUMNS = [
    *"dx dy yaw pitch degrees bits new_attack only_attack hotbar".split(),
    *TIMES,
    "line",
]  # of the table that parse_ticks makes of the lines
BOM = b"\xef\xbb\xbf"
SAID = set()  # names that this process has warned of


class Ticks(NamedTuple):
    """The lines of one recording: motion (n, 4) float64 = dx, dy in pixels and yaw, pitch in
    radians (absolute); keys (n,) uint32 bit set in the order of BITS; hotbar (n,) uint8 slot 0..8;
    rate in Hz, and stamped: whether timestamps say so (else it is VPT's 20); flaw: why the tail was
    dropped, or ''; line (n,) int64: which line of the file each is (from 0); total: how many lines
    that are not blank the file has; unknown: {name that nobody knows: lines}."""

    motion: np.ndarray
    keys: np.ndarray
    hotbar: np.ndarray
    rate: float
    flaw: str
    stamped: bool
    line: np.ndarray
    total: int
    unknown: dict

    def arrays(self):
        """For np.savez."""
        return self._asdict() | {"unknown": orjson.dumps(self.unknown).decode()}

    @classmethod
    def of(cls, arrays):
        """The inverse of arrays()."""
        kinds = {"rate": float, "flaw": str, "stamped": bool, "total": int}
        fields = {k: kinds.get(k, np.asarray)(arrays[k]) for k in cls._fields if k != "unknown"}
        return cls(**fields, unknown=orjson.loads(str(arrays["unknown"])))


def shown(value):
    """A value of a line, for a message."""
    text = as_json(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_list(value, what, separated):
    """What a line says is held -> a list of names: a list, one name or several in one string, or
    {name: whether it is held}."""
    if not value and not isinstance(value, (int, float)):
        return []
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        return [name for name, held in value.items() if truth(held, f"{what} {name}")]
    if isinstance(value, str):
        return separated(value)
    raise ValueError(f"{what} is {shown(value)}, not a list")


def separated_names(known):
    """A function that splits a string at blanks, commas, + and the like, if only then all of its
    parts are names."""

    def split(text):
        if known(text) is not None:
            return [text]
        for between in (r"\s*[,;|+]\s*", r"[\s,;|+]+"):
            parts = [part for part in re.split(between, text) if part]
            if parts and None not in map(known, parts):
                return parts
        return [text]

    return split


separated_keys = separated_names(key_bit)
separated_buttons = separated_names(button_number)


def truth(value, what):
    """True or False of what a line says; ValueError for what is neither."""
    if value is None or isinstance(value, bool):
        return bool(value)
    text = str(value).strip().lower() if isinstance(value, (str, int, float)) else "?"
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise ValueError(f"{what} is {shown(value)}, neither true nor false")


def read_json(line):
    """The value of a line of JSON. Python's json module writes NaN and Infinity, which are no JSON;
    what is typed may be half a character, or in another encoding than UTF-8. None of this says
    anything against the other fields of the line."""
    try:
        return orjson.loads(line)
    except ValueError:
        try:
            return json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            pass
        raise


class LineReader:
    """Lines of one recording -> rows of numbers. Counts the names that nobody knows."""

    def __init__(self):
        self.unknown = {}
        self.key_bits = dict(KEY_BIT)

    def count(self, kind, name, known):
        label = unknown_label(kind, name, known)
        if label not in self.unknown and len(self.unknown) >= 100:
            label = "other names"
        self.unknown[label] = self.unknown.get(label, 0) + 1

    def keys(self, keyboard):
        """The bits of the keys that are held."""
        if isinstance(keyboard, (list, str)):
            keyboard = {"keys": keyboard}
        if not isinstance(keyboard, dict):
            raise ValueError(f'keyboard is {shown(keyboard)}, not {{"keys": [...]}}')
        if "keys" not in keyboard:
            for field in keyboard.keys() - set(KEYBOARD_FIELDS):
                self.count("keyboard field", field, ["keys"])
        bits = 0
        for name in as_list(keyboard.get("keys"), "keyboard.keys", separated_keys):
            bit = key_bit(name) if isinstance(name, str) else None
            if bit is None:
                self.count("key", name, KEY_BIT)
            else:
                bits |= bit
                self.key_bits[name] = bit
        return bits

    def buttons(self, value, what):
        """The numbers of the buttons that are held."""
        out = []
        for name in as_list(value, what, separated_buttons):
            number = button_number(name)
            if number is not None:
                out.append(number)
            elif isinstance(name, (int, float)) and not isinstance(name, bool) and name > 7:
                continue  # ids above 2 occur in real files and mean nothing
            else:
                self.count("button", name, ["left", "right", "middle", "0", "1", "2"])
        return out

    def time(self, value, name):
        """A field that tells when the line was; NaN if the line does not have it. Only timestamps
        must be numbers: what other programs mean by the others is theirs."""
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (ValueError, TypeError):
            number = math.nan
        if math.isfinite(number):
            return number
        if name == "timestamp":
            raise ValueError(f"timestamp is {shown(value)}, which is no number of seconds")
        return math.nan

    def slot(self, value):
        """0..8, or NaN for a line that does not say."""
        if value is None:
            return math.nan
        try:
            slot = float(value)
        except (ValueError, TypeError):
            slot = -1.0
        if slot not in range(9):
            raise ValueError(f"hotbar slot {shown(value)} is out of range: 0 to 8 are known")
        return slot

    def camera(self, camera):
        """yaw and pitch of the guides' lines, in radians, and 0.0: not in degrees."""
        if camera is None:
            raise ValueError("no yaw or camera")
        if not isinstance(camera, list) or len(camera) != 2:
            raise ValueError(f"camera is {shown(camera)}, not [yaw, pitch] in radians")
        try:
            return float(camera[0]), float(camera[1]), 0.0
        except (ValueError, TypeError) as e:
            raise ValueError(f"camera is {shown(camera)}, not two numbers") from e

    def fields(self, d):
        """Count the names of fields that nobody knows on a line that lacks those that are."""
        mouse = d.get("mouse") or {}
        if not {"mouse", "keyboard"} <= d.keys():
            for field in d.keys() - set(FIELDS):
                self.count("field", field, FIELDS)
        if "dx" not in mouse or "dy" not in mouse:
            for field in mouse.keys() - set(MOUSE_FIELDS):
                self.count("mouse field", field, MOUSE_FIELDS)

    def __call__(self, line):
        """One JSON object -> its row of COLUMNS but the last, NaN where it says nothing. Raises
        ValueError, TypeError or KeyError."""
        d = read_json(line)
        if not isinstance(d, dict):
            raise ValueError(f"{shown(d)} is no JSON object")
        mouse, keyboard = d.get("mouse"), d.get("keyboard")
        if mouse is None:
            mouse = {}
        if not isinstance(mouse, dict):
            raise ValueError(f'mouse is {shown(mouse)}, not {{"dx": ..., "dy": ...}}')
        dx, dy = mouse.get("dx"), mouse.get("dy")
        if dx is None or dy is None or keyboard is None:
            self.fields(d)

        # keys and buttons: what is spelt as VPT spells it takes the short way
        bits = 0
        if keyboard:
            try:
                for name in keyboard["keys"]:
                    bits |= self.key_bits[name]
                plain = type(keyboard["keys"]) is list
            except (KeyError, TypeError):
                plain = False
            if not plain:
                bits = self.keys(keyboard)
        held, new = mouse.get("buttons"), mouse.get("newButtons")
        if held == [0] and type(held[0]) is int:
            bits |= BUTTON_BIT[0]
        elif held is not None and held != []:
            for number in self.buttons(held, "mouse.buttons"):
                bits |= BUTTON_BIT.get(number, 0)
        if new is not None and new != []:
            new = self.buttons(new, "mouse.newButtons")
        gui = d.get("isGuiOpen")
        if gui is None:
            gui = d.get("isGuiInventory")
        if gui is not False and truth(gui, "isGuiOpen"):
            bits |= GUI

        try:
            dx, dy = float(dx or 0), float(dy or 0)
        except (ValueError, TypeError) as e:
            raise ValueError(f"mouse.dx and dy are {shown([dx, dy])}, not numbers") from e
        yaw, degrees = d.get("yaw"), 1.0
        if yaw is None:
            yaw, pitch, degrees = self.camera(d.get("camera"))
        else:
            pitch = d["pitch"]
            try:
                yaw, pitch = float(yaw), float(pitch)
            except (ValueError, TypeError) as e:
                raise ValueError(f"yaw and pitch are {shown([yaw, pitch])}, not numbers") from e
        if not math.isfinite(dx + dy + yaw + pitch):
            raise ValueError(f"motion {(dx, dy, yaw, pitch)} is out of range")
        new_attack = bool(new) and 0 in new
        slot = d.get("hotbar")
        if type(slot) is not int or not 0 <= slot <= 8:
            slot = self.slot(slot)
        times = [d.get("tick"), d.get("milli"), d.get("timestamp")]
        for i, value in enumerate(times):
            if type(value) is not int and type(value) is not float:
                times[i] = self.time(value, TIMES[i])
        return (dx, dy, yaw, pitch, degrees, bits, new_attack, new == [0], slot, *times)


def parse_ticks(data):
    """The JSONL bytes of a recording -> Ticks, for contractor lines (yaw, pitch in degrees) and the
    guides' (camera in radians).

    Lines are put in the order of their `tick`, `milli` or `timestamp`. Blank lines are passed over.
    Known flaws of real recordings: attack stuck from line 0 is released, null mouse or keyboard is
    no input, a bad line (torn, NaN, no angle) drops the rest of the recording and is named in
    `flaw`, since lines after it can no longer be trusted to match their frames. Names that nobody
    knows are counted, and said once. Raises ValueError when not one line is good, when lines are
    out of order and cannot be sorted, or when camera is clearly not in radians."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("no usable line: the text is UTF-16; save it as UTF-8")
    rows, flaw, total, read = [], "", 0, LineReader()
    for i, line in enumerate(data.splitlines()):
        line = line.removeprefix(BOM)
        if not line or line.isspace():
            continue
        total += 1
        if flaw:
            continue  # only counted
        try:
            rows.append((*read(line), i))
        except KeyError as e:
            flaw = f"line {i}: no {e}"
        except (ValueError, TypeError, OverflowError) as e:  # orjson's error is a ValueError
            flaw = f"line {i}: {e}"
    if not rows:
        hint = ""
        if data.removeprefix(BOM).lstrip()[:1] == b"[":
            hint = "; one JSON object a line is expected, not a list of them"
        raise ValueError(f"no usable line ({flaw or 'the file is empty'}{hint})")
    table = np.array(rows, dtype=np.float64)
    column = dict(zip(COLUMNS, table[line_order(table, flaw)].T))

    motion = np.stack([column[k] for k in ("dx", "dy", "yaw", "pitch")], axis=1)
    in_degrees = column["degrees"] == 1
    check_radians(motion[~in_degrees])
    motion[in_degrees, 2:] = np.radians(motion[in_degrees, 2:])

    # Attack that line 0 says is newly pressed is stuck until it is newly pressed again.
    keys = column["bits"].astype(np.uint32)
    if column["only_attack"][0]:
        again = np.flatnonzero(column["new_attack"][1:])
        keys[: again[0] + 1 if len(again) else None] &= np.uint32(~BUTTON_BIT[0] & 0xFFFFFFFF)

    # The wheel leaves no key in the recording: inject the one that does the same.
    hotbar = filled(column["hotbar"]).astype(np.uint8)
    changed = np.flatnonzero(np.diff(hotbar)) + 1
    keys[changed] |= np.uint32(1) << hotbar[changed].astype(np.uint32)

    rate = line_rate(column["timestamp"])
    for label in [name for name in read.unknown if name not in SAID][:10]:
        SAID.add(label)
        print(f"WARNING: {label} in a recording: nobody knows this name", file=sys.stderr)
    return Ticks(
        motion,
        keys,
        hotbar,
        rate or 20.0,
        flaw,
        rate is not None,
        column["line"].astype(np.int64),
        total,
        read.unknown,
    )


def filled(values):
    """NaN takes the value before it; before the first value, the first; 0 if there is none."""
    good = np.flatnonzero(~np.isnan(values))
    if not len(good):
        return np.zeros(len(values))
    last = np.maximum(np.searchsorted(good, np.arange(len(values)), side="right") - 1, 0)
    return values[good[last]]


def line_order(table, flaw):
    """The order of the lines by what they say themselves. ValueError if that cannot be told."""
    stays = np.arange(len(table))
    backwards = {}
    for name in TIMES:
        values = table[:, COLUMNS.index(name)]
        known = values[~np.isnan(values)]
        if len(known) < 2:
            continue
        back = np.flatnonzero(np.diff(known) < 0)
        if not len(back):
            return stays  # a clock that was set back, or ticks that start again, do not reorder
        backwards[name] = values
    if not backwards:
        return stays
    name, values = next(iter(backwards.items()))
    where = "lines are out of order by their " + " and ".join(backwards)
    if flaw:
        raise ValueError(f"{where}, and there is a bad one ({flaw}): no order can be trusted")
    if np.isnan(values).any() or len(np.unique(values)) < len(values):
        raise ValueError(f"{where}, and {name} is missing or the same on some: sort the file first")
    order = np.argsort(values)
    steps = np.diff(values[order])
    if steps.max() > 10 * np.median(steps):  # such as a game that was started again
        raise ValueError(f"{where}, and there is a gap in {name} once they are sorted")
    for others in backwards.values():
        if (np.diff(others[order]) < 0).any():
            raise ValueError(f"{where}, which do not agree: sort the file first")
    return order


def check_radians(motion):
    """ValueError if the angles (yaw, pitch) of lines with `camera` are not in radians. Yaw may grow
    beyond a full turn, as long as it moves as radians do."""
    if not len(motion):
        return
    reach = np.abs(motion[:, 2:]).max(axis=0)
    turn = 2 * np.pi + 1e-3
    fits = reach.max() <= turn
    if not fits and reach[1] <= np.pi / 2 + 1e-2:
        turned, mouse = np.diff(motion[:, 2]), motion[:-1, 0]
        slope = abs(turned @ mouse) / (mouse @ mouse) if mouse.any() else 0.0
        fits = np.abs(turned).max(initial=0) <= np.pi and slope <= 0.05
    if not fits:
        raise ValueError(
            f"camera reaches {reach.max():.1f}, which is no angle in radians; write yaw and pitch"
            " in degrees instead"
        )


def line_rate(stamps):
    """Lines a second by their timestamps (n,), NaN where a line has none; None if no line has one.
    ValueError if they tell no rate.

    Seconds are expected; milli-, micro- and nanoseconds are known by their size, since play has 1
    to 250 lines a second. Stamps may be rounded (to whole seconds, say): time is taken where they
    change. Pauses do not count."""
    known = np.flatnonzero(~np.isnan(stamps))
    if not len(known):
        return None
    if len(stamps) == 1:
        return None
    if len(known) < 2:
        raise ValueError(f"timestamp is on {len(known)} of {len(stamps)} lines: give it to all")
    at, times = known.astype(np.float64), stamps[known]
    if (np.diff(times) == 0).any():
        changes = np.flatnonzero(np.diff(times) > 0) + 1
        at, times = at[changes], times[changes]
        if len(at) < 2:
            raise ValueError(
                f"timestamp changes {len(at)} times on {len(stamps)} lines: too rarely to tell"
                " their rate; leave it out if there are 20 lines a second"
            )
    interval = steady_interval(at, times)
    for unit in (1.0, 1e-3, 1e-6, 1e-9):
        if 0.004 <= interval * unit <= 1.01:
            return float(1.0 / (interval * unit))
    raise ValueError(
        f"timestamps are {interval:g} apart from line to line: seconds are expected, 1 to 250 lines"
        " a second"
    )


def steady_interval(at, times):
    """Mean time from one number of `at` to the next, without pauses: what takes more than 2.5 times
    as long as most, and clocks that are set back. Rounding makes a step half or twice as long, no
    more. 0.0 if time never goes on."""
    lines, seconds = np.diff(at), np.diff(times)
    each = seconds / lines
    forward = each > 0
    if not forward.any():
        return 0.0
    steady = forward & (each <= 2.5 * np.median(each[forward]))
    return seconds[steady].sum() / lines[steady].sum()


def peek_rate(head, whole):
    """Lines a second of a recording by the first bytes of its JSONL (whole: they are all); None if
    only the whole file can tell."""
    stamps = []
    for line in head.removeprefix(BOM).splitlines()[: None if whole else -1]:
        if not line or line.isspace():
            continue
        try:
            stamp = read_json(line).get("timestamp")
            stamps.append(math.nan if stamp is None else float(stamp))
        except (ValueError, TypeError, AttributeError):
            return None
    stamps = np.array(stamps)
    if len(stamps) and np.isnan(stamps).all():
        return 20.0
    if len(np.unique(stamps)) < 10 or np.isnan(stamps).any() or (np.diff(stamps) < 0).any():
        return None
    try:
        return line_rate(stamps)
    except ValueError:
        return None


# --- ticks to steps ---


def step_size(rate, fps):
    """Ticks between two sampled frames. Raises ValueError when fps does not divide the line rate
    (within 2 %)."""
    stride = round(rate / fps)
    if stride < 1 or abs(rate / fps - stride) > 0.02 * stride:
        raise ValueError(
            f"--fps {fps:g} does not divide the recording's {rate:g} lines a second; take"
            f" {rate / max(stride, 1):g}"
        )
    return stride


def step_actions(ticks, ends, action_space=13):
    """Ticks, ends (T,) increasing tick numbers -> actions (T-1, A) unscaled float64, states (T, 2):
    yaw relative to ends[0], pitch.

    Continuous: sums of dx, dy over the ticks ends[t]..ends[t+1]-1, sum of the differences of yaw
    from tick to tick, each wrapped (a step may turn by more than half a circle), difference of
    pitch. Keys and buttons: held on any of those ticks. Hotbar slot: at the first of them."""
    ends = np.asarray(ends)
    inside = ends[:-1] - ends[0]
    names = ACTION_SPACES[action_space]
    actions = np.zeros((len(ends) - 1, len(names)))
    if len(inside):
        turned = wrap(np.diff(ticks.motion[ends[0] : ends[-1] + 1, 2]))
        actions[:, 0:2] = np.add.reduceat(ticks.motion[ends[0] : ends[-1], :2], inside)
        actions[:, 2] = np.add.reduceat(turned, inside)
        actions[:, 3] = np.diff(ticks.motion[ends, 3])
        held = np.bitwise_or.reduceat(ticks.keys[ends[0] : ends[-1]], inside)
        bits = [i for i, name in enumerate(names) if name in BITS]
        shift = np.array([BITS.index(names[i]) for i in bits], dtype=np.uint32)
        actions[:, bits] = (held[:, None] >> shift) & 1
        slots = [i for i, name in enumerate(names) if name in SLOTS]
        number = np.array([SLOTS.index(names[i]) for i in slots])
        actions[:, slots] = ticks.hotbar[ends[:-1], None] == number
    yaw = ticks.motion[ends, 2]
    states = np.stack([wrap(yaw - yaw[0]), ticks.motion[ends, 3]], axis=1)
    return actions, states


def flip_actions(actions, states, action_space):
    """Mirror left and right: mouse_dx, yaw_diff and yaw change sign, a and d change places. Returns
    new arrays."""
    names = ACTION_SPACES[action_space]
    actions, states = actions.copy(), states.copy()
    actions[:, [0, 2]] *= -1
    states[:, 0] = wrap(-states[:, 0])
    if "key.a" in names:
        a, d = names.index("key.a"), names.index("key.d")
        actions[:, [a, d]] = actions[:, [d, a]]
    return actions, states


# --- frames ---


def mp4_times(f):
    """A seekable mp4 -> (frames,) int64 presentation times in stream units, in display order: from
    its index, or from every packet if the index does not tell (fragments, edit lists that cut
    frames out).

    Also the guard against truncated files: the top-level boxes must hold moov and mdat and end
    where the file ends (ISO 14496-12)."""

    def boxes(span):
        at, end, out = *span, {}
        while at < end:
            f.seek(at)
            head = f.read(16)
            size, kind, wide = struct.unpack(">I4sQ", head.ljust(16, b"\0"))
            start, size = (16, wide) if size == 1 else (8, size or end - at)
            if size < start or at + size > end:
                raise ValueError(
                    f"the mp4 is truncated or damaged: box {kind} at byte {at} claims {size} bytes"
                    f" of {end - at}"
                )
            out.setdefault(kind, []).append((at + start, at + size))
            at += size
        return out

    def child(span, *path):
        for kind in path:
            span = boxes(span)[kind][0]
        return span

    def table(span, v0, v1=None):  # a full box: version, flags, row count, rows
        f.seek(span[0])
        version, count = struct.unpack(">B3xI", f.read(8))
        dtype = np.dtype(v1 if version and v1 else v0)
        return np.frombuffer(f.read(min(count * dtype.itemsize, span[1] - f.tell())), dtype)

    def spread(rows):  # (count, value) -> a value per frame
        if rows["f0"].sum() > end:
            raise ValueError(
                "the mp4's index is damaged: it claims more frames than the file has bytes"
            )
        return np.repeat(rows["f1"], rows["f0"]).astype(np.int64)

    def timescale(span):
        f.seek(span[0])
        head = f.read(24)
        return struct.unpack(">I", head[20:24] if head[0] else head[12:16])[0]

    end = f.seek(0, os.SEEK_END)
    if not end:
        raise ValueError("the video has zero bytes")
    top = boxes((0, end))
    if not {b"moov", b"mdat"} <= top.keys():
        raise ValueError("not a whole mp4 (no moov and mdat boxes)")
    moov = boxes(top[b"moov"][0])
    try:
        for track in moov.get(b"trak", []):
            f.seek(child(track, b"mdia", b"hdlr")[0] + 8)
            if f.read(4) != b"vide":
                continue
            stbl = boxes(child(track, b"mdia", b"minf", b"stbl"))
            steps = spread(table(stbl[b"stts"][0], ">u4,>u4"))
            times = np.cumsum(steps) - steps
            if b"ctts" in stbl:  # display minus decode time
                times += spread(table(stbl[b"ctts"][0], ">u4,>i4"))[: len(times)]
            if b"moof" in top or not len(times):
                return packet_times(f)
            if b"edts" in boxes(
                track
            ):  # usually takes off the delay that B-frames cause, and nothing else
                edits = table(child(track, b"edts", b"elst"), ">u4,>i4,>i4", ">u8,>i8,>i4")
                duration, start, _ = edits[0].tolist()
                shown = (
                    duration
                    * timescale(child(track, b"mdia", b"mdhd"))
                    / timescale(moov[b"mvhd"][0])
                )
                if len(edits) > 1 or times.min() != start or times.max() >= start + shown:
                    return packet_times(f)
                times -= start
            return np.sort(times)
    except (KeyError, struct.error, IndexError, ZeroDivisionError) as e:
        raise ValueError(f"the mp4's index is damaged ({e!r})") from e
    raise ValueError("the mp4 has no video track")


def packet_times(f):
    """Presentation times of the frames that a decoder will show, by reading every packet."""
    f.seek(0)
    with av.open(f) as container:
        return np.sort(
            np.array(
                [p.pts for p in container.demux(video=0) if p.pts is not None and not p.is_discard],
                dtype=np.int64,
            )
        )


def fitting(width, height, short_side):
    """(width, height) with that short side, of the same shape."""
    scale = short_side / min(width, height)
    return max(round(width * scale), short_side), max(round(height * scale), short_side)


def upright(frame, short_side):
    """A decoded frame as players show it -> (H, W, 3) uint8, resized with antialias: turned and
    mirrored as the file says (phones, cameras mounted upside down). Pixels that are not square stay
    as they are stored."""
    width, height = fitting(frame.width, frame.height, short_side)
    picture = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BILINEAR")

    # x, y of a stored pixel are shown at (a x + c y, b x + d y)
    (a, b), (c, d) = display_matrix(frame)
    if not (a or d) and b and c:
        picture = picture.transpose(1, 0, 2)
        a, d = c, b
    elif b or c or not (a and d):
        raise ValueError("it is to be shown at an angle that is no multiple of 90 degrees")
    if a < 0:
        picture = picture[:, ::-1]
    if d < 0:
        picture = picture[::-1]
    return picture


def display_matrix(frame):
    """The 2 x 2 part that turns and mirrors; what rounding left of an angle of 90 degrees is 0."""
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return np.eye(2)
    matrix = np.frombuffer(bytes(data), dtype=np.int32).reshape(3, 3)[:2, :2] / 65536
    return np.where(np.abs(matrix) < 1e-3, 0.0, matrix)


class WrongDecoder(ValueError):
    """decord would give other pictures of this recording than PyAV. That says nothing against the
    recording: to leave it out would be another run."""


def read_frames(f, times, wanted, short_side, decoder="pyav"):
    """Frames by number in display order (never by time x fps) -> (len(wanted), H, W, 3) uint8, the
    short side resized with antialias.

    f: seekable file; times: from mp4_times or packet_times; wanted: increasing frame numbers.
    Raises ValueError or av.FFmpegError; WrongDecoder where decord must not be used."""
    wanted = [int(i) for i in wanted]
    if decoder == "decord":
        return read_with_decord(f, times, wanted, short_side)
    pictures = {}
    missing = set(wanted)
    back = 0
    f.seek(0)
    with av.open(f) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("its codec is unknown")
        stream.codec_context.thread_count = 1

        # Frames that cannot be decoded from the key frame before them are tried from further back:
        # leading frames of an open GOP, and all that follows a "key frame" of intra refresh.
        while missing:
            first = max(min(missing) - back, 0)
            for number, frame in frames_from(container, stream, times, first):
                if number in missing:
                    pictures[number] = upright(frame, short_side)
                    missing.remove(number)
                if not missing or number > max(missing):
                    break
            if not first:
                break
            back = max(8 * back, 1)
    if missing:
        raise ValueError(f"frames {sorted(missing)[:4]} cannot be decoded")
    return np.stack([pictures[i] for i in wanted])


def frames_from(container, stream, times, first):
    """(number, frame) from the key frame at or before frame `first` on, whole pictures only.

    Recovery points of intra refresh are called key frames too. What a decoder shows after one may
    be torn for a long time, whatever it promises, so that nothing is yielded after them. From frame
    0 on everything is: there is no earlier place to start at."""
    try:
        container.seek(int(times[first]), stream=stream, backward=True, any_frame=False)
    except av.error.PermissionError:  # no key frame before it
        if first:
            return
        container.seek(int(times[0]), stream=stream, backward=True, any_frame=True)
    whole = not first
    start = None
    for packet in container.demux(stream):
        if start is None:
            start = packet.pts
        for frame in packet.decode():
            number = len(times) if frame.pts is None else int(np.searchsorted(times, frame.pts))
            if number >= len(times) or times[number] != frame.pts:
                raise ValueError(f"frame time {frame.pts} is not in the mp4's index")
            if not whole:
                intra = frame.pict_type == av.video.frame.PictureType.I
                whole = intra and (frame.key_frame or frame.pts == start)
            if whole:
                yield number, frame
            elif start is None or frame.pts >= start:
                return


# --- decord ---

proven = {}  # (bytes, CRC-32) of videos that were compared with PyAV -> their places to start at


def read_with_decord(f, times, wanted, short_side):
    """read_frames by decord, which counts frames in its own way: WrongDecoder where that is not the
    index's. The first frames of a video that are read are compared with PyAV's."""
    try:
        import decord
    except ImportError as e:
        raise RuntimeError("--decoder decord needs: pip install decord2") from e
    f.seek(0)
    raw = f.read()
    video = len(raw), zlib.crc32(raw)
    starts = proven.get(video) or decord_starts(raw, times)
    with av.open(io.BytesIO(raw)) as container:
        stream = container.streams.video[0]
        width, height = fitting(stream.width, stream.height, short_side)
    try:
        reader = decord.VideoReader(io.BytesIO(raw), width=width, height=height, num_threads=1)
        count = len(reader)
        if count == len(times):
            pictures = decord_frames(reader, wanted, starts)
    except (decord.DECORDError, IndexError, RuntimeError, AssertionError) as e:
        read_frames(f, times, wanted, short_side)  # raises if the recording is what is damaged
        text = str(e).partition("\n")[0]
        raise WrongDecoder(f"decord cannot read what PyAV can ({text}): use --decoder pyav") from e
    if count != len(times):
        raise WrongDecoder(
            f"decord counts {count} frames, the mp4's index has {len(times)}: use --decoder pyav"
        )
    if pictures.shape[1:] != (height, width, 3):
        raise WrongDecoder(
            f"decord makes pictures of {pictures.shape[1:]} in place of {width} x {height} pixels:"
            " use --decoder pyav"
        )
    if video not in proven:
        difference = largest_difference(pictures, read_frames(f, times, wanted, short_side))
        if difference > 6:
            raise WrongDecoder(
                f"decord shows other pictures than PyAV, which differ by {difference:.0f} of 255:"
                " use --decoder pyav"
            )
        if len(proven) == 100_000:
            proven.clear()
        proven[video] = starts
    return pictures


def decord_frames(reader, wanted, starts):
    """Frames by number. decord would seek to any key frame; where decoding cannot start at all of
    them, it reads on from the last place where it can."""
    if set(reader.get_key_indices()) <= set(starts):
        return reader.get_batch(wanted).asnumpy()
    following = max(s for s in starts if s <= wanted[0])
    reader.seek(following)
    pictures = {}
    for number in sorted(set(wanted)):
        for _ in range(number - following):  # skip_frames() would seek
            reader.next()
        pictures[number] = reader.next().asnumpy()
        following = number + 1
    return np.stack([pictures[i] for i in wanted])


def largest_difference(pictures, others):
    """The mean difference of the two pictures that differ most, over blocks of 8 pixels: inside
    them two ways to resize may differ."""
    size = min(8, *pictures.shape[1:3])
    rows, columns = (n // size for n in pictures.shape[1:3])
    means = []
    for x in (pictures, others):
        x = x[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size, 3)
        means.append(x.mean((2, 4)))
    return np.abs(means[0] - means[1]).mean((1, 2, 3)).max()


def decord_starts(raw, times):
    """Numbers of the frames of an mp4 at which decord can start: key frames that depend on nothing
    before them, with no later packet that is shown earlier. WrongDecoder where it would choose,
    count or show other frames than the index says."""

    def refused(reason):
        return WrongDecoder(f"decord would show wrong pictures, since {reason}: use --decoder pyav")

    with av.open(io.BytesIO(raw)) as container:
        tracks = len(container.streams.video)
        if tracks > 1:
            raise refused(f"the file has {tracks} video tracks, of which it may choose another")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise ValueError("its codec is unknown")
        packets = [p for p in container.demux(stream) if p.size]
        if any(p.is_discard for p in packets):
            raise refused("the edit list hides frames")
        unknown = len(times)
        shown = [unknown if p.pts is None else int(np.searchsorted(times, p.pts)) for p in packets]
        if sorted(shown) != list(range(len(times))):
            raise refused("the frames of the file are not those of its index")

        # The packets before a place to start at are those of the frames shown before it.
        starts = []
        codec, extra = context.name, bytes(context.extradata or b"")
        latest = np.maximum.accumulate([-1, *shown])
        for i, p in enumerate(packets):
            closed = shown[i] == i and latest[i] < i
            if p.is_keyframe and closed and (not i or starts_anew(bytes(p), codec, extra)):
                starts.append(i)
        if not starts or starts[0]:
            raise refused("its first frame is no key frame")

        context.flush_buffers()
        frame = next((x for p in packets for x in p.decode()), None)
        if frame is not None and not np.array_equal(display_matrix(frame), np.eye(2)):
            raise refused("the file asks for its pictures to be turned")
    return starts


def starts_anew(packet, codec, extra):
    """Whether decoding can start at a packet: in H.264 only an IDR picture is sure to depend on
    nothing before it, in HEVC a random access picture (ISO 14496-15: units with their sizes)."""
    if codec not in ("h264", "hevc") or not extra.startswith(b"\1"):
        return codec not in ("h264", "hevc")
    width = 1 + (extra[4 if codec == "h264" else 21] & 3)
    at = 0
    while at + width < len(packet):
        size = int.from_bytes(packet[at : at + width], "big")
        head = packet[at + width]
        if codec == "h264" and 1 <= head & 31 <= 5:
            return head & 31 == 5
        if codec == "hevc" and (head >> 1 & 63) < 32:
            return 16 <= (head >> 1 & 63) <= 21
        at += width + size
    return False


# --- one clip ---


def video_rate(f, times):
    """Frames a second of an open video by its own clock; None of fewer than two frames. times: from
    mp4_times."""
    if len(times) < 2:
        return None
    f.seek(0)
    with av.open(f) as container:
        unit = container.streams.video[0].time_base
    interval = steady_interval(np.arange(len(times)), times)
    return float(1 / (interval * unit)) if interval and unit else None


class ClipReader:
    """Cuts clips out of recordings; the same object serves indexed and streamed shards.

    The clip is a dict: video (frames_per_clip, 3, crop, crop) uint8, actions (T-1, A) float32
    (scaled if there is a scaler), states (T, 2) float32, key. T = frames_per_clip /
    frames_per_step. encode says which frame a step ends on (DESIGN: tubelet its last, else its
    first). gui="drop" leaves out clips with an open GUI. Augmentations are off at their defaults:
    horizontal_flip mirrors half of the clips, actions too; random_resize_scale is the smallest crop
    as a share of the short side; motion_shift moves the crop over the clip by up to that share of
    it; temporal_jitter moves each sampled frame by up to that many ticks; action_noise is a std in
    scaled units."""

    def __init__(
        self,
        frames_per_clip=16,
        fps=5.0,
        frames_per_step=2,
        crop_size=256,
        action_space=13,
        scaler=None,
        encode="tubelet",
        decoder="pyav",
        gui="keep",
        horizontal_flip=False,
        random_resize_scale=1.0,
        motion_shift=0.0,
        temporal_jitter=0,
        action_noise=0.0,
    ):
        if frames_per_clip % frames_per_step or frames_per_clip < 2 * frames_per_step:
            raise ValueError(
                f"--frames_per_clip {frames_per_clip} is not two or more steps of --frames_per_step"
                f" {frames_per_step}"
            )
        if action_space not in ACTION_SPACES:
            raise ValueError(f"--action_space {action_space} is not one of {list(ACTION_SPACES)}")
        if horizontal_flip and len({"key.a", "key.d"} & set(ACTION_SPACES[action_space])) == 1:
            raise ValueError(
                f"--horizontal_flip: action space {action_space} has only one of key.a and key.d,"
                " which change places in a mirror: add the other, or drop the flag"
            )
        self.frames, self.fps, self.frames_per_step = frames_per_clip, fps, frames_per_step
        self.crop, self.action_space = crop_size, action_space
        self.scaler, self.encode, self.decoder, self.gui, self.flip = (
            scaler,
            encode,
            decoder,
            gui,
            horizontal_flip,
        )
        self.resize, self.shift, self.jitter, self.noise = (
            random_resize_scale,
            motion_shift,
            temporal_jitter,
            action_noise,
        )

    def starts(self, ticks, frames, video_rate=None):
        """Number of ticks at which a clip can start. Raises ValueError if the recording is too
        short, or lines and frames disagree. video_rate: frames a second, by video_rate()."""
        lines = len(ticks.motion)
        flaw = f" ({ticks.flaw})" if ticks.flaw else ""
        needed = step_size(ticks.rate, self.fps) * (self.frames - 1) + 1
        usable = min(lines, frames)
        if usable >= needed:
            usable = min(lines, frames // self.frames_per_line(ticks, frames, video_rate))
        if usable < needed:
            raise ValueError(
                f"too short: {lines} usable lines{flaw} and {frames} frames, a clip needs {needed}"
            )
        return usable - needed + 1

    def frames_per_line(self, ticks, frames, video_rate=None):
        """1 in VPT, and wherever there are as many lines as frames; else how many times the video
        runs faster than the lines. Raises ValueError if lines and frames cannot belong together. A
        recording whose tail was dropped may have fewer lines than its video, not more, and only
        its clocks can say which frame a line goes with (at 20 Hz without video_rate: its own)."""
        lines = len(ticks.motion)
        flaw = f" ({ticks.flaw})" if ticks.flaw else ""
        unclear = (
            f"{lines} lines{flaw} but {frames} frames: which line goes with which frame is unknown"
        )
        if abs(ticks.total - frames) <= SLACK:
            return 1
        ratio = max(round((video_rate or 20) / ticks.rate), 1)
        if video_rate and abs(video_rate / ticks.rate / ratio - 1) > 0.05:
            raise ValueError(
                f"{unclear} ({ticks.rate:.4g} lines and {video_rate:.4g} frames a second)"
            )
        if not ticks.flaw and abs(lines - frames / ratio) > SLACK:
            raise ValueError(unclear)
        if ticks.flaw and lines > frames / ratio + SLACK:
            raise ValueError(unclear)
        if ticks.flaw and not video_rate:
            whole = round(frames / ticks.total)
            stretched = whole > 1 and abs(ticks.total - frames / whole) <= SLACK
            if ticks.rate <= 15 or stretched:
                raise ValueError(unclear)
        return ratio

    def ratio(self, f, times, ticks):
        """frames_per_line of an open video, whose clock is looked at only if it matters."""
        if abs(ticks.total - len(times)) <= SLACK:
            return 1
        return self.frames_per_line(ticks, len(times), video_rate(f, times))

    def __call__(self, f, times, ticks, start, rng, key):
        """A clip from tick `start` of a recording, or None if --gui drop leaves it out. rng is used
        by the augmentations only."""
        stride, ratio = step_size(ticks.rate, self.fps), self.ratio(f, times, ticks)
        sampled = start + stride * np.arange(self.frames)
        if self.jitter:
            order = np.arange(
                self.frames
            )  # each frame stays after the one before, inside the recording
            last = min(len(ticks.motion), len(times) // ratio) - self.frames
            sampled = sampled + rng.integers(-self.jitter, self.jitter + 1, self.frames)
            sampled = np.clip(np.maximum.accumulate(sampled - order), 0, last) + order
        shown = sampled.reshape(-1, self.frames_per_step)
        ends = shown[:, -1] if self.encode == "tubelet" else shown[:, 0]
        if self.gui == "drop" and (ticks.keys[sampled[0] : sampled[-1] + 1] & GUI).any():
            return None
        actions, states = step_actions(ticks, ends, self.action_space)
        scale = rng.uniform(self.resize, 1.0) if self.resize < 1 else 1.0
        short = round(self.crop / scale * (1 + self.shift))
        video = read_frames(f, times, sampled * ratio, short, self.decoder)
        room = np.array([video.shape[1] - self.crop, video.shape[2] - self.crop])
        corner = room / 2 if scale == 1 and not self.shift else rng.uniform(0, 1, 2) * room
        end = (
            np.clip(corner + rng.uniform(-1, 1, 2) * self.shift * self.crop, 0, room)
            if self.shift
            else corner
        )
        corners = np.floor(
            corner + np.linspace(0, 1, self.frames)[:, None] * (end - corner)
        ).astype(int)
        video = np.stack(
            [v[y : y + self.crop, x : x + self.crop] for v, (y, x) in zip(video, corners)]
        )
        if self.flip and rng.random() < 0.5:
            video = video[:, :, ::-1]
            actions, states = flip_actions(actions, states, self.action_space)
        if self.scaler is not None:
            actions = self.scaler.transform(actions)
        if self.noise:
            actions[:, :4] += self.noise * rng.standard_normal(actions[:, :4].shape)
        return {
            "video": torch.from_numpy(np.ascontiguousarray(video.transpose(0, 3, 1, 2))),
            "actions": torch.from_numpy(actions.astype(np.float32)),
            "states": torch.from_numpy(states.astype(np.float32)),
            "key": key,
        }
