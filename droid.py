"""Everything between robot episodes (DROID and one's own) and a batch: RLDS TFRecords without TensorFlow, raw DROID, npz + mp4.

    python -m droid --inspect droid_100/1.0.0/r2d2_faceblur-train.tfrecord-00000-of-00031     # shapes, ranges, mean, std, idle share
    python -m droid --inspect 'gs://gresearch/robotics/droid/1.0.1/*-0000?-of-02048' --batch_size 4

INTERFACE (being filled in): what train_lora.py, fit_scaler.py and eval.held_out may rely on.
"""

from typing import NamedTuple

from data import Clips

POSE = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]  # names of a pose state, and of its differences; ActionScaler names
POSE_UNITS = ["metres"] * 3 + ["radians"] * 3 + ["share closed"]
CAMERAS = ("exterior_1", "exterior_2", "wrist")


class Episode(NamedTuple):
    """A stretch of an episode (a data.Record to data.py): whole, or one record per range that the idle filter keeps. length is in ticks
    of 1/20 s, what data.windows counts in; first..last are the episode's own steps."""

    shard: str  # file that holds it
    key: str  # RLDS: recording_folderpath--file_path, as openpi's files of ranges name it
    members: dict  # feature or video -> (offset, size), or file name
    length: int = 0
    kind: str = "rlds"  # or raw, robot
    first: int = 0
    last: int = 0
    rate: float = 15.0  # steps a second


class DroidReader:
    """What a clip is (the ClipReader of robot data): frames sampled every `stride` steps, one frame a step, T = frames_per_clip.

    stride: default ceil(rate/fps): 4 of DROID's 15 Hz at --fps 4; 15 repeats Meta's released loader, which took the mp4s' 60 fps for true.
    crop: "reference" (centre 1.35:1 squeezed to a square, no antialias, as Meta's) or "square" (centre square).
    camera: names of CAMERAS (own episodes: of their videos); several: one is drawn for each clip.
    state_keys, action_keys: fields to read instead of [cartesian_position, gripper_position] and of their pose differences; actions given
    by key are summed over the steps between two frames ("key:last" takes the last of them).
    extrinsics: also give the camera's (T, 6), where the episode has them (raw DROID). scaler: an ActionScaler or None.
    Attributes: frames, fps, frames_per_step (1), stride, scaler, names, units (of the actions), state_dim, action_dim."""

    def __init__(self, frames_per_clip=8, fps=4.0, crop_size=256, crop="reference", camera=("exterior_1",), stride=None, state_keys=None,
                 action_keys=None, scaler=None, extrinsics=False):  # fmt: skip
        raise NotImplementedError


class DroidClips(Clips):
    """data.Clips over Episodes: an item is the same (epoch, index, record number, place), so that Order, windows, collate and
    eval.held_out work on it. DroidClips(records, reader, seed)."""

    def __init__(self, records, reader, seed=0):
        raise NotImplementedError


def open_droid(data, val_data=None, val_fraction=0.0, reader=None, *, idle_filter="openpi", success="all", max_bad_fraction=1.0,
               verify=None):  # fmt: skip
    """Patterns, folders and URLs -> (train [Episode], val [Episode], bad [(file, key, reason)]); held out by a hash of the episode's key.
    idle_filter: off | openpi | light; success: all | only; verify: check the CRC of every record while indexing (default: local files).
    Prints what the filters leave out. Raises ValueError when nothing is left, train and val share an episode, or too many are bad."""
    raise NotImplementedError


def droid_clips(data, batch_size, *, reader=None, batches_per_epoch=None, num_workers=4, prefetch_factor=2, seed=0, epoch=0, itr=0, rank=0,
                world=1, pin_memory=False):  # fmt: skip
    """Endless DataLoader: batches {"video" (B, T, 3, H, W) uint8, "actions" (B, T-1, A) scaled, "states" (B, T, S), "key", "bad", and
    "extrinsics" (B, T, 6) if the reader asks}. data: patterns, or [Episode] of open_droid. Order and resume as data.vpt_loader; loader.bad."""
    raise NotImplementedError


def pose_actions(states):
    """states (..., T, 7) tensor [xyz, extrinsic xyz Euler, gripper] -> actions (..., T-1, 7): xyz and gripper differences, Euler angles of
    R[t+1] R[t]^T (vjepa2 app/vjepa_droid/droid.py)."""
    raise NotImplementedError


def compose_poses(state0, actions, mean, scale):
    """What model.compose_states is for VPT: states (B, K, 7) before each of K scaled actions (B, K, 7), from the first (B, 7); gripper
    clipped to [0, 1] (vjepa2 compute_new_pose). Inverse of pose_actions."""
    raise NotImplementedError
