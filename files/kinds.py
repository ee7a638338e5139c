"""What kind of file is this? By its first bytes and what is in it, not by its name."""

import json
import os
import stat
import struct
import tarfile
import zipfile

from files.disk import is_storage_error

# first bytes of a file -> what it is, and what reads it
MAGIC = {
    b"\x89HDF\r\n\x1a\n": "hdf5",
    b"PAR1": "parquet",
    b"PK\x03\x04": "zip",
    b"\x1a\x45\xdf\xa3": "film",  # Matroska, WebM
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}

# kind -> (what it is, what to do with it)
KINDS = {
    "play": ("a shard of play: videos and their lines", ""),
    "features": ("a shard of features (encode.py)", ""),
    "latents": (
        "video-VAE latents (prepare.latents)",
        "train_lam.py reads a folder of them, --data_dir",
    ),
    "robot": ("robot episodes", "look into them with: python -m droid --inspect {path}"),
    "lerobot": (
        "a LeRobot data set",
        "look into it with: python -m droid --inspect {path}",
    ),
    "film": (
        "plain video",
        "train_vjepa.py reads it; with lines of actions beside it, pack both with: python -m"
        " prepare.shards",
    ),
    "films": ("a tar of plain videos", "train_vjepa.py reads it"),
    "lines": (
        "lines of actions",
        "they belong beside a video of the same name: python -m prepare.shards packs both",
    ),
    "parquet": (
        "a Parquet table",
        "of a LeRobot data set name the folder that holds meta/info.json",
    ),
    "weights": ("weights", "--encoder or --checkpoint take it, --data does not"),
    "gzip": ("compressed with gzip", "unpack it first: gunzip -k {path}"),
    "zstd": ("compressed with zstd", "unpack it first: zstd -d {path}"),
    "bzip2": ("compressed with bzip2", "unpack it first: bunzip2 -k {path}"),
    "xz": ("compressed with xz", "unpack it first: unxz -k {path}"),
    "empty": ("empty", "copy it again"),
    "cut": ("cut short or damaged", "copy it again"),
    "device": ("no file but a pipe or a device", "write it to a file first"),
    "unknown": (
        "of no kind that is read here",
        "docs/data.md says how to write shards of your own play",
    ),
}


def kind_of(path):
    """A key of KINDS for a local file. Raises OSError if it cannot be opened."""
    # a pipe without a writer would be waited for
    if not stat.S_ISREG(os.stat(path).st_mode):
        return "device"
    with open(path, "rb") as f:
        head = f.read(512)
    if not head:
        return "empty"
    for magic, kind in MAGIC.items():
        if head.startswith(magic) and kind == "hdf5":
            return kind_of_hdf5(path)
        if head.startswith(magic) and kind == "zip":
            return kind_of_zip(path)
        if head.startswith(magic):
            return kind
    # sounds and pictures can be RIFF too
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    if head[4:8] == b"ftyp" or is_avi:
        return "film"
    if tarfile.is_tarfile(path):
        return kind_of_tar(path)
    if is_tfrecord(head):
        return "robot"
    if is_safetensors(path, head):
        return "weights"
    if head.lstrip().startswith((b"{", b"[")):
        return "lines"
    return "unknown"


def kind_of_tar(path):
    """By the endings of the first members."""
    endings = set()
    is_whole = True
    try:
        with tarfile.open(path, "r:*") as tar:
            for number, member in enumerate(tar):
                endings.add(os.path.splitext(member.name)[1].lower())
                if number == 63:
                    break
    except tarfile.TarError:
        # the index says where it is damaged
        is_whole = False
    if ".safetensors" in endings:
        return "features"
    if ".jsonl" in endings:
        return "play"

    # the lines may have stood behind the cut
    if not is_whole:
        return "cut"
    return "films" if endings & {".mp4", ".mkv", ".webm", ".avi", ".mov"} else "unknown"


def kind_of_hdf5(path):
    """Latents are a dataset of five dims, of any name; episodes of robots have groups."""
    import h5py  # takes a moment to import

    dims = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            dims.append(item.ndim)

    # h5py has no exception of its own for what is damaged
    try:
        with h5py.File(path, "r") as f:
            groups = {name for name, item in f.items() if isinstance(item, h5py.Group)}
            if {"observation", "action", "data"} & groups:
                return "robot"
            f.visititems(visit)
    except (OSError, RuntimeError, LookupError) as e:
        if is_storage_error(e):
            raise
        return "cut"
    return "latents" if 5 in dims else "unknown"


def kind_of_zip(path):
    """Arrays of an episode (npz), or what torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "unknown"
    if any(name.endswith(".npy") for name in names):
        return "robot"
    return "weights" if any(name.endswith("data.pkl") for name in names) else "unknown"


def is_tfrecord(head):
    """The length of the first record stands in front, and a record of tf.train.Example begins with
    the tag of its only field."""
    if len(head) < 13:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return 0 < length < 2**40 and head[12] == 0x0A


def is_safetensors(path, head):
    """A length, then a header of that many bytes in JSON."""
    if len(head) < 10 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    if not 2 <= length < min(2**27, os.path.getsize(path)):
        return False
    with open(path, "rb") as f:
        f.seek(8)
        try:
            return isinstance(json.loads(f.read(length)), dict)
        except ValueError:
            return False


def sentence_of(path, kind):
    """What a file is, and what to do with it."""
    what, advice = KINDS[kind]
    text = f"{path} is {what}"
    return f"{text}: {advice.format(path=path)}" if advice else text
