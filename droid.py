"""Everything between robot episodes and a batch: DROID's RLDS TFRecords (without TensorFlow), raw
DROID, LeRobot data sets, and episodes of one's own.

    python -m droid --inspect droid/r2d2_faceblur-train.tfrecord-00000-of-00031

  *.tfrecord*     RLDS as released, on a disk or at any fsspec URL
                  (gs://gresearch/robotics/droid/1.0.1/*.tfrecord*)
  trajectory.h5   raw DROID, with recordings/MP4/*.mp4 and metadata_*.json beside it; or folders of
                  them, or Meta's .csv of folders
  FOLDER          a LeRobot data set, 3.0 or 2.1: the folder that contains meta/info.json, also at
                  any fsspec URL (hf://datasets/lerobot/droid_1.0.1)
  NAME.npz        one's own robot (prepare/robot.py says what is in it), with NAME.mp4 or
                  NAME.CAMERA.mp4 beside it
  *.tar           features of any of them (encode.py --dataset droid)

Episodes are indexed once (cached under NANOJEPA_CACHE) and shuffled by index, with data.Order. That
mixes everything, resumes exactly and costs nothing. A shuffle buffer of 100,000 pictures takes
17 GB, mixes only neighbours and is lost when a run stops."""

import argparse
import collections
import copy
import fnmatch
import functools
import hashlib
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from checkpoint import short_excepthook
from data import Clips, Order, check_fraction, collate, ignore_signals_in_worker
from files import lerobot
from files.disk import DAMAGE, is_storage_error, storage_sentence, with_retries
from files.episodes import (
    STATES,
    Episode,
    camera_name,
    filesystem,
    index_file,
    read_fields,
    read_pictures,
)
from files.features import check_features, feature_rows, feature_settings, keep_ranges, to_steps
from files.progress import tqdm
from files.shards import braces, files_below, matches, spread, without_links

# of a state, and of the action to the next one
POSE = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
POSE_UNITS = ["m"] * 3 + ["rad"] * 3 + ["closed"]
# least and most width/height of what --crop cuts from the centre
ASPECTS = {"reference": (0.75, 1.35), "square": (1.0, 1.0)}
VERIFY = 50e9  # bytes; above them checking all checksums takes longer than it is worth

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
        " (.tar), the folder of a LeRobot data set (that of meta/info.json), or folders of them"
    )


def episodes_at_url(url):
    """The files that a URL with * and ? matches, the data files of LeRobot data sets among them, or
    a folder's TFRecords."""
    fs, name = filesystem(url)
    if "*" not in name and "?" not in name:
        data_files = data_files_of(url)
        if data_files or not url.endswith("/"):
            return data_files or [url]
        url += "*.tfrecord*"
        name += "/*.tfrecord*"
    found = with_retries(url, lambda: fs.glob(name))
    if not found:
        raise no_episode(url)
    out = []
    for match in sorted(map(fs.unstrip_protocol, found)):
        out += data_files_of(match) or [match]
    return out


def data_files_of(place):
    """The data files of the LeRobot data set in a folder or at a URL, [] where there is none."""
    folder = place.removesuffix("meta/info.json").rstrip("/")
    if ".tfrecord" in os.path.basename(folder) or folder.endswith((".parquet", ".tar")):
        return []
    if not lerobot.is_set(folder):
        return []
    return lerobot.data_files(folder)


def episodes_in(path):
    """What exists -> the files of episodes there: in a folder, in Meta's .csv of folders, or the
    file itself."""
    if path.endswith(".csv"):  # Meta's list: a folder a line, then a label
        with open(path) as f:
            return find_episodes([line.split()[0] for line in f if line.strip()])
    data_files = data_files_of(path)
    if data_files or not os.path.isdir(path):
        return data_files or [path]
    files = []
    for file in files_below(path):
        parts = os.path.relpath(file, path).split(os.sep)
        hidden = any(part.startswith(".") for part in parts)  # ._NAME of macOS among them
        kinds = ("*.tfrecord*", "trajectory.h5", "*.npz", "*.tar")
        if not hidden and any(fnmatch.fnmatchcase(parts[-1], kind) for kind in kinds):
            files.append(file)
        elif not hidden and parts[-2:] == ["meta", "info.json"]:
            files += data_files_of(file)
    return sorted(files)


def index_episodes(paths, reader, verify, log):
    """Files -> ([(Episode, its entry of index_file)] that a reader can use, whole, [bad]).

    verify: check all checksums, which reads it all; None does that for local files up to VERIFY."""
    verify = choose_verify(paths, verify, log)
    with ThreadPoolExecutor(16) as pool:
        results = pool.map(lambda path: index_file(path, verify), paths)
        indexed = list(tqdm(results, "index", len(paths), unit=" files", delay=10))

    # the metadata of a LeRobot data set are looked at once, not for each of its episodes
    open_set = functools.cache(lerobot.open_set)

    found = []
    bad = []
    for path, (kind, episodes, of_file) in zip(paths, indexed):
        bad += [tuple(b) for b in of_file]
        for entry in episodes:
            r = episode_of(path, kind, entry, reader)
            flaw = reader.flaw(r, open_set)
            if flaw:
                bad.append((path, r.key, flaw))
            else:
                found.append((r, entry))

    found, copies = leave_out_copies(found)
    if copies:
        kept, copy = copies[0]
        log(
            f"left out: {len(copies)} episodes that are copies of others, {copy.shard}"
            f" {copy.recording} of {kept.shard} {kept.recording} among them"
        )
    noted = [(r, entry["note"]) for r, entry in found if entry.get("note")]
    if noted:
        r, note = noted[0]
        log(f"WARNING: {len(noted)} of {len(found)} episodes, {r.shard} among them: {note}")
    warning = rate_warning([r for r, _ in found], reader)
    if warning:
        log(warning)
    return found, bad


def choose_verify(paths, verify, log):
    """The `verify` of index_file; what is not checked goes to the log."""
    if verify is not None:
        return verify
    # parquet has no checksums that are looked at
    paths = [p for p in paths if not p.endswith(".parquet")]
    size = sum(os.path.getsize(p) for p in paths if "://" not in p)
    why = ""
    if size > VERIFY:  # all of DROID is 1.7 TB
        verify = False
        why = f"{size / 1e9:.0f} GB"
    elif any("://" in p and not p.endswith(".tar") for p in paths):
        why = "URLs"
    if why:
        log(
            f"{why}: checksums are not checked, lengths are: changed bytes inside a picture or a"
            " number are noticed only where they cannot be decoded (--verify checks all checksums,"
            " which reads all of it once)"
        )
    return verify


def episode_of(path, kind, entry, reader):
    """An entry of index_file -> the Episode, whole."""
    members = entry["members"]
    if kind == "rlds":
        # of 30 features, those that are not read need not stay in memory
        needed = {*reader.camera, *(reader.state_keys or STATES["rlds"])}
        needed |= {*(reader.action_keys or ())}
        members = {}
        for name, (at, size, detail) in entry["members"].items():
            if isinstance(detail, list):
                detail = np.array(detail, np.uint32)  # sizes of pictures
            if name in needed:
                members[name] = (at, size, detail)
    if kind == "lerobot":
        members = {name: members[name] for name in reader.cameras if name in members}
    steps = entry["steps"]
    return Episode(
        path,
        entry["key"],
        kind,
        members,
        steps,
        entry.get("rate", 15.0),
        first=0,
        last=entry.get("last", steps),
        length=0,
        identity=entry.get("identity", ""),
        place=tuple(entry.get("place", ())),
    )


def leave_out_copies(found):
    """[(Episode, entry)] -> those of them that are no copies, [(Episode, its copy)]: a copy could
    be held out and trained on."""
    first = {}
    out = []
    copies = []
    for r, entry in found:
        kept = first.setdefault((r.kind, r.identity), r) if r.identity else r
        if kept is r:
            out.append((r, entry))
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
    """Patterns -> ([Episode], [bad]), each Episode a stretch that the filters keep; what they leave
    out goes to the log. ValueError if nothing is left."""
    found, bad = index_episodes(find_episodes(data), reader, verify, log)
    out = []
    count = collections.Counter()
    for r, entry in found:
        starts = reader.starts(r)
        runs = entry["still"] if idle_filter == "light" else entry["idle"]
        # where the steps of features lie among the rows of their episode
        first_row, every, last_row = entry.get("rows", (0, 1, r.last))
        count["rows"] += last_row
        count["idle rows"] += sum(b - a for a, b in runs or ())
        if success == "only" and not entry["success"]:
            count["failures"] += 1
            continue
        if not starts:
            count["short"] += 1
            continue
        count["unknown"] += runs is None
        count["starts"] += starts
        rule = "off" if runs is None else idle_filter
        span = (reader.frames - 1) * reader.stride_of(r) * every + 1  # rows of a clip
        ranges = keep_ranges(runs, last_row, rule, span)
        out += stretches(r, to_steps(ranges, first_row, every), reader)
    out = [r for r in out if reader.starts(r)]
    if not out:
        patterns = [data] if isinstance(data, str) else list(data)
        place = patterns[0] + (f" and {len(patterns) - 1} more" if len(patterns) > 1 else "")
        raise ValueError(
            f"no usable episode in {place}: {why_nothing(bad, count, len(found), reader)}"
        )

    kind = "segments of features" if out[0].kind == "features" else "episodes"
    idle = count["idle rows"] / count["rows"]
    share = sum(map(reader.starts, out)) / count["starts"]
    unknown = ""
    if count["unknown"]:
        unknown = f" ({count['unknown']} of which it is not known what is idle: all)"
    log(
        f"{len(found)} {kind}, {idle:.1%} of their rows idle: {count['failures']} without success"
        f" left out, {count['short']} shorter than a clip, of the others --idle_filter"
        f" {idle_filter} keeps {share:.1%} of {count['starts']} starts of clips{unknown}, in"
        f" {len(out)} stretches"
    )
    return out, bad


def stretches(r, ranges, reader):
    """Ranges [[first, after)] of an Episode -> an Episode each."""
    stride = reader.stride_of(r)
    # ticks a sampled frame, as data.windows counts
    ticks = 1 if r.kind == "features" else max(round(20 / reader.fps), 1)
    out = []
    for a, b in ranges:
        if b > a:
            out.append(r._replace(first=a, last=b, length=(b - a - 1) // stride * ticks + 1))
    return out


def why_nothing(bad, count, episodes, reader):
    """Why no episode is left, for an error."""
    if bad:
        reasons = {}  # one of each kind
        for b in bad:
            reasons.setdefault(b[2], b)
        return "; ".join(" ".join(b) for b in list(reasons.values())[:3])
    if count["short"]:
        return (
            f"{count['short']} of {episodes} are shorter than a clip of {reader.frames} frames"
            " (--frames_per_clip, --fps, --stride), and the filters leave nothing of the rest"
        )
    return "the filters leave nothing (--idle_filter off --success all keep everything)"


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
        val, bad_val = open_episodes(val_data, reader, idle_filter, success, verify, log)
        bad = bad + bad_val
        twice = shared(train, val, reader)
        if twice:
            raise ValueError(
                f"--val_data and --data share {len(twice)} episodes, {min(twice)} among them: hold"
                " them out of --data"
            )
    else:
        held_out_names = hold_out({r.recording for r in train}, val_fraction)
        val = [r for r in train if r.recording in held_out_names]
        train = [r for r in train if r.recording not in held_out_names]
    if any(r.kind == "features" for r in train + val):
        check_features(train + val, reader)

    # a hundred episodes are enough to speak of a share
    episodes = len({r.key for r in train + val}) + len(bad)
    if episodes >= 100 and len(bad) > max_bad_fraction * episodes:
        worst = " ".join(bad[0])
        raise ValueError(
            f"{len(bad)} of {episodes} episodes cannot be read, {worst} among them: fix them, or"
            " raise --max_bad_fraction"
        )
    learn_dimensions(train, reader)
    return train, val, bad


def hold_out(names, val_fraction):
    """The share of the names that have the lowest hashes: at least one for a share above 0, and not
    all of them."""
    names = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    count = max(round(len(names) * val_fraction), int(val_fraction > 0))
    return set(names[: min(count, len(names) - 1)])


def learn_dimensions(records, reader, tries=20):
    """Read the motion of the first episode that can be read: it teaches the reader the names of the
    actions and the size of the state. ValueError if none of the first `tries` can be read."""
    for r in records[:tries]:
        try:
            reader.motion(r, np.array([r.first, r.last - 1]))
            return
        except (*DAMAGE, MemoryError) as e:
            if is_storage_error(e):
                raise OSError(storage_sentence(f"{r.shard} {r.key}", e)) from e
            failed = r
            error = e
    if records:
        raise ValueError(f"{failed.shard} {failed.key}: {error}") from error


def shared(train, val, reader):
    """Names of the episodes that are in both lists. Names alone do not tell: two folders may have
    files of one name, or one metadata for all, and a copy may lie anywhere. So episodes of one name
    are the same if they are of the same file, or if they move in the same way."""
    identities = {r.identity for r in train if r.identity}
    named = {}  # recording: its entries, each once
    for r in train:
        named.setdefault(r.recording, {}).setdefault((r.shard, r.key), r)
    twice = set()
    seen = set()
    for r in val:
        if r.recording in twice or (r.shard, r.key) in seen:
            continue
        seen.add((r.shard, r.key))
        if r.identity in identities:
            twice.add(r.recording)
            continue
        others = [*named.get(r.recording, {}).values()]
        # segments of features can be compared where they begin at the same row
        alike = [x for x in others if first_row(x) == first_row(r)]
        if any(same_episode(r, x, reader) for x in alike or others):
            twice.add(r.recording)
    return twice


def first_row(r):
    """The row that a segment of features begins at, as its key says."""
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
    moves = (actions * scale + mean).double().cpu().numpy()
    poses = [state0.double().cpu().numpy()]
    for move in moves.swapaxes(0, 1)[:-1]:
        pose = poses[-1]
        turn = Rotation.from_euler("xyz", move[:, 3:6]) * Rotation.from_euler("xyz", pose[:, 3:6])
        place = pose[:, :3] + move[:, :3]
        gripper = np.clip(pose[:, 6:] + move[:, 6:], 0, 1)
        poses.append(np.concatenate([place, turn.as_euler("xyz"), gripper], axis=1))
    return torch.from_numpy(np.stack(poses, axis=1)).to(state0)


def crop_resize(frames, size, low, high, share=1.0, place=(0.5, 0.5)):
    """[(H, W, 3)] uint8 -> (T, 3, size, size) uint8: the centre, cut to a width/height within [low,
    high], squeezed to a square, bilinear without antialias. That is what vjepa2's
    random_resized_crop does with its settings for DROID (0.75, 1.35).

    share: of the sides of that cut, which is then the part at `place`: from (0, 0), its upper left
    corner, to (1, 1)."""
    h, w = frames[0].shape[:2]
    height = min(h, round(w / low))
    width = min(w, round(h * high))
    top = (h - height) // 2
    left = (w - width) // 2

    # a part of it, for augmentation
    if share < 1:
        part = (max(round(share * height), 1), max(round(share * width), 1))
        top += math.floor(place[0] * (height - part[0]))
        left += math.floor(place[1] * (width - part[1]))
        height, width = part

    cut = np.stack([f[top : top + height, left : left + width] for f in frames])
    video = torch.from_numpy(cut).permute(0, 3, 1, 2).float()  # (T, 3, height, width)
    video = torch.nn.functional.interpolate(video, (size, size), mode="bilinear")
    return video.round_().to(torch.uint8)


def jittered(sampled, most, last, rng):
    """Rows (T,) moved by up to `most` at random. They stay in order, different, and within 0 to
    `last`."""
    order = np.arange(len(sampled))
    moved = sampled + rng.integers(-most, most + 1, len(sampled))
    moved = np.maximum.accumulate(moved - order)
    return np.clip(moved, 0, last - len(sampled) + 1) + order


def recoloured(video, most, rng):
    """(T, 3, H, W) uint8 with brightness, contrast and saturation each changed by up to `most`, all
    frames alike: in place of x, grey + (1 + change) * (x - grey). Grey is black, the clip's mean,
    and the pixel's own."""
    video = video.float()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    for kind in ("brightness", "contrast", "saturation"):
        grey = torch.zeros(1)
        if kind != "brightness":
            grey = (video * weights).sum(1, keepdim=True)
        if kind == "contrast":
            grey = grey.mean()
        video = torch.lerp(grey.expand_as(video), video, 1 + rng.uniform(-most, most))
        video = video.clamp(0, 255)
    return video.round_().to(torch.uint8)


class DroidReader:
    """What a clip is (the ClipReader of robots): frames every `stride` rows, one frame a step of
    the model, so T = frames_per_clip.

    stride: default ceil(rate / fps), 4 of DROID's 15 Hz at 4 fps; 15 is what Meta's loader makes of
    raw DROID, whose mp4s claim 60 fps.
    crop: "reference" or "square".
    camera: names, one of which is drawn for each clip: exterior_1, exterior_2, wrist; raw also
    left, right. An own NAME.mp4 serves for any; LeRobot's are named by their feature, with or
    without "observation.images.". () reads actions only.
    state_keys, action_keys: fields instead of the pose and its differences; actions given by key
    are means over the rows between two frames.
    scaler: ActionScaler or None.

    After open_droid it knows names (of the actions), units and state_dim."""

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
    ):
        if frames_per_clip < 2 or fps <= 0 or (stride or 1) < 1:
            raise ValueError(
                f"--frames_per_clip {frames_per_clip} --fps {fps:g} --stride {stride} make no clip"
                " of two frames"
            )
        self.frames = frames_per_clip
        self.fps = fps
        self.stride = stride
        self.crop_size = crop_size
        self.crop = crop
        self.aspect = ASPECTS[crop]
        self.camera = (camera,) if isinstance(camera, str) else tuple(camera)
        self.state_keys = state_keys
        self.action_keys = action_keys
        self.scaler = scaler
        self.names = POSE
        self.units = POSE_UNITS
        self.state_dim = 7

        # augmentation is off: see `augmented`
        self.resize = 1.0
        self.color = 0.0
        self.jitter = 0
        self.noise = 0.0

    def augmented(self, random_resize_scale, color_jitter, temporal_jitter, action_noise):
        """The same reader with augmentation, for training alone. ValueError for impossible values.

        random_resize_scale: the smallest part of the crop that is shown, as a share of its sides.
        color_jitter: brightness, contrast and saturation change by up to this share.
        temporal_jitter: each sampled row moves by up to that many; actions are those between the
        moved rows. action_noise: std of noise on the actions, in scaled units."""
        values = {
            "random_resize_scale": (random_resize_scale, 0 < random_resize_scale <= 1),
            "color_jitter": (color_jitter, 0 <= color_jitter < 1),
            "temporal_jitter": (temporal_jitter, temporal_jitter >= 0),
            "action_noise": (action_noise, 0 <= action_noise < math.inf),
        }
        ranges = {
            "random_resize_scale": "above 0, at most 1",
            "color_jitter": "from 0 to below 1",
            "temporal_jitter": "0 or more rows",
            "action_noise": "0 or more",
        }
        for name, (value, possible) in values.items():
            if not possible:
                raise ValueError(f"--{name} {value}: give {ranges[name]}")
        reader = copy.copy(self)
        reader.resize = random_resize_scale
        reader.color = color_jitter
        reader.jitter = temporal_jitter
        reader.noise = action_noise
        return reader

    def stride_of(self, r):
        """Rows from one frame to the next; features have all their steps."""
        if r.kind == "features":
            return 1
        return self.stride or max(math.ceil(r.rate / self.fps - 1e-6), 1)

    def starts(self, r):
        """Number of rows at which a clip can start."""
        return max(r.last - r.first - (self.frames - 1) * self.stride_of(r), 0)

    @property
    def cameras(self):
        """The cameras by short names, which LeRobot's features also go by."""
        return [camera_name(c) for c in self.camera]

    def views(self, r):
        """Those of the cameras that an episode has."""
        if r.kind == "lerobot":
            return [c for c in self.cameras if r.members.get(c, ["missing"])[0] != "missing"]
        return [c for c in self.camera if c in r.members] or [c for c in r.members if c == "video"]

    def flaw(self, r, open_set=lerobot.open_set):
        """Why an episode cannot be used, or ''. open_set: what opens the metadata of its data set,
        if it is one of LeRobot's."""
        if r.kind == "lerobot":
            return self.lerobot_flaw(r, open_set(r.place[0]))
        needed = []
        if r.kind == "rlds":
            needed = [*(self.state_keys or STATES["rlds"]), *(self.action_keys or ())]
        missing = [k for k in needed if k not in r.members]
        if not r.steps:
            return "no steps in it"
        if missing:
            return f"no steps/{missing[0]} in it"
        for k in needed:
            size, kind = r.members[k][1:]
            if kind == "bytes" and size:
                return f"steps/{k} holds bytes (text or pictures), not numbers"
        if self.camera and r.kind != "features" and not self.views(r):
            named = [] if r.kind == "rlds" else sorted(r.members)
            has = f", but {', '.join(named)}" if named else ""
            return f"no camera {' or '.join(self.camera)} in it{has} (--camera)"
        return ""

    def lerobot_flaw(self, r, dataset):
        """`flaw` of an episode of a LeRobot data set."""
        if not r.steps:
            return "no steps in it"
        for key in [*(self.state_keys or STATES["lerobot"]), *(self.action_keys or ())]:
            if key not in dataset.numbers:
                has = ", ".join(f"{name} ({size})" for name, size in dataset.numbers.items())
                return f"no {key} in it, but {has or 'no numbers'} (--state_keys, --action_keys)"
        if not self.camera or self.views(r):
            return ""
        for camera in self.cameras:
            if camera in r.members:
                return f"{r.members[camera][1]} is not there, in which {camera} was recorded"
        has = ", ".join(dataset.cameras) or "none"
        return f"no camera {' or '.join(self.camera)} in it, but {has} (--camera)"

    def motion(self, r, sampled):
        """Episode, increasing rows (T,) -> actions (T-1, A) unscaled, states (T, S), float64. Reads
        low-dimensional fields only. ValueError for fields that make no motion."""
        if r.kind == "features":  # of which all steps are taken, from the first to the last
            rows = feature_rows(r, sampled[0], sampled[-1] + 1, motion_only=True)
            return tuple(x.double().numpy() for x in rows[1:])

        state_keys = self.state_keys or STATES[r.kind]
        action_keys = self.action_keys or []
        fields = read_fields(r, [*state_keys, *action_keys])
        of_state = fields[: len(state_keys)]
        of_action = fields[len(state_keys) :]
        if not action_keys and [*state_keys] != STATES[r.kind]:
            raise ValueError(
                f"--state_keys {' '.join(state_keys)} is not taken for a pose, whose differences"
                " would be the actions: name --action_keys too"
            )
        states = np.concatenate(of_state, axis=1)[sampled]
        if not np.isfinite(states).all():
            raise ValueError("its states are not finite")

        if action_keys:
            rows = np.concatenate(of_action, axis=1)[sampled[0] : sampled[-1]]
            sums = np.add.reduceat(rows, sampled[:-1] - sampled[0])
            actions = sums / np.diff(sampled)[:, None]
            self.names = []
            for key, x in zip(action_keys, of_action):
                self.names += [f"{key}.{i}" for i in range(x.shape[1])]
            self.units = ["mean"] * len(self.names)
        else:
            check_pose(state_keys, of_state, states)
            actions = pose_actions(states)
        if not np.isfinite(actions).all():
            raise ValueError("its actions are not finite")
        self.state_dim = states.shape[1]
        return actions, states

    def pictures(self, r, camera, sampled, rng=None):
        """(T, 3, size, size) uint8 of increasing rows, as the encoder takes them. rng: for the
        augmentations; None leaves them out."""
        part = ()
        if rng is not None and self.resize < 1:
            part = (rng.uniform(self.resize, 1), rng.uniform(0, 1, 2))
        video = read_pictures(r, camera, sampled)
        video = crop_resize(video, self.crop_size, *self.aspect, *part)
        if rng is not None and self.color:
            video = recoloured(video, self.color, rng)
        return video

    def __call__(self, r, start, rng):
        """A clip from row `start`; rng draws the camera and the augmentations."""
        sampled = start + self.stride_of(r) * np.arange(self.frames)
        if r.kind == "features":
            z, actions, states = feature_rows(r, start, start + self.frames)
            actions = actions.numpy()
            states = states.numpy()
            seen = {"z": z}
        else:
            if self.jitter:
                sampled = jittered(sampled, self.jitter, r.steps - 1, rng)
            actions, states = self.motion(r, sampled)
            views = self.views(r)
            camera = views[rng.integers(len(views))]
            seen = {"video": self.pictures(r, camera, sampled, rng)}
        if self.scaler is not None:
            actions = self.scaler.transform(actions)
        if self.noise:
            actions = actions + self.noise * rng.standard_normal(actions.shape)
        clip = {"actions": actions, "states": states}
        clip = {k: torch.from_numpy(np.float32(x)) for k, x in clip.items()}
        return clip | seen | {"key": r.key}


def check_pose(keys, fields, states):
    """ValueError unless the fields are a pose: xyz and Euler angles in radians; the gripper."""
    sizes = [x.shape[1] for x in fields]
    if sizes != [6, 1]:
        raise ValueError(
            f"{' and '.join(keys)} are {' and '.join(map(str, sizes))} numbers, and pose"
            " differences need 6 (xyz, Euler angles) and 1: name --state_keys and --action_keys"
        )
    largest = np.abs(states[:, 3:6]).max()
    if largest > 4 * np.pi:
        raise ValueError(
            f"the angles of {keys[0]} reach {largest:.0f}: degrees? Euler angles are in radians"
        )


class DroidSteps:
    """Actions alone, for fit_scaler.py: all those between frames a stride apart, from each
    episode's first row on. No picture is read. Episodes shorter than frames_per_clip are left out
    before any are held out: training, which has no use for them, then holds out the same ones."""

    def __init__(self, fps, stride, state_keys, action_keys, frames_per_clip=8):
        keys = {"state_keys": state_keys, "action_keys": action_keys}
        clip = {"frames_per_clip": frames_per_clip, "fps": fps, "stride": stride}
        self.reader = DroidReader(**clip, camera=(), **keys)

    def open(self, data, max_shards, val_fraction, log):
        """-> [Episode] less those that open_droid holds out, of max_shards files spread over all;
        bad; names and units of the actions."""
        found, _, bad = open_droid(
            data, None, val_fraction, self.reader, idle_filter="off", verify=False, log=log
        )
        if found[0].kind == "features":
            # an episode once, not from each camera and phase: the first of each name, in order
            firsts = {r.recording: r for r in reversed(found)}
            found = list(reversed(firsts.values()))
        kept = set(spread(sorted({r.shard for r in found}), max_shards))
        return [r for r in found if r.shard in kept], bad, self.reader.names, self.reader.units

    def __call__(self, r):
        """Episode -> [(file, key, bytes of its actions, actions (n, A) float64 or None, flaw)]."""
        rows = np.arange(r.first, r.last, self.reader.stride_of(r))
        try:
            actions, _ = self.reader.motion(r, rows)
        except (*DAMAGE, MemoryError) as e:
            if is_storage_error(e):
                raise OSError(storage_sentence(f"{r.shard} {r.key}", e)) from e
            return [(r.shard, r.key, 0, None, f"{type(e).__name__}: {e}")]
        return [(r.source, r.recording, actions.nbytes, actions, "")]


class DroidClips(Clips):
    """data.Clips over Episodes, for Order, windows, collate and eval.held_out: an item is (epoch,
    index, record number, place)."""

    def __init__(self, records, reader, seed=0):
        super().__init__(records, [reader.starts(r) for r in records], reader, seed)

    def windows_in(self, record):
        """Clips of a record that do not overlap."""
        if record.kind == "features":
            return record.length // (self.reader.frames // self.reader.frames_per_step)
        stride = max(round(20 / self.reader.fps), 1)  # in ticks, as `stretches` counts length
        return (record.length - 1 + stride) // (self.reader.frames * stride)

    def read(self, number, place, rng):
        """The clip at a place: a float in [0, 1) is a share of the starts, an int a window."""
        r = self.records[number]
        starts = self.reader.starts(r)
        if isinstance(place, float):
            start = int(place * starts)
        else:
            start = place * self.reader.frames * self.reader.stride_of(r)
        if start >= starts:
            raise ValueError(
                f"window {place} starts at step {start}, the last clip at {starts - 1}"
            )
        try:
            return self.reader(r, r.first + start, rng)
        except DAMAGE as e:
            if is_storage_error(e):  # says nothing about the episode
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
    "states" (B, T, S), "key", "bad"}.

    data: patterns, or [Episode] of open_droid. Order and resume are those of data.vpt_loader;
    without batches_per_epoch an epoch is one pass of clips that do not overlap. loader.bad lists
    what was left out while indexing."""
    reader = reader or DroidReader()
    bad = []
    if not isinstance(data[0], Episode):
        data, _, bad = open_droid(data, reader=reader)
    if not batches_per_epoch:
        clips = 0
        for r in data:
            clips += max((r.last - r.first) // (reader.frames * reader.stride_of(r)), 1)
        batches_per_epoch = max(clips // (batch_size * world), 1)
    dataset = DroidClips(data, reader, seed)
    order = Order(dataset, batch_size, batches_per_epoch, epoch, itr, rank, world)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_signals_in_worker,
        pin_memory=pin_memory,
    )
    loader.bad = bad
    return loader


# --- python -m droid --inspect ---


def read_as_made(reader, paths):
    """Set a reader to what features were made with: they can only be looked at so."""
    found, _ = index_episodes(paths, DroidReader(camera=()), False, print)
    made_with = feature_settings([r for r, _ in found]) if found else {}
    if "crop_size" not in made_with:
        return
    reader.fps = float(made_with["fps"])
    reader.stride = int(made_with["stride"]) or None
    reader.crop_size = int(made_with["crop_size"])
    reader.crop = made_with["crop"]
    reader.camera = tuple(made_with["camera"].split())
    for name in ("state_keys", "action_keys"):
        keys = made_with[name].split()
        setattr(reader, name, None if keys == ["default"] else keys)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="look into episodes: shapes, ranges, mean and std of one batch; of a LeRobot"
        " data set also its cameras, fields, idle rows, and what would be left out",
        allow_abbrev=False,
    )
    several = {"nargs": "+", "action": "extend"}
    flag = parser.add_argument
    flag("--inspect", metavar="SHARD", required=True, **several, help="episodes, globs, URLs")
    flag("--camera", **several, help="views to draw from (exterior_1)")
    flag("--state_keys", **several, help="fields of the state (the pose)")
    flag("--action_keys", **several, help="fields of the action (differences of the pose)")
    flag("--batch_size", type=int, default=8, help="clips to read (%(default)s)")
    switch = argparse.BooleanOptionalAction
    flag("--verify", action=switch, help="check all checksums, reading all (files up to 50 GB)")
    args = parser.parse_args()
    sys.excepthook = short_excepthook

    camera = args.camera or ["exterior_1"]
    keys = {"state_keys": args.state_keys, "action_keys": args.action_keys}
    reader = DroidReader(camera=camera, **keys)
    paths = find_episodes(args.inspect)
    if all(path.endswith(".tar") for path in paths):
        read_as_made(reader, paths)

    # a LeRobot data set is described whole: which --camera and fields there are is not known before
    for root in dict.fromkeys(lerobot.root_of(p) for p in paths if p.endswith(".parquet")):
        found = lerobot.look(root)
        for line in lerobot.describe(found):
            print(line)
        for file, key, reason in found.bad[:20]:
            print(f"would be left out: {file} {key}: {reason}")
        if len(found.bad) > 20:
            print(f"and {len(found.bad) - 20} more")
    records, _, bad = open_droid(args.inspect, reader=reader, idle_filter="off", verify=args.verify)
    batch = next(iter(droid_clips(records, args.batch_size, reader=reader, num_workers=0)))

    for file, key, reason in bad + batch["bad"]:
        print(f"left out: {file} {key}: {reason}")
    for name in [k for k in ("video", "z", "actions", "states") if k in batch]:
        x = batch[name].float()
        shape = str(tuple(x.shape))
        dtype = str(batch[name].dtype).removeprefix("torch.")
        print(f"{name:8} {shape:24} {dtype:8} from {x.min():.3f} to {x.max():.3f}")
    print(f"key      {batch['key'][0]}")
    print(f"{'action':18} {'min':>9} {'max':>9} {'mean':>9} {'std':>9}")
    for name, x in zip(reader.names, batch["actions"].flatten(0, 1).T):
        print(f"{name:18} {x.min():9.4f} {x.max():9.4f} {x.mean():9.4f} {x.std():9.4f}")
