"""Real gameplay as VPT shards: ViZDoom on Freedoom 2, played by an exploring policy, recorded as
contractors' Minecraft was.

    python -m prepare.demo --minutes 10 --size 256x144 --out demo     # half a minute on two cores

Writes OUT/train/shard-%06d.tar and OUT/val/shard-%06d.tar (about a sixth of the minutes, on maps
that train never shows) of KEY.mp4 (H.264, yuv420p, 20 frames a second) and KEY.jsonl (one line a
frame), and OUT/demo.json (the arguments; finished shards are kept on a re-run).

Line t goes with frame t and its effect is visible in frame t+1. The engine runs at 35 tics a second
and a line is 2 tics, so the recording plays 1.14 times slower than the game. As in Minecraft a
pixel of mouse motion is 0.15 degrees, yaw is unbounded and grows to the right, pitch grows
downwards; both and the position are read back from the game (32 units are a block). Keys: w a s d,
space, left.shift crouch, left.control sprint, mouse 0 attack, mouse 1 use; hotbar slots 0..6 are
weapons. Play is a function of --seed alone, not of --workers."""

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
from tqdm import tqdm

from checkpoint import write_atomically
from files.vpt import DEGREES_PER_PIXEL
from prepare.doom import (
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

SIZES = [
    name[4:].lower() for name in vizdoom.ScreenResolution.__members__ if name[-1] in "02468"
]  # yuv420p has no odd sizes
X264 = {
    "preset": "veryfast",
    "crf": "20",
    "g": "60",
    "x264-params": "mbtree=0",
}  # mbtree reads unset memory at heights such as 120 or 360
FOCAL = 0.78  # focal length over the picture height, measured
NEAR = 6  # in units of the depth buffer, about 7 map units each; the player is 32 map units wide


class Explorer:
    """The player. Wanders by random chords of keys and random camera moves, which the picture does
    not give away; depth keeps it moving."""

    def __init__(self, rng):
        self.rng, self.slot, self.trail = rng, 1, []
        self.held = {}  # key, mouse button or "rest" -> ticks it stays held
        self.turn, self.turn_goal, self.turn_left = (
            0.0,
            0.0,
            0,
        )  # degrees a tick, its goal, ticks that the goal lasts
        self.look_goal, self.look_speed, self.look_left = 0.0, 2.0, 0

    def hold(self, name, chance, low, high):
        if name not in self.held and self.rng.random() < chance:
            self.held[name] = int(self.rng.integers(low, high))

    def act(self, depth, pitch, position):
        """Depth (H, W) of the picture, pitch in degrees, position (x, y) -> dx, dy in pixels, keys,
        mouse buttons, wheel; sets slot."""
        rng = self.rng
        self.held = {name: left - 1 for name, left in self.held.items() if left > 0}
        h, w = depth.shape
        horizon = int(np.clip(h / 2 - np.tan(np.radians(pitch)) * h * FOCAL, h / 8, 7 * h / 8))
        room = np.median(
            depth[horizon - h // 16 : horizon + h // 16], axis=0
        )  # distance to what each column shows
        left, right = np.median(room[: w // 3]), np.median(room[-w // 3 :])
        ahead = np.quantile(room[w // 3 : 2 * w // 3], 0.25)
        self.trail = self.trail[-11:] + [position]
        stuck = (
            "w" in self.held
            and len(self.trail) == 12
            and np.hypot(*np.subtract(self.trail[0], position)) < 24
        )
        if stuck:
            self.held, self.trail = {}, []
        avoid = stuck or ahead < 1.5 * NEAR
        # camera: turns, drifts and pauses, each a goal that the turning speed approaches
        if stuck or self.turn_left <= 0 or (avoid and abs(self.turn_goal) < 2):
            kind = 1.0 if avoid else rng.random()
            self.turn_left = int(rng.integers(5, 16))
            speed = (
                0.0
                if kind < 0.25
                else abs(rng.normal(0, 1.2))
                if kind < 0.55
                else rng.uniform(2.0, 7.0)
            )
            self.turn_goal = (
                speed
                if rng.random() < (0.5 if not avoid else 0.85 if right > left else 0.15)
                else -speed
            )
        if self.look_left <= 0:
            self.look_goal = (
                rng.normal(0, 4) if rng.random() < 0.4 else np.clip(rng.normal(0, 18), -28, 28)
            )
            self.look_speed, self.look_left = rng.uniform(0.8, 4.5), int(rng.integers(5, 22))
        self.hold("rest", 0.01, 4, 16)
        if "rest" in self.held:
            self.held, self.turn_goal, self.look_goal = {"rest": self.held["rest"]}, 0.0, pitch
        self.turn_left, self.look_left = self.turn_left - 1, self.look_left - 1
        self.turn += 0.45 * (self.turn_goal - self.turn)
        look = np.clip(0.35 * (self.look_goal - pitch), -self.look_speed, self.look_speed)
        dx = dy = 0  # a hand at rest sends exact zeros
        if abs(self.turn) > 0.15 or abs(look) > 0.15:
            dx, dy = (
                round(v * rng.normal(1, 0.35) / DEGREES_PER_PIXEL + rng.normal(0, 1.5))
                for v in (self.turn, look)
            )
            dy = int(
                np.clip(
                    dy,
                    (-PITCH_LIMIT - pitch) / DEGREES_PER_PIXEL,
                    (PITCH_LIMIT - pitch) / DEGREES_PER_PIXEL,
                )
            )
        if "rest" in self.held:
            return dx, dy, [], [], 0
        # feet and hands
        if ahead < NEAR:
            self.held.pop("w", None)
            self.hold("use", 0.15, 1, 3)  # it may be a door
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
        for name, how in chords.items():
            if {"w": "s", "s": "w", "a": "d", "d": "a"}.get(name) not in self.held:
                self.hold(name, *how)
        keys, wheel = sorted(self.held.keys() - set(MOUSE)), 0
        if rng.random() < 0.01:
            wheel = int(rng.choice([-1, 1]))
            self.slot = (self.slot - wheel) % SLOTS  # wheel up is the slot to the left
        elif rng.random() < 0.01:
            self.slot = int(rng.integers(SLOTS))
            keys.append(str(self.slot + 1))
        return dx, dy, keys, [b for b, name in enumerate(MOUSE) if name in self.held], wheel


def play(game, map_number, points, length, size, rng, parent):
    """Play one recording -> mp4 bytes, list of lines (dicts, contractor format). It ends early if
    the level does, or at a teleporter."""
    begin(game, int(rng.integers(2**31)), map_number, points[rng.integers(len(points))])
    player, video, lines = Explorer(rng), io.BytesIO(), []
    yaw, angle, dx, held, held_buttons = 0.0, 0.0, 0, [], []
    with av.open(video, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, pix_fmt="yuv420p", options=X264)
        stream.width, stream.height = map(int, size.split("x"))
        stream.codec_context.thread_count = (
            1  # the same bytes on every machine, and the workers share the cores already
        )
        for t in range(-FPS, length):  # a second to come out of the start position, not recorded
            if game.is_episode_finished() or game.is_player_dead():
                break
            if os.getppid() != parent:
                raise RuntimeError("the program that this game was played for is gone")
            state = game.get_state()
            v = dict(zip(VARIABLES, state.game_variables.tolist()))
            pitch, x, y, z = (
                v["PITCH"],
                v["POSITION_Y"] / 32,
                v["POSITION_Z"] / 32,
                v["POSITION_X"] / 32,
            )
            turned = (
                angle - v["ANGLE"] + 180
            ) % 360 - 180  # the engine's angle grows to the left and wraps
            if t > 0 and abs(turned - dx * DEGREES_PER_PIXEL) > 1:
                break  # a teleporter turned the player
            yaw, angle = yaw + turned, v["ANGLE"]
            slot_before = player.slot
            by = state.depth_buffer.shape[1] // stream.width
            dx, dy, keys, buttons, wheel = player.act(
                state.depth_buffer[::by, ::by], pitch, (v["POSITION_X"], v["POSITION_Y"])
            )
            buttons = (
                buttons if t else []
            )  # attack held from line 0 is how a known recorder fault looks
            if t >= 0:
                frame = picture(state, stream.width, stream.height)
                frame.pts = t
                container.mux(stream.encode(frame))
                lines.append(
                    {
                        "mouse": {
                            "x": 640.0,
                            "y": 360.0,
                            "dx": float(dx),
                            "dy": float(dy),
                            "scaledX": 0.0,
                            "scaledY": 0.0,
                            "dwheel": float(wheel),
                            "buttons": buttons,
                            "newButtons": [b for b in buttons if b not in held_buttons],
                        },
                        "keyboard": {
                            "keys": [f"key.keyboard.{k}" for k in keys],
                            "newKeys": [f"key.keyboard.{k}" for k in keys if k not in held],
                            "chars": "",
                        },
                        "isGuiOpen": False,
                        "isGuiInventory": False,
                        "hotbar": player.slot,
                        "yaw": round(yaw, 5),
                        "pitch": round(pitch, 5),
                        "xpos": x,
                        "ypos": y,
                        "zpos": z,
                        "tick": t,
                        "milli": 1_600_000_000_000 + t * 1000 // FPS,
                        "inventory": [
                            {"type": "health", "quantity": int(v["HEALTH"])},
                            {"type": "armor", "quantity": int(v["ARMOR"])},
                        ],
                        "serverTick": t,
                        "serverTickDurationMs": 1000 / 35 * TICS,
                        "stats": {
                            "minecraft.custom:minecraft.play_one_minute": t,
                            "minecraft.custom:minecraft.mob_kills": int(v["KILLCOUNT"]),
                        },
                    }
                )
            held, held_buttons = keys, buttons
            held_now = [*keys, *(MOUSE[b] for b in buttons)]
            tick(game, dx, dy, held_now, player.slot if player.slot != slot_before else None)
        container.mux(stream.encode())
    return video.getvalue(), lines


def guide_line(line):
    """A contractor line in the guides' format: absolute [yaw, pitch] in radians, and only what they
    list."""
    camera = [
        math.pi - (math.pi - math.radians(line["yaw"])) % (2 * math.pi),
        math.radians(line["pitch"]),
    ]
    mouse, keyboard = (
        {k: line["mouse"][k] for k in ("dx", "dy")},
        {"keys": line["keyboard"]["keys"]},
    )
    return {
        "timestamp": line["tick"] / FPS,
        "mouse": mouse,
        "keyboard": keyboard,
        "camera": camera,
        "hotbar": line["hotbar"],
    }


def make_shard(path, recordings, length, size, seed, guide, parent):
    """Play recordings [(number, map), ...] and write them as one shard."""
    points, packed = start_points(), io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=packed, mode="w") as tar:
        game = open_game(size, seed, folder)
        try:
            for number, map_number in recordings:
                for attempt in range(
                    20
                ):  # what its level's end or a teleporter cut short is played again elsewhere
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
                text = "".join(
                    json.dumps(guide_line(line) if guide else line) + "\n" for line in lines
                ).encode()
                for extension, data in (("mp4", video), ("jsonl", text)):
                    member = tarfile.TarInfo(f"map{map_number:02d}-{number:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        finally:
            game.close()
    write_atomically(path, packed.getvalue())


def die_with(parent):
    """A pool's workers outlive a parent that was killed, waiting for work for ever; this ends them,
    `play` having closed their game."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def plan(minutes, out, seed):
    """(ticks of a recording, [(shard path, [(recording number, map), ...]), ...]): recordings of
    about 20 s, every sixth held out."""
    count = max(round(minutes * 3), 6)
    order, shards, first = np.random.default_rng(seed), [], 0
    held_out = max(round(count / 6), 2)
    for split, n, fewest in (("train", count - held_out, 4), ("val", held_out, 2)):
        maps = np.concatenate(
            [order.permutation(MAPS[split]) for _ in range(n // len(MAPS[split]) + 1)]
        )[:n]
        recordings = [(first + i, int(m)) for i, m in enumerate(maps)]
        for i, part in enumerate(np.array_split(np.arange(n), max(fewest, round(n / 3)))):
            shards.append(
                (os.path.join(out, split, f"shard-{i:06d}.tar"), [recordings[j] for j in part])
            )
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
    note, found = os.path.join(args.out, "demo.json"), "something else"
    if os.path.exists(note):
        with open(note) as f:
            found = json.load(f)
    if found != made and os.path.isdir(args.out) and os.listdir(args.out):
        raise SystemExit(
            f"{args.out} holds {found}, not a demo made with {made}: give another --out or remove"
            " that folder"
        )
    write_atomically(note, json.dumps(made).encode() + b"\n")
    length, shards = plan(args.minutes, os.path.abspath(args.out), args.seed)

    # --- play ---
    todo = [
        s for s in shards if not os.path.exists(s[0])
    ]  # a shard appears by renaming, whole or not at all
    for rest in glob.glob(
        os.path.join(glob.escape(args.out), "*", "*.tmp")
    ):  # of a run that was killed
        os.unlink(rest)
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
    size = sum(os.path.getsize(path) for path, _ in shards) / 2**20
    print(
        f"{args.out}: {len(shards)} shards, {size:.1f} MiB, {sum(len(r) for _, r in shards)}"
        f" recordings of {length / FPS:g} s; {len(shards) - len(todo)} shards were there already"
    )
