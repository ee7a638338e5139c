"""Everything between robot episodes and a batch: DROID's RLDS TFRecords (without TensorFlow), raw
DROID, and episodes of one's own.

    python -m droid --inspect droid_100/1.0.0/r2d2_faceblur-train.tfrecord-00000-of-00031      # shapes, ranges, mean, std, idle share

  *.tfrecord*     RLDS as released, on a disk (mmap) or at any fsspec URL (gs://gresearch/robotics/droid/1.0.1/*.tfrecord*)
  trajectory.h5   raw DROID, with recordings/MP4/*.mp4 and metadata_*.json beside it; or folders of them, or Meta's .csv of folders
  NAME.npz        one's own robot (prepare/robot.py says what is in it), with NAME.mp4 or NAME.CAMERA.mp4 beside it
  *.tar           features of any of them (encode.py --dataset droid)
They are indexed once (cached under NANOJEPA_CACHE), so that shuffling is data.Order's, by index: it
mixes everything, resumes exactly and costs nothing, while a shuffle buffer of 100,000 pictures
takes 17 GB, mixes only neighbours and is lost when a run stops."""

import argparse
import fnmatch
import hashlib
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from checkpoint import one_sentence
from data import (
    Clips,
    Order,
    braces,
    check_fraction,
    collate,
    feature_rows,
    files_below,
    leave_signals,
    matches,
    spread,
    without_links,
)
from files.episodes import (
    DAMAGE,
    STATES,
    Episode,
    filesystem,
    index_file,
    read_fields,
    read_pictures,
)
from files.robot_features import check_features, feature_settings, keep_ranges, to_steps
from files.streams import disk_failed, disk_sentence, trying

POSE = [
    "x",
    "y",
    "z",
    "roll",
    "pitch",
    "yaw",
    "gripper",
]  # of a state, and of the action to the next one
VERIFY = 50e9  # bytes; above them checking all checksums takes longer than it is worth
POSE_UNITS = ["m"] * 3 + ["rad"] * 3 + ["closed"]

# --- the episodes of a run ---


def find_episodes(data):
    """Paths, globs, {a..b}, folders, URLs, .csv lists of them -> [file or URL] of episodes.
    FileNotFoundError for what matches nothing."""
    if not isinstance(data, str):
        return without_links([x for p in data for x in find_episodes(p)])
    out = []
    if "://" in data:
        for url in braces(data, True):
            out += episodes_at_url(url)
        return list(dict.fromkeys(out))
    for pattern, found in matches(data):
        if not found:
            raise no_episode(pattern)
        for path in found:
            files = episodes_in(path)
            if not files:
                raise no_episode(path)
            out += files
    return without_links(out)


def no_episode(pattern):
    return FileNotFoundError(
        f"no episode at {pattern}: name *.tfrecord* files, trajectory.h5, NAME.npz, features"
        " (.tar), or folders"
    )


def episodes_at_url(url):
    fs, name = filesystem(url + "*.tfrecord*" * url.endswith("/"))
    if "*" not in name and "?" not in name:
        return [url]
    found = trying(url, lambda: fs.glob(name))
    if not found:
        raise no_episode(url)
    return sorted(map(fs.unstrip_protocol, found))


def episodes_in(path):
    """What exists -> the files of episodes there: in a folder, in Meta's .csv of folders, or the
    file itself."""
    if path.endswith(".csv"):  # Meta's list: a folder a line, then a label
        with open(path) as f:
            return find_episodes([line.split()[0] for line in f if line.strip()])
    if not os.path.isdir(path):
        return [path]
    files = []
    for file in files_below(path):
        parts = os.path.relpath(file, path).split(os.sep)
        hidden = any(part.startswith(".") for part in parts)  # ._NAME of macOS among them
        kinds = ("*.tfrecord*", "trajectory.h5", "*.npz", "*.tar")
        if not hidden and any(fnmatch.fnmatchcase(parts[-1], kind) for kind in kinds):
            files.append(file)
    return sorted(files)


def index_episodes(paths, reader, verify, log):
    """Files -> ([(Episode, its entry of index_file)] that a reader can use, whole, [bad])."""
    out, bad = [], []
    size = sum(os.path.getsize(p) for p in paths if "://" not in p)
    if verify is None and size > VERIFY:  # all of DROID is 1.7 TB
        verify = False
        log(
            f"{size / 1e9:.0f} GB: checksums are not checked, lengths are: changed bytes inside a"
            " picture or a number are noticed only where they cannot be decoded (--verify checks"
            " all checksums, which reads all of it once)"
        )
    elif verify is None and any("://" in p and not p.endswith(".tar") for p in paths):
        log(
            "URLs: checksums are not checked, lengths are: changed bytes inside a picture or a"
            " number are noticed only where they cannot be decoded (--verify checks all checksums,"
            " which reads all of it once)"
        )
    with ThreadPoolExecutor(16) as pool:
        indexed = list(
            tqdm(
                pool.map(lambda path: index_file(path, verify), paths),
                "index",
                len(paths),
                unit=" files",
                delay=10,
            )
        )
    for path, (kind, episodes, more) in zip(paths, indexed):
        bad += [tuple(b) for b in more]
        needed = {
            *reader.camera,
            *(reader.state_keys or STATES["rlds"]),
            *(reader.action_keys or ()),
        }  # the rest need not stay in memory
        for e in episodes:
            members = e["members"]
            if kind == "rlds":
                members = {
                    k: (*v[:2], np.array(v[2], np.uint32) if isinstance(v[2], list) else v[2])
                    for k, v in members.items()
                    if k in needed
                }
            r = Episode(
                path,
                e["key"],
                kind,
                members,
                e["steps"],
                e.get("rate", 15.0),
                0,
                e.get("last", e["steps"]),
                0,
                e.get("identity", ""),
            )
            if flaw := reader.flaw(r):
                bad.append((path, r.key, flaw))
            else:
                out.append((r, e))
    out, copies = leave_out_copies(out)
    if copies:
        kept, copy = copies[0]
        log(
            f"left out: {len(copies)} episodes that are copies of others, {copy.shard}"
            f" {copy.recording} of {kept.shard} {kept.recording} among them"
        )
    noted = [(r, e["note"]) for r, e in out if e.get("note")]
    if noted:
        r, note = noted[0]
        log(f"WARNING: {len(noted)} of {len(out)} episodes, {r.shard} among them: {note}")
    if warning := rate_warning([r for r, _ in out], reader):
        log(warning)
    return out, bad


def leave_out_copies(found):
    """[(Episode, entry)] -> those of them that are no copies, [(Episode, its copy)]: a copy could be
    held out and trained on."""
    first, out, copies = {}, [], []
    for r, e in found:
        kept = first.setdefault((r.kind, r.identity), r) if r.identity else r
        if kept is r:
            out.append((r, e))
        else:
            copies.append((kept, r))
    return out, copies


def rate_warning(found, reader):
    """A line about episodes whose frames do not come at --fps, or ''. DROID's 3.75 for 4 is
    Meta's."""
    rates = [r.rate / reader.stride_of(r) for r in found]
    if reader.stride:
        # a stride in rows is one speed only where all have one rate
        if not rates or max(rates) <= 1.1 * min(rates):
            return ""
        return (
            f"WARNING: --stride {reader.stride} gives {min(rates):.3g} to {max(rates):.3g} frames a"
            " second, since the episodes have different rates: use --fps"
        )
    off = [i for i, rate in enumerate(rates) if not 0.9 < rate / reader.fps < 1.1]
    if not off:
        return ""
    slowest, fastest = min(rates[i] for i in off), max(rates[i] for i in off)
    span = f"{slowest:.3g}" + (f" to {fastest:.3g}" if fastest > slowest else "")
    r = found[off[0]]
    return (
        f"WARNING: {len(off)} of {len(found)} episodes give {span} frames a second, not --fps"
        f" {reader.fps:g} ({os.path.basename(r.shard)} has {r.rate:.3g} rows a second, and one in"
        f" {reader.stride_of(r)} is taken): base and scaler are for --fps; set it to what the robot"
        " gives, or leave those episodes out"
    )


def open_episodes(data, reader, idle_filter, success, verify, log):
    """Patterns -> ([Episode], [bad]); what the filters leave out goes to the log."""
    (found, bad), out = index_episodes(find_episodes(data), reader, verify, log), []
    failures = short = unknown = possible = rows = still = 0
    for r, e in found:
        failed, starts, stride = (
            success == "only" and not e["success"],
            reader.starts(r),
            reader.stride_of(r),
        )
        at, every, last = e.get(
            "rows", (0, 1, r.last)
        )  # where the steps of features lie among the episode's
        runs = e["still"] if idle_filter == "light" else e["idle"]
        rows, still = rows + last, still + sum(b - a for a, b in runs or ())
        failures, short = failures + failed, short + (not failed and not starts)
        if failed or not starts:
            continue
        unknown, possible = unknown + (runs is None), possible + starts
        rule = "off" if runs is None else idle_filter
        ticks = (
            1 if r.kind == "features" else max(round(20 / reader.fps), 1)
        )  # as data.windows has it
        ranges = to_steps(
            keep_ranges(runs, last, rule, (reader.frames - 1) * stride * every + 1), at, every
        )
        out += [
            r._replace(first=a, last=b, length=(b - a - 1) // stride * ticks + 1)
            for a, b in ranges
            if b > a
        ]
    out = [r for r in out if reader.starts(r)]
    if not out:
        reasons = {}
        for b in bad:  # one of each kind
            reasons.setdefault(b[2], b)
        reason = (
            "; ".join(" ".join(b) for b in [*reasons.values()][:3])
            or "the filters leave nothing (--idle_filter off --success all keep everything)"
        )
        if short and not bad:
            reason = (
                f"{short} of {len(found)} are shorter than a clip of {reader.frames} frames"
                f" (--frames_per_clip, --fps, --stride), and the filters leave nothing of the rest"
            )
        raise ValueError(f"no usable episode in {data}: {reason}")
    share, more = (
        sum(map(reader.starts, out)) / possible,
        f" ({unknown} of which it is not known what is idle: all)" * (unknown > 0),
    )
    kind = "segments of features" if out[0].kind == "features" else "episodes"
    log(
        f"{len(found)} {kind}, {still / rows:.1%} of their rows idle: {failures} without success"
        f" left out, {short} shorter than a clip, of the others --idle_filter {idle_filter} keeps"
        f" {share:.1%} of {possible} starts of clips{more}, in {len(out)} stretches"
    )
    return out, bad


def open_droid(
    data,
    val_data=None,
    val_fraction=0.0,
    reader=None,
    *,
    idle_filter="light",
    success="all",
    max_bad_fraction=1.0,
    verify=None,
    log=print,
):
    """Patterns, folders and URLs -> (train [Episode], val [Episode], bad [(file, key, reason)]).
    Held out: that share of the episodes whose keys have the lowest hashes, wherever they lie.
    idle_filter: off | openpi | light (keep_ranges); success: all | only; verify: check all
    checksums while indexing, which reads it all (default: local files up to VERIFY). ValueError if
    nothing is left or too much is bad."""
    check_fraction(val_fraction)
    reader = reader or DroidReader()
    train, bad = open_episodes(data, reader, idle_filter, success, verify, log)
    if val_data:
        val, more = open_episodes(val_data, reader, idle_filter, success, verify, log)
        bad = bad + more
        if twice := shared(train, val, reader):
            raise ValueError(
                f"--val_data and --data share {len(twice)} episodes, {min(twice)} among them: hold"
                " them out of --data"
            )
    else:
        keys = sorted(
            {r.recording for r in train}, key=lambda key: hashlib.sha256(key.encode()).digest()
        )
        held = set(
            keys[: min(max(round(len(keys) * val_fraction), int(val_fraction > 0)), len(keys) - 1)]
        )
        train, val = (
            [r for r in train if r.recording not in held],
            [r for r in train if r.recording in held],
        )
    if any(r.kind == "features" for r in train + val):
        check_features(train + val, reader)
    if (
        len(bad) > max_bad_fraction * (n := len({r.key for r in train + val}) + len(bad))
        and n >= 100
    ):
        worst = " ".join(bad[0])
        raise ValueError(
            f"{len(bad)} of {n} episodes cannot be read, {worst} among them: mend them, or raise"
            " --max_bad_fraction"
        )
    for left, r in zip(
        range(min(len(train), 20) - 1, -1, -1), train
    ):  # one that can be read teaches the reader its dimensions
        try:
            reader.motion(r, np.array([r.first, r.last - 1]))
            break
        except (*DAMAGE, MemoryError) as e:
            if disk_failed(e):
                raise OSError(disk_sentence(f"{r.shard} {r.key}", e)) from e
            if not left:
                raise ValueError(f"{r.shard} {r.key}: {e}") from e
    return train, val, bad


def shared(train, val, reader):
    """Names of the episodes that are in both lists. Names alone do not tell: two folders may have
    files of one name, or one metadata for all, and a copy may lie anywhere. So episodes of one name
    are the same if they are of the same file, or if they move in the same way."""
    named, known = {}, {r.identity for r in train if r.identity}
    for r in train:
        named.setdefault(r.recording, {}).setdefault((r.shard, r.key), r)
    twice, seen = set(), set()
    for r in val:
        if r.recording in twice or (r.shard, r.key) in seen:
            continue
        seen.add((r.shard, r.key))
        if r.identity in known:
            twice.add(r.recording)
            continue
        others = [*named.get(r.recording, {}).values()]
        # segments of features can be compared where they begin at the same row
        alike = [x for x in others if first_row(x) == first_row(r)]
        if any(same_episode(r, x, reader) for x in alike or others):
            twice.add(r.recording)
    return twice


def first_row(r):
    return r.key.rpartition("-")[2] if r.kind == "features" else ""


def same_episode(a, b, reader):
    """Whether two entries of one name are one episode; also where that cannot be found out."""
    if a.kind != b.kind or first_row(a) != first_row(b):
        return True
    remote = "://" in a.shard or "://" in b.shard
    if a.shard == b.shard or not remote and os.path.samefile(a.shard, b.shard):
        return a.key == b.key
    if (a.steps, a.rate) != (b.steps, b.rate):
        return False
    try:
        states = [reader.motion(r, np.arange(r.steps))[1] for r in (a, b)]
    except DAMAGE:
        return True
    return np.array_equal(*states)


# --- clips ---


def pose_actions(states):
    """states (T, 7) [xyz, extrinsic xyz Euler, gripper] -> actions (T-1, 7): differences, of the
    rotation the Euler angles of R[t+1] R[t]^T (vjepa2 app/vjepa_droid/droid.py)."""
    turn = Rotation.from_euler("xyz", states[:, 3:6])
    actions = np.diff(states, axis=0)
    actions[:, 3:6] = (turn[1:] * turn[:-1].inv()).as_euler("xyz")
    return actions


def compose_poses(state0, actions, mean, scale):
    """model.compose_states for poses: states (B, K, 7) before each of K scaled actions (B, K, 7),
    from the first (B, 7). The gripper stays within [0, 1] (vjepa2 compute_new_pose)."""
    moves, poses = (actions * scale + mean).double().cpu().numpy(), [state0.double().cpu().numpy()]
    for a in moves.swapaxes(0, 1)[:-1]:
        p = poses[-1]
        turn = (
            Rotation.from_euler("xyz", a[:, 3:6]) * Rotation.from_euler("xyz", p[:, 3:6])
        ).as_euler("xyz")
        poses.append(
            np.concatenate([p[:, :3] + a[:, :3], turn, np.clip(p[:, 6:] + a[:, 6:], 0, 1)], axis=1)
        )
    return torch.from_numpy(np.stack(poses, axis=1)).to(state0)


def crop_resize(frames, size, low, high):
    """[(H, W, 3)] uint8 -> (T, 3, size, size) uint8: the centre, cut to a width/height within [low,
    high], squeezed to a square, bilinear without antialias: what vjepa2's random_resized_crop comes
    to with its settings for DROID (0.75, 1.35)."""
    h, w = frames[0].shape[:2]
    ch, cw = min(h, round(w / low)), min(w, round(h * high))
    y, x = (h - ch) // 2, (w - cw) // 2
    video = (
        torch.from_numpy(np.stack([f[y : y + ch, x : x + cw] for f in frames]))
        .permute(0, 3, 1, 2)
        .float()
    )
    return (
        torch.nn.functional.interpolate(video, (size, size), mode="bilinear")
        .round_()
        .to(torch.uint8)
    )


class DroidReader:
    """What a clip is (the ClipReader of robots): frames every `stride` steps, one frame a step of
    the model, so T = frames_per_clip.

    stride: default ceil(rate / fps), 4 of DROID's 15 Hz at 4 fps; 15 is what Meta's loader makes of
    raw DROID, whose mp4s claim 60 fps. camera: names, of which each clip draws one: exterior_1,
    exterior_2, wrist; raw also left, right; an own NAME.mp4 is taken for any; none to read actions
    only. crop: "reference" or "square". state_keys, action_keys: fields in place of the pose and
    its differences; actions given by key are means over the steps between two frames. extrinsics:
    also give the camera's (T, 6). scaler: ActionScaler or None. After open_droid: names (of the
    actions), units, state_dim."""

    frames_per_step = 1

    def __init__(
        self,
        frames_per_clip=8,
        fps=4.0,
        crop_size=256,
        crop="reference",
        camera=("exterior_1",),
        stride=None,
        state_keys=None,
        action_keys=None,
        scaler=None,
        extrinsics=False,
    ):
        if frames_per_clip < 2 or fps <= 0 or (stride or 1) < 1:
            raise ValueError(
                f"--frames_per_clip {frames_per_clip} --fps {fps:g} --stride {stride} make no clip"
                " of two frames"
            )
        self.frames, self.fps, self.crop_size, self.stride = frames_per_clip, fps, crop_size, stride
        self.crop, self.aspect = crop, {"reference": (0.75, 1.35), "square": (1.0, 1.0)}[crop]
        self.camera = (camera,) if isinstance(camera, str) else tuple(camera)
        self.state_keys, self.action_keys, self.scaler, self.extrinsics = (
            state_keys,
            action_keys,
            scaler,
            extrinsics,
        )
        self.names, self.units, self.state_dim = POSE, POSE_UNITS, 7

    def stride_of(self, r):
        return (
            1
            if r.kind == "features"
            else self.stride or max(math.ceil(r.rate / self.fps - 1e-6), 1)
        )

    def starts(self, r):
        """Number of steps at which a clip can start."""
        return max(r.last - r.first - (self.frames - 1) * self.stride_of(r), 0)

    def views(self, r):
        return [c for c in self.camera if c in r.members] or [c for c in r.members if c == "video"]

    def flaw(self, r):
        """Why an episode cannot be used, or ''."""
        needed = (
            (*(self.state_keys or STATES["rlds"]), *(self.action_keys or ()))
            if r.kind == "rlds"
            else ()
        )
        missing = [k for k in needed if k not in r.members]
        if not r.steps or missing:
            return f"no {f'steps/{missing[0]}' if r.steps else 'steps'} in it"
        for k in needed:
            _, size, kind = r.members[k]
            if kind == "bytes" and size:
                return f"steps/{k} holds bytes (text or pictures), not numbers"
        if self.camera and r.kind != "features" and not self.views(r):
            named = [] if r.kind == "rlds" else sorted(r.members)
            has = f", but {', '.join(named)}" if named else ""
            return f"no camera {' or '.join(self.camera)} in it{has} (--camera)"
        no_extrinsics = self.extrinsics and (
            r.kind in ("rlds", "features") or any(r.members[c][1] is None for c in self.views(r))
        )
        return "no camera extrinsics in it (raw DROID has them)" if no_extrinsics else ""

    def motion(self, r, sampled):
        """Episode, increasing steps (T,) -> actions (T-1, A) unscaled, states (T, S), float64.
        Reads low-dimensional fields only."""
        if r.kind == "features":  # of which all steps are taken, from the first to the last
            return tuple(
                x.double().numpy()
                for x in feature_rows(r, sampled[0], sampled[-1] + 1, motion_only=True)[1:]
            )
        keys = [*(self.state_keys or STATES[r.kind]), *(self.action_keys or ())]
        found = read_fields(r, keys)
        n = len(keys) - len(self.action_keys or ())
        if not self.action_keys and keys != STATES[r.kind]:
            raise ValueError(
                f"--state_keys {' '.join(keys)} is not taken for a pose, whose differences would be"
                " the actions: name --action_keys too"
            )
        states = np.concatenate(found[:n], axis=1)[sampled]
        if not np.isfinite(states).all():
            raise ValueError("its states are not finite")
        if self.action_keys:
            rows = np.concatenate(found[n:], axis=1)[sampled[0] : sampled[-1]]
            actions = np.add.reduceat(rows, sampled[:-1] - sampled[0]) / np.diff(sampled)[:, None]
            self.names = [
                f"{k}.{i}" for k, x in zip(self.action_keys, found[n:]) for i in range(x.shape[1])
            ]
            self.units = ["mean"] * len(self.names)
        elif [x.shape[1] for x in found] != [6, 1]:
            sizes = " and ".join(str(x.shape[1]) for x in found)
            raise ValueError(
                f"{' and '.join(keys)} are {sizes} numbers, and pose differences need 6 (xyz,"
                " Euler angles) and 1: name --state_keys and --action_keys"
            )
        elif np.abs(states[:, 3:6]).max() > 4 * np.pi:
            raise ValueError(
                f"the angles of {keys[0]} reach {np.abs(states[:, 3:6]).max():.0f}: degrees? Euler"
                " angles are in radians"
            )
        else:
            actions = pose_actions(states)
        if not np.isfinite(actions).all():
            raise ValueError("its actions are not finite")
        self.state_dim = states.shape[1]
        return actions, states

    def pictures(self, r, camera, sampled):
        """(T, 3, H, W) uint8 of increasing steps, as the encoder takes them."""
        return crop_resize(read_pictures(r, camera, sampled), self.crop_size, *self.aspect)

    def __call__(self, r, start, rng):
        """A clip from step `start`; rng draws the camera."""
        sampled = start + self.stride_of(r) * np.arange(self.frames)
        if r.kind == "features":
            z, actions, states = (
                x.numpy() if i else x
                for i, x in enumerate(feature_rows(r, start, start + self.frames))
            )
            seen = {"z": z}
        else:
            (actions, states), views = self.motion(r, sampled), self.views(r)
            camera = views[rng.integers(len(views))]
            seen = {"video": self.pictures(r, camera, sampled)}
        actions = actions if self.scaler is None else self.scaler.transform(actions)
        clip = {"actions": actions, "states": states}
        if self.extrinsics:
            clip["extrinsics"] = read_fields(r, [r.members[camera][1]])[0][sampled]
        clip = {k: torch.from_numpy(np.float32(x)) for k, x in clip.items()}
        return clip | seen | {"key": r.key}


class DroidSteps:
    """Actions alone, for fit_scaler.py: all those between frames a stride apart, from each
    episode's first row on. No picture is read."""

    def __init__(self, fps, stride, state_keys, action_keys):
        self.reader = DroidReader(
            fps=fps, stride=stride, camera=(), state_keys=state_keys, action_keys=action_keys
        )

    def open(self, data, max_shards, val_fraction, log):
        """-> [Episode] less those that open_droid holds out, of max_shards files spread over all;
        bad; names and units of the actions."""
        found, _, bad = open_droid(
            data, None, val_fraction, self.reader, idle_filter="off", verify=False, log=log
        )
        if found[0].kind == "features":  # an episode once: not from each camera and phase
            found = [*{r.recording: r for r in reversed(found)}.values()][::-1]
        kept = set(spread(sorted({r.shard for r in found}), max_shards))
        return [r for r in found if r.shard in kept], bad, self.reader.names, self.reader.units

    def __call__(self, r):
        """Episode -> [(file, key, bytes of its actions, actions (n, A) float64 or None, flaw)]."""
        try:
            steps = self.reader.motion(r, np.arange(r.first, r.last, self.reader.stride_of(r)))[0]
            return [(r.source, r.recording, steps.nbytes, steps, "")]
        except (*DAMAGE, MemoryError) as e:
            if disk_failed(e):
                raise OSError(disk_sentence(f"{r.shard} {r.key}", e)) from e
            return [(r.shard, r.key, 0, None, f"{type(e).__name__}: {e}")]


class DroidClips(Clips):
    """data.Clips over Episodes, for Order, windows, collate and eval.held_out: an item is (epoch,
    index, record number, place)."""

    def __init__(self, records, reader, seed=0):
        super().__init__(records, [reader.starts(r) for r in records], reader, seed)

    def windows_in(self, record):
        if record.kind == "features":
            return record.length // (self.reader.frames // self.reader.frames_per_step)
        stride = max(round(20 / self.reader.fps), 1)  # of `length`, which open_episodes made
        return (record.length - 1 + stride) // (self.reader.frames * stride)

    def read(self, number, place, rng):
        r, starts = self.records[number], self.reader.starts(self.records[number])
        start = (
            int(place * starts)
            if isinstance(place, float)
            else place * self.reader.frames * self.reader.stride_of(r)
        )
        if start >= starts:
            raise ValueError(
                f"window {place} starts at step {start}, the last clip at {starts - 1}"
            )
        try:
            return self.reader(r, r.first + start, rng)
        except DAMAGE as e:
            if disk_failed(e):  # says nothing about the episode
                raise
            raise ValueError(
                f"damaged or changed since it was indexed ({type(e).__name__}: {e})"
            ) from e


def droid_clips(
    data,
    batch_size,
    *,
    reader=None,
    batches_per_epoch=None,
    num_workers=4,
    prefetch_factor=2,
    seed=0,
    epoch=0,
    itr=0,
    rank=0,
    world=1,
    pin_memory=False,
):
    """Endless DataLoader: batches {"video" (B, T, 3, H, W) uint8, "actions" (B, T-1, A) scaled,
    "states" (B, T, S), "key", "bad", and "extrinsics" (B, T, 6) if the reader is asked for them}.
    data: patterns, or [Episode] of open_droid. Order and resume are those of data.vpt_loader;
    without batches_per_epoch an epoch is one pass of clips that do not overlap. loader.bad: left
    out while indexing."""
    reader, bad = reader or DroidReader(), []
    if not isinstance(data[0], Episode):
        data, _, bad = open_droid(data, reader=reader)
    clips = sum(max((r.last - r.first) // (reader.frames * reader.stride_of(r)), 1) for r in data)
    dataset, batches_per_epoch = (
        DroidClips(data, reader, seed),
        batches_per_epoch or max(clips // (batch_size * world), 1),
    )
    order = Order(dataset, batch_size, batches_per_epoch, epoch, itr, rank, world)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals,
        pin_memory=pin_memory,
    )
    loader.bad = bad
    return loader


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="look into episodes: shapes, ranges, mean and std of one batch",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--inspect",
        metavar="SHARD",
        required=True,
        nargs="+",
        action="extend",
        help="shards, episodes, folders, globs, URLs",
    )
    parser.add_argument(
        "--camera", nargs="+", action="extend", help="views to draw from (default: exterior_1)"
    )
    parser.add_argument(
        "--state_keys",
        nargs="+",
        action="extend",
        help="fields of the state (default: the pose)",
    )
    parser.add_argument(
        "--action_keys",
        nargs="+",
        action="extend",
        help="fields of the action (default: differences of the pose)",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="clips to read")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="check all checksums of TFRecords, which reads them once (default: files up to 50 GB)",
    )
    args = parser.parse_args()
    sys.excepthook = one_sentence
    reader = DroidReader(
        camera=args.camera or ["exterior_1"],
        state_keys=args.state_keys,
        action_keys=args.action_keys,
    )
    paths = find_episodes(args.inspect)
    if all(path.endswith(".tar") for path in paths):
        # features can only be looked at as they were made
        found = index_episodes(paths, DroidReader(camera=()), False, print)[0]
        made = feature_settings([r for r, _ in found]) if found else {}
        if "crop_size" in made:
            reader.fps, reader.stride = float(made["fps"]), int(made["stride"]) or None
            reader.crop_size, reader.crop = int(made["crop_size"]), made["crop"]
            reader.camera = tuple(made["camera"].split())
            for name in ("state_keys", "action_keys"):
                keys = made[name].split()
                setattr(reader, name, None if keys == ["default"] else keys)
    records, _, bad = open_droid(args.inspect, reader=reader, idle_filter="off", verify=args.verify)
    batch = next(iter(droid_clips(records, args.batch_size, reader=reader, num_workers=0)))
    for file, key, reason in bad + batch["bad"]:
        print(f"left out: {file} {key}: {reason}")
    for name in [k for k in ("video", "z", "actions", "states") if k in batch]:
        x = batch[name].float()
        print(
            f"{name:8} {str(tuple(x.shape)):24} {str(batch[name].dtype)[6:]:8} from {x.min():.3f}"
            f" to {x.max():.3f}"
        )
    print(f"key      {batch['key'][0]}")
    print(f"{'action':18} {'min':>9} {'max':>9} {'mean':>9} {'std':>9}")
    for name, x in zip(reader.names, batch["actions"].flatten(0, 1).T):
        print(f"{name:18} {x.min():9.4f} {x.max():9.4f} {x.mean():9.4f} {x.std():9.4f}")
