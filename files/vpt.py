"""What a VPT recording is. Its JSONL lines become ticks, ticks become the actions and states of
steps, and together with frames of its mp4 they become a clip.

A *tick* is one line of a recording (1/20 s in VPT). Line t goes with frame t; its effect is visible
in frame t+1. A *step* is what the predictor sees at once; `ends[t]` is the last frame step t shows.
Action t sums every tick from ends[t] until ends[t+1], state t is taken at ends[t]. Angles are
radians, yaw to the right and pitch downwards are positive, mouse motion is in pixels of a 1280x720
window."""

import difflib
import functools
import json
import math
import re
import sys
from typing import NamedTuple

import numpy as np
import orjson
import torch

from files.video import read_frames, steady_interval, video_rate

CONTINUOUS = ["mouse_dx", "mouse_dy", "yaw_diff", "pitch_diff"]
UNITS = ["pixels", "pixels", "radians", "radians"]
HOTBAR = [f"key.{n}" for n in range(1, 10)]
MOVES = [f"key.{n}" for n in ["w", "a", "s", "d", "space", "q", "f", "e", "escape", "left.shift"]]
BUTTONS = ["mouse.0", "mouse.1", "mouse.2"]
SLOTS = [f"slot.{n}" for n in range(1, 10)]
RIGHT_SHIFT = ["key.right.shift"]
CONTROL = ["key.left.control"]
ACTION_SPACES = {
    # the guides' reduced space
    13: CONTINUOUS + HOTBAR,
    # what moves the player or the view: no hotbar
    18: CONTINUOUS + MOVES + CONTROL + BUTTONS,
    # VPT's 20 keys, 3 buttons, 9 slots
    36: CONTINUOUS + HOTBAR + MOVES + CONTROL + BUTTONS + SLOTS,
    # the guides' table
    38: CONTINUOUS + HOTBAR + MOVES + RIGHT_SHIFT + CONTROL + BUTTONS + SLOTS + ["gui_open"],
}

# Bit i of Ticks.keys. Buttons above 2 occur in real files and are ignored.
BITS = HOTBAR + MOVES + CONTROL + RIGHT_SHIFT + BUTTONS + ["gui_open"]
KEY_BIT = {
    "key.keyboard." + name[4:]: 1 << i for i, name in enumerate(BITS) if name.startswith("key.")
}
BUTTON_BIT = {n: 1 << BITS.index(f"mouse.{n}") for n in range(3)}
GUI = 1 << BITS.index("gui_open")
DEGREES_PER_PIXEL = 0.15  # 360/2400, VPT's CAMERA_SCALER
SLACK = 5  # lines and frames of a real recording may differ by a few


def hotbar_columns(names):
    """Indices of the hotbar's keys and slots among the names of actions. The hotbar is at the
    bottom of every picture, so a model can read these actions there and need not look at the
    world."""
    return [i for i, name in enumerate(names) if name in HOTBAR + SLOTS]


def wrap(angle):
    """Radians to (-pi, pi]."""
    return np.pi - (np.pi - angle) % (2 * np.pi)


def nearest(name, names):
    """The name among `names` that is spelt most like `name`, or ''."""
    matches = difflib.get_close_matches(name, names, 1, 0.5)
    return matches[0] if matches else ""


def check_spaces(spaces):
    """Raises ValueError if an action space has a dimension that no line fills, or one twice."""
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

# Minecraft's other key names. A recording may contain them; no action space does.
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
# Words of other programs and what they may mean. Messages suggest it; nothing is replaced.
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
    """{spelling: name} of every spelling that can only mean one key. Spellings are reduced to their
    letters and digits; names are Minecraft's, without "key.keyboard."."""
    names = [name.removeprefix("key.keyboard.") for name in KEY_BIT] + OTHER_KEYS
    spellings = {name.replace(".", ""): name for name in names}

    # as browsers write it: KeyW, Digit1, Numpad1
    spellings |= {"key" + name: name for name in names if len(name) == 1}
    spellings |= {"digit" + str(n): str(n) for n in range(10)}
    spellings |= {"numpad" + str(n): f"keypad.{n}" for n in range(10)}

    # the two keys of a kind: leftshift, shiftleft, lshift, shiftl
    for short, name in SIDED.items():
        for side in ("left", "right"):
            for spelling in (side + short, short + side, side[0] + short, short + side[0]):
                spellings[spelling] = f"{side}.{name}"
    return spellings | ALIASES


def button_spellings():
    """{spelling: number} of every spelling that can only mean one button of the mouse."""
    spellings = {}
    for number, name in enumerate(("left", "right", "middle")):
        for word in ("", "mouse", "button", "mousebutton", "click"):
            spellings[name + word] = number
            spellings[word + name] = number
        spellings[name[0] + "mb"] = number
    for number in range(8):
        spellings[str(number)] = number
        spellings[f"mouse.{number}"] = number
    return spellings


KEY_SPELLINGS = key_spellings()
BUTTON_SPELLINGS = button_spellings()


@functools.lru_cache(10_000)
def key_bit(name):
    """The bit of a key in any unambiguous spelling ("w", "key.w", "KeyW", "left_shift"); 0 for a
    key that no action space has, None for an unknown name."""
    name = SIGNS.get(name, name)
    words = re.findall(r"[^\W_]+", name.lower())
    while len(words) > 1 and words[0] in ("key", "keyboard", "keys", "glfw", "minecraft", "vk"):
        words = words[1:]
    minecraft_name = KEY_SPELLINGS.get("".join(words))
    if minecraft_name is None:
        return None
    return KEY_BIT.get("key.keyboard." + minecraft_name, 0)


def button_number(name):
    """The number of a mouse button in any unambiguous spelling, or None. "button1" is ambiguous:
    some programs count from 0, others from 1."""
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

    # Minecraft counts the buttons that have no name from 4: key.mouse.4 is number 3
    words = re.findall(r"[^\W_]+", name)
    if words[:2] == ["key", "mouse"] and words[2:] in (["4"], ["5"], ["6"], ["7"], ["8"]):
        return int(words[2]) - 1
    if words[:2] == ["key", "mouse"]:
        words = words[1:]
    return BUTTON_SPELLINGS.get("".join(words))


def valid_text(text):
    """Text without halves of characters ("\\ud83d"), which JSON may contain and no file can."""
    return text.encode("utf-8", "replace").decode()


def as_json(value):
    """A value of a line as it is written there."""
    return valid_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def unknown_label(kind, name, known):
    """How an unknown name is reported, with the nearest of the known ones."""
    text = valid_text(name) if isinstance(name, str) else as_json(name)
    label = f'{kind} "{shorten(text, 40)}"'
    suggested = nearest_name(text, known, isinstance(name, str))
    if suggested:
        label += f' (nearest known name: "{suggested}")'
    return label


def nearest_name(text, known, by_spelling):
    """What an unknown name may mean, or "". by_spelling: compare it with the known names too."""
    plain = "".join(re.findall(r"[^\W_]+", text.lower()))
    short = plain.removeprefix("key").removeprefix("board")
    suggested = MEANINGS.get(plain) or MEANINGS.get(short, "")
    if suggested:
        return suggested
    if len(known) == 1:
        return known[0]
    if not by_spelling:
        return ""
    spellings = {re.sub(r"[\W_]|key\.keyboard\.", "", x.lower()): x for x in known}
    return spellings.get(nearest(short.removeprefix("keyboard"), list(spellings)), "")


def shorten(text, length):
    """Text for a message: cut to so many characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def name_warnings(unknown):
    """One sentence for each of the ten most frequent unknown names. unknown: {label: lines}, the
    Ticks.unknown of one recording or of several added up."""
    sentences = []
    for label, lines in sorted(unknown.items(), key=lambda x: (-x[1], x[0])):
        plural = "s" if lines > 1 else ""
        sentences.append(
            f"{label} on {lines:,} line{plural}: an unknown name, so it counts as no input"
        )
    if len(sentences) > 10:
        return sentences[:10] + [f"{len(sentences) - 10} more names are unknown"]
    return sentences


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
# of the table that parse_ticks makes of the lines
COLUMNS = [
    *"dx dy yaw pitch degrees bits new_attack only_attack hotbar".split(),
    *TIMES,
    "line",
]
BOM = b"\xef\xbb\xbf"
WARNED_OF = set()  # unknown names that this process has warned of


class Ticks(NamedTuple):
    """The good lines of one recording, n of them.

    motion: (n, 4) float64: dx, dy in pixels; yaw, pitch in radians, absolute.
    keys: (n,) uint32 set of bits in the order of BITS.
    hotbar: (n,) uint8 slot 0..8.
    rate: lines a second.
    flaw: why the rest of the recording was dropped, or "".
    stamped: whether timestamps gave the rate (if not, it is VPT's 20).
    line: (n,) int64: the number of each line in the file, from 0.
    total: how many lines of the file are not blank.
    unknown: {unknown name: lines}."""

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
    return shorten(as_json(value), 60)


def as_list(value, what, separated):
    """The names that a line gives as pressed. It may give a list, one or several names in one
    string, or {name: whether it is pressed}."""
    if not value and not isinstance(value, (int, float)):
        return []
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        return [name for name, pressed in value.items() if truth(pressed, f"{what} {name}")]
    if isinstance(value, str):
        return separated(value)
    raise ValueError(f"{what} is {shown(value)}, not a list")


def separated_names(number_of):
    """A function that splits a string into names. It splits at commas, + and the like, or also at
    blanks, but only where every part is then a name. number_of: a name's number, None if the name
    is unknown."""

    def split(text):
        if number_of(text) is not None:
            return [text]
        for between in (r"\s*[,;|+]\s*", r"[\s,;|+]+"):
            parts = [part for part in re.split(between, text) if part]
            if parts and None not in map(number_of, parts):
                return parts
        return [text]

    return split


separated_keys = separated_names(key_bit)
separated_buttons = separated_names(button_number)


def truth(value, what):
    """A value of a line as True or False. Raises ValueError if it is neither."""
    if value is None or isinstance(value, bool):
        return bool(value)
    text = str(value).strip().lower() if isinstance(value, (str, int, float)) else "?"
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise ValueError(f"{what} is {shown(value)}, neither true nor false")


def read_json(line):
    """The value of a line of JSON, or of what some writers take for JSON: NaN and Infinity, as
    Python's json module writes them, half a character that was typed, or another encoding than
    UTF-8. The other fields of such a line are good."""
    try:
        return orjson.loads(line)
    except ValueError:
        try:
            return json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            pass
        raise


class LineReader:
    """Lines of one recording -> rows of numbers. Counts the unknown names."""

    def __init__(self):
        self.unknown = {}
        self.key_bits = dict(KEY_BIT)  # and every other spelling met so far

    def __call__(self, line):
        """One JSON object -> its row of COLUMNS without the last, NaN where the line has no value.
        Raises ValueError or TypeError."""
        fields = read_json(line)
        if not isinstance(fields, dict):
            raise ValueError(f"{shown(fields)} is no JSON object")
        mouse = fields.get("mouse")
        if mouse is None:
            mouse = {}
        if not isinstance(mouse, dict):
            raise ValueError(f'mouse is {shown(mouse)}, not {{"dx": ..., "dy": ...}}')
        self.look_for_unknown_fields(fields, mouse)

        bits = self.pressed_keys(fields.get("keyboard"))
        bits |= self.pressed_buttons(mouse.get("buttons"))
        new = self.new_buttons(mouse.get("newButtons"))
        new_attack = 0 in new
        only_attack = new == [0]
        if self.gui_is_open(fields):
            bits |= GUI

        dx, dy = self.mouse_motion(mouse)
        yaw, pitch, degrees = self.angles(fields)
        if not math.isfinite(dx + dy + yaw + pitch):
            raise ValueError(f"motion {(dx, dy, yaw, pitch)} is out of range")

        slot = self.slot(fields.get("hotbar"))
        times = [self.time(fields.get(name), name) for name in TIMES]
        return (dx, dy, yaw, pitch, degrees, bits, new_attack, only_attack, slot, *times)

    # names

    def count(self, kind, name, known):
        """Count a line with an unknown name; known: the names it may be a misspelling of."""
        label = unknown_label(kind, name, known)
        if label not in self.unknown and len(self.unknown) >= 100:
            label = "other names"
        self.unknown[label] = self.unknown.get(label, 0) + 1

    def look_for_unknown_fields(self, fields, mouse):
        """Count the unknown fields of a line that lacks a known one: they may be misspellings."""
        if "mouse" not in fields or "keyboard" not in fields:
            for name in fields.keys() - set(FIELDS):
                self.count("field", name, FIELDS)
        if "dx" not in mouse or "dy" not in mouse:
            for name in mouse.keys() - set(MOUSE_FIELDS):
                self.count("mouse field", name, MOUSE_FIELDS)

    # keys and buttons

    def pressed_keys(self, keyboard):
        """The bits of the keys that are pressed."""
        if not keyboard:
            return 0

        # the short way, for a list of spellings that were met before
        bits = 0
        try:
            for name in keyboard["keys"]:
                bits |= self.key_bits[name]
            if type(keyboard["keys"]) is list:
                return bits
        except (KeyError, TypeError):
            pass
        return self.keys_in_any_spelling(keyboard)

    def keys_in_any_spelling(self, keyboard):
        """The bits of the pressed keys, whatever the line calls them."""
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

    def pressed_buttons(self, value):
        """The bits of the buttons that are pressed."""
        if value is None or value == []:
            return 0
        if value == [0] and type(value[0]) is int:  # nearly always
            return BUTTON_BIT[0]
        bits = 0
        for number in self.button_numbers(value, "mouse.buttons"):
            bits |= BUTTON_BIT.get(number, 0)
        return bits

    def new_buttons(self, value):
        """The numbers of the buttons that went down on this line."""
        if value is None or value == []:
            return []
        return self.button_numbers(value, "mouse.newButtons")

    def button_numbers(self, value, what):
        """A line's list of buttons -> their numbers."""
        numbers = []
        for name in as_list(value, what, separated_buttons):
            number = button_number(name)
            if number is not None:
                numbers.append(number)
                continue
            # numbers that no mouse has occur in real files and mean nothing
            is_number = isinstance(name, (int, float)) and not isinstance(name, bool)
            if not is_number or not name > 7:
                self.count("button", name, ["left", "right", "middle", "0", "1", "2"])
        return numbers

    def gui_is_open(self, fields):
        value = fields.get("isGuiOpen")
        if value is None:
            value = fields.get("isGuiInventory")
        return value is not False and truth(value, "isGuiOpen")

    # motion

    def mouse_motion(self, mouse):
        """dx, dy in pixels; 0 where the line has none."""
        dx = mouse.get("dx")
        dy = mouse.get("dy")
        try:
            return float(dx or 0), float(dy or 0)
        except (ValueError, TypeError) as e:
            raise ValueError(f"mouse.dx and dy are {shown([dx, dy])}, not numbers") from e

    def angles(self, fields):
        """yaw, pitch, and 1.0 if they are in degrees (VPT's fields), 0.0 if in radians (the guides'
        camera)."""
        yaw = fields.get("yaw")
        if yaw is None:
            return *self.camera(fields.get("camera")), 0.0
        if "pitch" not in fields:
            raise ValueError("no 'pitch'")
        pitch = fields["pitch"]
        try:
            return float(yaw), float(pitch), 1.0
        except (ValueError, TypeError) as e:
            raise ValueError(f"yaw and pitch are {shown([yaw, pitch])}, not numbers") from e

    def camera(self, camera):
        """yaw and pitch of the guides' lines, in radians."""
        if camera is None:
            raise ValueError("no yaw or camera")
        if not isinstance(camera, list) or len(camera) != 2:
            raise ValueError(f"camera is {shown(camera)}, not [yaw, pitch] in radians")
        try:
            return float(camera[0]), float(camera[1])
        except (ValueError, TypeError) as e:
            raise ValueError(f"camera is {shown(camera)}, not two numbers") from e

    # the rest

    def slot(self, value):
        """0..8, or NaN if the line has none."""
        if type(value) is int and 0 <= value <= 8:
            return value
        if value is None:
            return math.nan
        try:
            slot = float(value)
        except (ValueError, TypeError):
            slot = -1.0
        if slot not in range(9):
            raise ValueError(f"hotbar slot {shown(value)} is out of range: 0 to 8 are known")
        return slot

    def time(self, value, name):
        """A field of TIMES, NaN if the line does not have it. Only a timestamp must be a number:
        other programs may use the other two for something else."""
        if type(value) is int or type(value) is float:
            return value
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


def parse_ticks(data):
    """The JSONL bytes of a recording -> Ticks. Reads contractor lines (yaw and pitch in degrees)
    and the guides' (camera in radians).

    Lines are put in the order of their `tick`, `milli` or `timestamp`. Blank lines are ignored.
    Real recordings have known flaws: attack that is stuck from line 0 is released, and a null mouse
    or keyboard is no input. A bad line (cut short, NaN, without an angle) drops the rest of the
    recording and is named in `flaw`, because later lines can no longer be trusted to match their
    frames. Unknown names are counted and warned of once.

    Raises ValueError if there is no good line, if lines are out of order and cannot be sorted, or
    if camera is clearly not in radians."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("no usable line: the text is UTF-16; save it as UTF-8")
    reader = LineReader()
    rows, flaw, total = read_rows(data, reader)
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

    # Attack that line 0 reports as newly pressed is stuck until it is newly pressed again.
    keys = column["bits"].astype(np.uint32)
    if column["only_attack"][0]:
        again = np.flatnonzero(column["new_attack"][1:])
        stuck_until = again[0] + 1 if len(again) else len(keys)
        keys[:stuck_until] &= np.uint32(~BUTTON_BIT[0] & 0xFFFFFFFF)

    # Turning the wheel leaves no key in the recording: add the key that does the same.
    hotbar = filled(column["hotbar"]).astype(np.uint8)
    changed = np.flatnonzero(np.diff(hotbar)) + 1
    keys[changed] |= np.uint32(1) << hotbar[changed].astype(np.uint32)

    rate = line_rate(column["timestamp"])
    warn_once(reader.unknown)
    return Ticks(
        motion=motion,
        keys=keys,
        hotbar=hotbar,
        rate=rate or 20.0,
        flaw=flaw,
        stamped=rate is not None,
        line=column["line"].astype(np.int64),
        total=total,
        unknown=reader.unknown,
    )


def read_rows(data, reader):
    """(rows of COLUMNS of the lines before the first bad one, what is wrong with that line or "",
    number of lines that are not blank)."""
    rows = []
    flaw = ""
    total = 0
    for i, line in enumerate(data.splitlines()):
        line = line.removeprefix(BOM)
        if not line or line.isspace():
            continue
        total += 1
        if flaw:
            continue  # only counted
        try:
            rows.append((*reader(line), i))
        except (ValueError, TypeError, OverflowError) as e:  # orjson's error is a ValueError
            flaw = f"line {i}: {e}"
    return rows, flaw, total


def warn_once(unknown):
    """Warn of the first ten unknown names that this process has not warned of yet."""
    for label in [name for name in unknown if name not in WARNED_OF][:10]:
        WARNED_OF.add(label)
        print(f"WARNING: {label} in a recording: an unknown name", file=sys.stderr)


def filled(values):
    """Replace NaN by the value before it, or by the first value if none is before it, or by 0 if
    there is no value at all."""
    good = np.flatnonzero(~np.isnan(values))
    if not len(good):
        return np.zeros(len(values))
    last = np.maximum(np.searchsorted(good, np.arange(len(values)), side="right") - 1, 0)
    return values[good[last]]


def line_order(table, flaw):
    """The order of the lines by their own tick, milli or timestamp. table: rows of COLUMNS. Raises
    ValueError if they are out of order and cannot be sorted."""
    as_they_are = np.arange(len(table))
    backwards = {}
    for name in TIMES:
        values = table[:, COLUMNS.index(name)]
        present = values[~np.isnan(values)]
        if len(present) < 2:
            continue
        if not (np.diff(present) < 0).any():
            # one clock in order is enough: another was set back, or its ticks started again
            return as_they_are
        backwards[name] = values
    if not backwards:
        return as_they_are

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
    """Raises ValueError if the angles (yaw, pitch) of lines with `camera` are not in radians. Yaw
    may grow beyond a full turn, if it turns with the mouse as much as radians do."""
    if not len(motion):
        return
    reach = np.abs(motion[:, 2:]).max(axis=0)
    turn = 2 * np.pi + 1e-3
    fits = reach.max() <= turn
    if not fits and reach[1] <= np.pi / 2 + 1e-2:
        turned = np.diff(motion[:, 2])
        mouse = motion[:-1, 0]
        radians_per_pixel = 0.0
        if mouse.any():
            radians_per_pixel = abs(turned @ mouse) / (mouse @ mouse)
        fits = np.abs(turned).max(initial=0) <= np.pi and radians_per_pixel <= 0.05
    if not fits:
        raise ValueError(
            f"camera reaches {reach.max():.1f}, which is no angle in radians; write yaw and pitch"
            " in degrees instead"
        )


def line_rate(stamps):
    """Lines a second by their timestamps (n,), NaN where a line has none; None if no line has one.
    Raises ValueError if the timestamps give no rate.

    Seconds are expected. Milli-, micro- and nanoseconds are recognised by their size, since play
    has 1 to 250 lines a second. Stamps may be rounded (to whole seconds, for example): only the
    lines where they change are counted. Pauses do not count."""
    stamped = np.flatnonzero(~np.isnan(stamps))
    if not len(stamped):
        return None
    if len(stamps) == 1:
        return None
    if len(stamped) < 2:
        raise ValueError(f"timestamp is on {len(stamped)} of {len(stamps)} lines: give it to all")
    lines = stamped.astype(np.float64)
    times = stamps[stamped]
    if (np.diff(times) == 0).any():
        changes = np.flatnonzero(np.diff(times) > 0) + 1
        lines = lines[changes]
        times = times[changes]
        if len(lines) < 2:
            raise ValueError(
                f"timestamp changes {len(lines)} times on {len(stamps)} lines: too rarely to tell"
                " their rate; leave it out if there are 20 lines a second"
            )
    interval = steady_interval(lines, times)
    for unit in (1.0, 1e-3, 1e-6, 1e-9):
        if 0.004 <= interval * unit <= 1.01:
            return float(1.0 / (interval * unit))
    raise ValueError(
        f"timestamps are {interval:g} apart from line to line: seconds are expected, 1 to 250 lines"
        " a second"
    )


def peek_rate(head, whole):
    """Lines a second of a recording by the first bytes of its JSONL; None if only the whole file
    can tell. whole: `head` is the whole file."""
    lines = head.removeprefix(BOM).splitlines()
    if not whole:
        lines = lines[:-1]  # the last one may be cut
    stamps = []
    for line in lines:
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
    pitch. Keys and buttons: pressed on any of those ticks. Hotbar slot: at the first of them."""
    ends = np.asarray(ends)
    names = ACTION_SPACES[action_space]
    actions = np.zeros((len(ends) - 1, len(names)))
    if len(ends) > 1:
        inside = slice(ends[0], ends[-1])  # the ticks that count
        first_ticks = ends[:-1] - ends[0]  # of every step, counted from ends[0]

        turned = wrap(np.diff(ticks.motion[ends[0] : ends[-1] + 1, 2]))
        actions[:, 0:2] = np.add.reduceat(ticks.motion[inside, :2], first_ticks)
        actions[:, 2] = np.add.reduceat(turned, first_ticks)
        actions[:, 3] = np.diff(ticks.motion[ends, 3])

        pressed = np.bitwise_or.reduceat(ticks.keys[inside], first_ticks)
        columns = [i for i, name in enumerate(names) if name in BITS]
        bits = np.array([BITS.index(names[i]) for i in columns], dtype=np.uint32)
        actions[:, columns] = (pressed[:, None] >> bits) & 1

        columns = [i for i, name in enumerate(names) if name in SLOTS]
        slots = np.array([SLOTS.index(names[i]) for i in columns])
        actions[:, columns] = ticks.hotbar[ends[:-1], None] == slots
    yaw = ticks.motion[ends, 2]
    states = np.stack([wrap(yaw - yaw[0]), ticks.motion[ends, 3]], axis=1)
    return actions, states


def flip_actions(actions, states, action_space):
    """Mirror left and right: mouse_dx, yaw_diff and yaw change sign, a and d change places. Returns
    new arrays."""
    names = ACTION_SPACES[action_space]
    actions = actions.copy()
    states = states.copy()
    actions[:, [0, 2]] *= -1
    states[:, 0] = wrap(-states[:, 0])
    if "key.a" in names:
        a = names.index("key.a")
        d = names.index("key.d")
        actions[:, [a, d]] = actions[:, [d, a]]
    return actions, states


# --- one clip ---


class ClipReader:
    """Cuts clips out of recordings. The same object serves indexed and streamed shards.

    A clip is a dict: video (frames_per_clip, 3, crop, crop) uint8, actions (T-1, A) float32, scaled
    if there is a scaler, states (T, 2) float32, key. T = frames_per_clip / frames_per_step.

    encode: which frame a step ends on: with "tubelet" its last, else its first.
    gui: "drop" leaves out clips with an open GUI.

    Augmentations are off at their defaults:
    horizontal_flip: mirror half of the clips, with their actions.
    random_resize_scale: the smallest crop as a share of the short side.
    motion_shift: move the crop over the clip by up to that share of it.
    temporal_jitter: move each sampled frame by up to that many ticks.
    action_noise: std of noise on the continuous actions, in scaled units.

    Raises ValueError if the settings do not fit together."""

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
        if not 0 < fps < math.inf:
            raise ValueError(f"--fps {fps:g}: sampled frames a second are above 0, and finite")
        if action_space not in ACTION_SPACES:
            raise ValueError(f"--action_space {action_space} is not one of {list(ACTION_SPACES)}")
        if horizontal_flip and len({"key.a", "key.d"} & set(ACTION_SPACES[action_space])) == 1:
            raise ValueError(
                f"--horizontal_flip: action space {action_space} has only one of key.a and key.d,"
                " which change places in a mirror: add the other, or drop the flag"
            )
        self.frames = frames_per_clip
        self.fps = fps
        self.frames_per_step = frames_per_step
        self.crop = crop_size
        self.action_space = action_space
        self.scaler = scaler
        self.encode = encode
        self.decoder = decoder
        self.gui = gui
        self.flip = horizontal_flip
        self.resize = random_resize_scale
        self.shift = motion_shift
        self.jitter = temporal_jitter
        self.noise = action_noise

    def starts(self, ticks, frames, video_rate=None):
        """Number of ticks at which a clip can start. frames: how many the video has; video_rate:
        frames a second, by video_rate(). Raises ValueError if the recording is too short, or if its
        lines and frames do not belong together."""
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
        """How many frames go with one line: 1 in VPT and wherever there are as many lines as
        frames, else how many times faster the video runs than the lines.

        If the rest of a recording was dropped, it may have fewer lines than frames, but not more,
        and only its clocks can tell which frame a line goes with. Without video_rate, lines at 20
        Hz count as one a frame. Raises ValueError if lines and frames do not belong together."""
        if abs(ticks.total - frames) <= SLACK:
            return 1
        lines = len(ticks.motion)
        flaw = f" ({ticks.flaw})" if ticks.flaw else ""
        unclear = (
            f"{lines} lines{flaw} but {frames} frames: which line goes with which frame is unknown"
        )
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
        """frames_per_line of an open video. Its clock is read only if it matters."""
        if abs(ticks.total - len(times)) <= SLACK:
            return 1
        return self.frames_per_line(ticks, len(times), video_rate(f, times))

    def __call__(self, f, times, ticks, start, rng, key, pixels=None):
        """A clip from tick `start` of a recording, or None if gui="drop" leaves it out. f: the open
        video; times: from mp4_times; rng: for the augmentations only; pixels: all frames of the
        video as files/pixels.py stores them, in place of decoding."""
        stride = step_size(ticks.rate, self.fps)
        ratio = self.ratio(f, times, ticks)
        sampled = start + stride * np.arange(self.frames)
        if self.jitter:
            last_tick = min(len(ticks.motion), len(times) // ratio) - 1
            sampled = self.jittered(sampled, last_tick, rng)

        # actions and states, between the last (or first) frames of the steps
        steps = sampled.reshape(-1, self.frames_per_step)
        ends = steps[:, -1] if self.encode == "tubelet" else steps[:, 0]
        if self.gui == "drop" and (ticks.keys[sampled[0] : sampled[-1] + 1] & GUI).any():
            return None
        actions, states = step_actions(ticks, ends, self.action_space)

        # frames, larger than the crop if it is to move or to show less
        scale = rng.uniform(self.resize, 1.0) if self.resize < 1 else 1.0
        if pixels is not None:
            video = pixels[sampled * ratio]
        else:
            short_side = round(self.crop / scale * (1 + self.shift))
            video = read_frames(f, times, sampled * ratio, short_side, self.decoder)
            video = self.cropped(video, scale, rng)
        if self.flip and rng.random() < 0.5:
            video = video[:, :, ::-1]
            actions, states = flip_actions(actions, states, self.action_space)

        # scale and noise
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

    def jittered(self, sampled, last_tick, rng):
        """Move each sampled tick at random. They stay in order, different, and in the recording."""
        order = np.arange(self.frames)
        sampled = sampled + rng.integers(-self.jitter, self.jitter + 1, self.frames)
        sampled = np.maximum.accumulate(sampled - order)
        return np.clip(sampled, 0, last_tick - self.frames + 1) + order

    def cropped(self, video, scale, rng):
        """Crop frames (frames, H, W, 3) in the centre, or at a random place if an augmentation says
        so; with motion_shift the crop moves in a straight line from the first frame to the last."""
        room = np.array([video.shape[1] - self.crop, video.shape[2] - self.crop])
        first = room / 2
        if scale != 1 or self.shift:
            first = rng.uniform(0, 1, 2) * room
        last = first
        if self.shift:
            last = np.clip(first + rng.uniform(-1, 1, 2) * self.shift * self.crop, 0, room)
        share = np.linspace(0, 1, self.frames)[:, None]
        corners = np.floor(first + share * (last - first)).astype(int)
        crops = []
        for frame, (y, x) in zip(video, corners):
            crops.append(frame[y : y + self.crop, x : x + self.crop])
        return np.stack(crops)
