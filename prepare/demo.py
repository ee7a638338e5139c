"""Makes real gameplay as VPT shards: ViZDoom on Freedoom 2, played by an exploring policy, recorded
in the format of OpenAI's Minecraft contractors.

    python -m prepare.demo --minutes 10 --size 256x144 --out demo     # half a minute on two cores

Writes OUT/train/shard-%06d.tar and OUT/val/shard-%06d.tar. The val shards are about a sixth of the
minutes, on maps that train never shows. A shard contains KEY.mp4 (H.264, yuv420p, 20 frames a
second) and KEY.jsonl (one line a frame). OUT/demo.json contains the arguments. Run it again after a
kill: finished shards are kept.

Line t goes with frame t; its effect is visible in frame t+1. The engine runs at 35 tics a second
and a line is 2 tics, so the recording plays 1.14 times slower than the game. As in Minecraft, a
pixel of mouse motion is 0.15 degrees, yaw is unbounded and grows to the right, and pitch grows
downwards. Both, and the position, are read back from the game (32 units are a block).

Keys: w a s d, space, left.shift (crouch), left.control (sprint); mouse button 0 attacks, 1 uses.
The hotbar slots 0 to 6 are weapons. Play depends on --seed alone, not on --workers."""

import argparse
import concurrent.futures
import glob
import io
import json
import math
import os
import tarfile
import tempfile
import threading
import time

import av
import numpy as np
import vizdoom

from evaluation.game import (
    FPS,
    MAPS,
    MOUSE,
    PITCH_LIMIT,
    SIZE,
    SLOTS,
    TICS,
    VARIABLES,
    begin,
    open_game,
    picture,
    start_points,
    tick,
)
from files.disk import continue_folder, write_atomically
from files.progress import tqdm
from files.vpt import DEGREES_PER_PIXEL

# sizes that the game draws; yuv420p has no odd ones
SIZES = [name[4:].lower() for name in vizdoom.ScreenResolution.__members__ if name[-1] in "02468"]
X264 = {
    "preset": "veryfast",
    "crf": "20",
    "g": "60",
    "x264-params": "mbtree=0",  # mbtree reads unset memory at heights such as 120 or 360
}
FOCAL = 0.78  # focal length over the picture height, measured
NEAR = 6  # in units of the depth buffer, about 7 map units each; the player is 32 map units wide
OPPOSITE = {"w": "s", "s": "w", "a": "d", "d": "a"}


class Explorer:
    """The player. Wanders by random chords of keys and random camera moves, which the picture does
    not give away. The depth buffer keeps it moving."""

    def __init__(self, rng):
        self.rng = rng
        self.slot = 1
        self.trail = []  # the last positions, to notice that it is stuck
        self.pressed = {}  # key, mouse button or "rest" -> ticks it stays held

        # camera: a goal for the turning speed and for the pitch, and ticks that each goal lasts
        self.turn = 0.0  # degrees a tick
        self.turn_goal = 0.0
        self.turn_left = 0
        self.look_goal = 0.0
        self.look_speed = 2.0
        self.look_left = 0

    def hold(self, name, chance, low, high):
        """Press a key with this chance, for low to high - 1 ticks."""
        if name not in self.pressed and self.rng.random() < chance:
            self.pressed[name] = int(self.rng.integers(low, high))

    def act(self, depth, pitch, position):
        """Depth (H, W) of the picture, pitch in degrees, position (x, y) -> dx, dy in pixels, keys,
        mouse buttons, wheel; sets slot."""
        # keys that were held long enough are released
        self.pressed = {name: left - 1 for name, left in self.pressed.items() if left > 0}

        # what is in the way? a player that is stuck lets go of everything
        left, ahead, right = self.distances(depth, pitch)
        stuck = self.is_stuck(position)
        if stuck:
            self.pressed = {}
            self.trail = []

        # new goals for the camera, when the old ones are over or something is near
        avoid = stuck or ahead < 1.5 * NEAR
        if stuck or self.turn_left <= 0 or (avoid and abs(self.turn_goal) < 2):
            self.choose_turn(avoid, right > left)
        if self.look_left <= 0:
            self.choose_look()

        # now and then it rests: no keys, no camera
        self.hold("rest", 0.01, 4, 16)
        resting = "rest" in self.pressed
        if resting:
            self.pressed = {"rest": self.pressed["rest"]}
            self.turn_goal = 0.0
            self.look_goal = pitch
        dx, dy = self.move_camera(pitch)
        if resting:
            return dx, dy, [], [], 0

        # keys, mouse buttons, and now and then another weapon, by wheel or by number
        self.press(ahead)
        keys = sorted(self.pressed.keys() - set(MOUSE))
        buttons = [number for number, name in enumerate(MOUSE) if name in self.pressed]
        wheel = 0
        if self.rng.random() < 0.01:
            wheel = int(self.rng.choice([-1, 1]))
            self.slot = (self.slot - wheel) % SLOTS  # wheel up is the slot to the left
        elif self.rng.random() < 0.01:
            self.slot = int(self.rng.integers(SLOTS))
            keys.append(str(self.slot + 1))
        return dx, dy, keys, buttons, wheel

    def distances(self, depth, pitch):
        """Distance at the horizon to what is on the left, ahead and on the right."""
        # the horizon moves with the pitch; its band tells walls from floor and ceiling
        h, w = depth.shape
        horizon = int(np.clip(h / 2 - np.tan(np.radians(pitch)) * h * FOCAL, h / 8, 7 * h / 8))
        band = depth[horizon - h // 16 : horizon + h // 16]
        columns = np.median(band, axis=0)
        left = np.median(columns[: w // 3])
        ahead = np.quantile(columns[w // 3 : 2 * w // 3], 0.25)
        right = np.median(columns[-w // 3 :])
        return left, ahead, right

    def is_stuck(self, position):
        """Whether it has walked for 12 ticks and come nowhere."""
        # only walking can be stuck: standing still is meant
        self.trail = self.trail[-11:] + [position]
        if "w" not in self.pressed or len(self.trail) < 12:
            return False
        return np.hypot(*np.subtract(self.trail[0], position)) < 24

    def choose_turn(self, avoid, more_room_right):
        """A new goal for the turning speed: a pause, a drift or a turn, to the free side of what is
        in the way."""
        # how fast: stand still, drift, or turn (always, if something is in the way)
        rng = self.rng
        kind = 1.0 if avoid else rng.random()
        self.turn_left = int(rng.integers(5, 16))
        if kind < 0.25:
            speed = 0.0
        elif kind < 0.55:
            speed = abs(rng.normal(0, 1.2))
        else:
            speed = rng.uniform(2.0, 7.0)

        # to which side: mostly the free one, but not always, or it would walk in circles
        chance_of_right = 0.5
        if avoid:
            chance_of_right = 0.85 if more_room_right else 0.15
        self.turn_goal = speed if rng.random() < chance_of_right else -speed

    def choose_look(self):
        """A new goal for the pitch: level, or anywhere."""
        rng = self.rng
        # level in four cases of ten
        if rng.random() < 0.4:
            self.look_goal = rng.normal(0, 4)
        else:
            self.look_goal = np.clip(rng.normal(0, 18), -28, 28)
        self.look_speed = rng.uniform(0.8, 4.5)
        self.look_left = int(rng.integers(5, 22))

    def move_camera(self, pitch):
        """One tick towards the goals -> dx, dy in pixels, as a hand would: not quite smooth."""
        # both speeds move towards their goals
        rng = self.rng
        self.turn_left -= 1
        self.look_left -= 1
        self.turn += 0.45 * (self.turn_goal - self.turn)
        look = np.clip(0.35 * (self.look_goal - pitch), -self.look_speed, self.look_speed)
        if abs(self.turn) <= 0.15 and abs(look) <= 0.15:
            return 0, 0  # a hand at rest sends exact zeros

        # noise on the speed and on the pixels; the pitch stays within the game's limits
        dx = round(self.turn * rng.normal(1, 0.35) / DEGREES_PER_PIXEL + rng.normal(0, 1.5))
        dy = round(look * rng.normal(1, 0.35) / DEGREES_PER_PIXEL + rng.normal(0, 1.5))
        highest = (-PITCH_LIMIT - pitch) / DEGREES_PER_PIXEL
        lowest = (PITCH_LIMIT - pitch) / DEGREES_PER_PIXEL
        return dx, int(np.clip(dy, highest, lowest))

    def press(self, ahead):
        """Keys and buttons: each with its chance a tick and the ticks that it is held."""
        # in front of a wall it stops, and tries whether it is a door
        if ahead < NEAR:
            self.pressed.pop("w", None)
            self.hold("use", 0.15, 1, 3)
        # name: chance a tick, fewest and most ticks
        chords = {
            "s": (0.05 if ahead < NEAR else 0.01, 4, 12),
            "w": (0.15 if ahead > NEAR else 0, 8, 40),
            "a": (0.025, 4, 16),
            "d": (0.025, 4, 16),
            "space": (0.025, 2, 6),
            "left.shift": (0.008, 6, 20),
            "left.control": (0.02, 10, 40),
            "attack": (0.018, 2, 14),
            "use": (0.005, 1, 3),
        }

        # never a key and its opposite
        for name, (chance, low, high) in chords.items():
            if OPPOSITE.get(name) not in self.pressed:
                self.hold(name, chance, low, high)


def contractor_line(t, mouse, keys, new_keys, slot, yaw, variables):
    """One line of a recording, as OpenAI's contractors' recorder wrote it."""
    return {
        "mouse": mouse,
        "keyboard": {
            "keys": [f"key.keyboard.{key}" for key in keys],
            "newKeys": [f"key.keyboard.{key}" for key in new_keys],
            "chars": "",
        },
        "isGuiOpen": False,
        "isGuiInventory": False,
        "hotbar": slot,
        "yaw": round(yaw, 5),
        "pitch": round(variables["PITCH"], 5),
        "xpos": variables["POSITION_Y"] / 32,
        "ypos": variables["POSITION_Z"] / 32,
        "zpos": variables["POSITION_X"] / 32,
        "tick": t,
        "milli": 1_600_000_000_000 + t * 1000 // FPS,
        "inventory": [
            {"type": "health", "quantity": int(variables["HEALTH"])},
            {"type": "armor", "quantity": int(variables["ARMOR"])},
        ],
        "serverTick": t,
        "serverTickDurationMs": 1000 / 35 * TICS,
        "stats": {
            "minecraft.custom:minecraft.play_one_minute": t,
            "minecraft.custom:minecraft.mob_kills": int(variables["KILLCOUNT"]),
        },
    }


def mouse_of(dx, dy, wheel, buttons, buttons_before):
    """The mouse part of a line."""
    return {
        "x": 640.0,
        "y": 360.0,
        "dx": float(dx),
        "dy": float(dy),
        "scaledX": 0.0,
        "scaledY": 0.0,
        "dwheel": float(wheel),
        "buttons": buttons,
        "newButtons": [b for b in buttons if b not in buttons_before],
    }


def play(game, map_number, points, length, size, rng, parent):
    """Play one recording -> mp4 bytes, list of lines (dicts, contractor format). It ends early if
    the level does, or at a teleporter."""
    # a new level, from one of its start points
    begin(game, int(rng.integers(2**31)), map_number, points[rng.integers(len(points))])
    player = Explorer(rng)

    # yaw is summed from the engine's angle, which wraps
    video = io.BytesIO()
    lines = []
    yaw = 0.0
    angle = 0.0  # the engine's, in degrees: it grows to the left and wraps
    dx = 0
    keys_before = []
    buttons_before = []
    with av.open(video, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, pix_fmt="yuv420p", options=X264)
        stream.width, stream.height = map(int, size.split("x"))

        # one thread: the same bytes on every machine, and the workers share the cores already
        stream.codec_context.thread_count = 1

        # a second to come out of the start position is not recorded
        for t in range(-FPS, length):
            if game.is_episode_finished() or game.is_player_dead():
                break
            # a worker whose program was killed ends with it
            if os.getppid() != parent:
                raise RuntimeError("the program that this game was played for is gone")

            # where the player looks now, read back from the game
            state = game.get_state()
            variables = dict(zip(VARIABLES, state.game_variables.tolist()))
            turned = (angle - variables["ANGLE"] + 180) % 360 - 180
            if t > 0 and abs(turned - dx * DEGREES_PER_PIXEL) > 1:
                break  # a teleporter turned the player
            yaw += turned
            angle = variables["ANGLE"]

            # what the player does now
            slot_before = player.slot
            every = state.depth_buffer.shape[1] // stream.width
            depth = state.depth_buffer[::every, ::every]
            position = (variables["POSITION_X"], variables["POSITION_Y"])
            dx, dy, keys, buttons, wheel = player.act(depth, variables["PITCH"], position)
            if t == 0:
                buttons = []  # attack held from line 0 is how a known recorder fault looks

            # the frame and its line
            if t >= 0:
                frame = picture(state, stream.width, stream.height)
                frame.pts = t
                container.mux(stream.encode(frame))
                mouse = mouse_of(dx, dy, wheel, buttons, buttons_before)
                new_keys = [key for key in keys if key not in keys_before]
                lines.append(contractor_line(t, mouse, keys, new_keys, player.slot, yaw, variables))

            # and the game moves on by one tick
            keys_before = keys
            buttons_before = buttons
            pressed = [*keys, *(MOUSE[b] for b in buttons)]
            tick(game, dx, dy, pressed, player.slot if player.slot != slot_before else None)
        container.mux(stream.encode())
    return video.getvalue(), lines


def guide_line(line):
    """A contractor line in the guides' format: absolute [yaw, pitch] in radians, and only what they
    list."""
    # yaw within (-pi, pi]
    camera = [
        math.pi - (math.pi - math.radians(line["yaw"])) % (2 * math.pi),
        math.radians(line["pitch"]),
    ]
    return {
        "timestamp": line["tick"] / FPS,
        "mouse": {"dx": line["mouse"]["dx"], "dy": line["mouse"]["dy"]},
        "keyboard": {"keys": line["keyboard"]["keys"]},
        "camera": camera,
        "hotbar": line["hotbar"],
    }


def make_shard(path, recordings, length, size, seed, guide, parent):
    """Play recordings [(number, map), ...] and write them as one shard."""
    # a shard is packed in memory, and appears whole
    points = start_points()
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=packed, mode="w") as tar:
        game = open_game(size, seed, folder)
        try:
            for number, map_number in recordings:
                # a recording that the end of its level or a teleporter cut short is played again
                for attempt in range(20):
                    rng = np.random.default_rng([seed, number, attempt])
                    video, lines = play(
                        game, map_number, points[map_number], length, size, rng, parent
                    )
                    if len(lines) > length / 2:
                        break
                else:
                    raise RuntimeError(
                        f"map {map_number} ends every recording before {length / 2 / FPS:g} s: take"
                        " another --seed"
                    )

                # its two files, side by side
                if guide:
                    lines = [guide_line(line) for line in lines]
                text = "".join(json.dumps(line) + "\n" for line in lines).encode()
                for extension, data in (("mp4", video), ("jsonl", text)):
                    member = tarfile.TarInfo(f"map{map_number:02d}-{number:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        finally:
            game.close()
    write_atomically(path, packed.getvalue())


def die_with(parent):
    """End this worker when its parent is gone. Without this, workers of a pool wait for work for
    ever after their parent was killed."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)

        # `play` sees it too, and has time to close its game
        time.sleep(3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def plan(minutes, out, seed):
    """(ticks of a recording, [(shard path, [(recording number, map), ...]), ...]): recordings of
    about 20 s, every sixth held out."""
    # three recordings a minute, at least four to train on and two held out
    count = max(round(minutes * 3), 6)
    held_out = max(round(count / 6), 2)
    rng = np.random.default_rng(seed)
    shards = []
    first = 0
    for split, n, fewest in (("train", count - held_out, 4), ("val", held_out, 2)):
        # maps in random order, again and again until there are enough
        rounds = n // len(MAPS[split]) + 1
        maps = np.concatenate([rng.permutation(MAPS[split]) for _ in range(rounds)])[:n]

        # the numbering continues from train to val; about three recordings make a shard
        recordings = [(first + i, int(number)) for i, number in enumerate(maps)]
        parts = np.array_split(np.arange(n), max(fewest, round(n / 3)))
        for i, part in enumerate(parts):
            path = os.path.join(out, split, f"shard-{i:06d}.tar")
            shards.append((path, [recordings[j] for j in part]))
        first += n
    return max(round(minutes * 60 * FPS / count), FPS), shards


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--minutes", type=float, default=10, help="of play, train and held-out together"
    )
    parser.add_argument(
        "--size", default=SIZE, choices=SIZES, metavar="WxH", help="256x144, 320x240, 640x360, ..."
    )
    parser.add_argument("--seed", type=int, default=0, help="of play and maps")
    parser.add_argument(
        "--out",
        default="demo",
        help="folder; its finished shards are kept if the arguments above are the same",
    )
    parser.add_argument(
        "--lines", choices=["contractor", "guide"], default="contractor", help="JSONL format"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="games at a time")
    args = parser.parse_args()

    # --- resume ---
    made = {"minutes": args.minutes, "size": args.size, "seed": args.seed, "lines": args.lines}
    try:
        continue_folder(args.out, "demo.json", made)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e

    # which recordings go into which shard: the same on every run
    length, shards = plan(args.minutes, os.path.abspath(args.out), args.seed)

    # --- play ---
    # a shard appears by renaming, whole or not at all; a run that was killed leaves *.tmp
    todo = [shard for shard in shards if not os.path.exists(shard[0])]
    for leftover in glob.glob(os.path.join(glob.escape(args.out), "*", "*.tmp")):
        os.unlink(leftover)

    # a worker plays a shard at a time
    pool = concurrent.futures.ProcessPoolExecutor(
        args.workers, initializer=die_with, initargs=(os.getpid(),)
    )
    with pool, tqdm(total=sum(len(r) for _, r in todo) * length, unit="frame") as bar:
        jobs = {
            pool.submit(
                make_shard, *shard, length, args.size, args.seed, args.lines == "guide", os.getpid()
            ): shard
            for shard in todo
        }
        for job in concurrent.futures.as_completed(jobs):
            job.result()
            bar.update(len(jobs[job][1]) * length)

    # --- report ---
    size = sum(os.path.getsize(path) for path, _ in shards) / 2**20
    print(
        f"{args.out}: {len(shards)} shards, {size:.1f} MiB, {sum(len(r) for _, r in shards)}"
        f" recordings of {length / FPS:g} s; {len(shards) - len(todo)} shards were there already"
    )
