"""Decoded recordings: every frame of a video, cut to the crop, as a .npy file of uint8. Training on
small pictures spends most of its time on decoding; a stored recording is decoded once."""

import hashlib
import os

import numpy as np

from files.disk import write_atomically
from files.remote import Shard
from files.shards import Slice, stamp
from files.video import mp4_times, read_frames

# of the files: another number after a change of what they contain
VERSION = 1

# frames that are decoded at once: whole pictures of these are in memory
AT_ONCE = 256


def pixels_path(folder, record, crop, decoder):
    """Where the frames of a recording of play are stored. Another shard, crop or decoder is another
    file; so is a shard that has changed."""
    shard = record.shard
    if isinstance(shard, Shard):
        version = (str(shard), shard.size, shard.version)
    else:
        version = (os.path.abspath(shard), *stamp(shard))
    name = f"{version} {tuple(record.members['mp4'])} {crop} {decoder} v{VERSION}"
    return os.path.join(folder, hashlib.sha256(name.encode()).hexdigest()[:32] + ".npy")


def store_pixels(path, record, crop, decoder):
    """Decode a recording into a file of (frames, crop, crop, 3) uint8, cut out of the centre, as a
    ClipReader without augmentation gives them. Raises READ_ERRORS for a damaged recording: then
    nothing is stored."""
    with Slice(record.shard, *record.members["mp4"]) as f:
        times = mp4_times(f)
        pieces = []
        for first in range(0, len(times), AT_ONCE):
            wanted = range(first, min(first + AT_ONCE, len(times)))
            frames = read_frames(f, times, wanted, crop, decoder)
            top = (frames.shape[1] - crop) // 2
            left = (frames.shape[2] - crop) // 2
            pieces.append(frames[:, top : top + crop, left : left + crop].copy())
    pixels = np.concatenate(pieces)
    write_atomically(path, lambda out: np.save(out, pixels))


def open_pixels(path, frames, crop):
    """The stored frames, mapped into memory; None if there are none, or if the file is not whole.
    The recording is the truth, and a file that cannot be used only costs time."""
    if not os.path.exists(path):
        return None
    try:
        pixels = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as e:
        print(f"{path} cannot be read ({e}): its recording is decoded again")
        return None
    if pixels.shape != (frames, crop, crop, 3) or pixels.dtype != np.uint8:
        print(f"{path} is not the {frames} frames of its recording: that is decoded again")
        return None
    return pixels
