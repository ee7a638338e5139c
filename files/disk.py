"""Disks and networks: atomic writes, caches, which errors say nothing about the data, and when to
try again."""

import errno
import hashlib
import json
import os
import random
import re
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

# --- atomic writes ---


def make_folder(flag, folder):
    """Make the folder that a flag names, if it is not there. OSError says what to change."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise OSError(f"{flag} {folder}: {e.strerror}; name a folder that can be written") from e


def write_atomically(path, data):
    """Write bytes to a file, which is then either the old one or the new one, whatever happens.
    data may be a function that writes to an open file."""
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    tmp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(tmp, "w+b") as f:
            if callable(data):
                data(f)
            else:
                f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)

        # the rename itself must survive a power cut
        folder_fd = os.open(folder, os.O_RDONLY)
        os.fsync(folder_fd)
        os.close(folder_fd)
    except OSError as e:
        # write() does not know the name of its file
        if e.errno and not e.filename:
            e.filename = path
        raise
    finally:
        if os.path.exists(tmp):
            os.unlink(tmp)


def continue_folder(folder, note, arguments):
    """A folder is continued only with the arguments that it was made with: {flag: value}, kept in
    its file `note` (JSON). ValueError if it contains anything else."""
    path = os.path.join(folder, note)
    there = None
    if os.path.exists(path):
        with open(path) as f:
            try:
                there = json.load(f)
            except ValueError as e:
                raise ValueError(
                    f"{path} is damaged: give another --out, or remove that folder"
                ) from e
    if there != arguments and os.path.isdir(folder) and os.listdir(folder):
        made_with = "other files"
        if isinstance(there, dict):
            made_with = "what was made with " + flags_text(there)
        raise ValueError(
            f"{folder} contains {made_with}, this is {flags_text(arguments)}: give another --out,"
            " or remove that folder"
        )
    make_folder("--out", folder)
    write_atomically(path, json.dumps(arguments).encode() + b"\n")


def flags_text(arguments):
    """{"minutes": 30, "size": [9, 9]} -> "--minutes 30 --size 9 9"."""
    texts = []
    for name, value in arguments.items():
        values = value if isinstance(value, list | tuple) else [value]
        texts.append(" ".join([f"--{name}", *map(str, values)]))
    return " ".join(texts)


# --- arrays of an npz file ---

# Python before 3.11.8 fails with a SystemError if two threads parse headers of arrays at once
# (cpython issue 106905)
one_header_at_a_time = threading.Lock()


class Npz(Mapping):
    """The arrays of an npz file by name, as np.load gives them, for any number of threads. What
    np.load raises, it raises; TypeError for a file of numpy.save."""

    def __init__(self, file):
        with one_header_at_a_time:
            self.arrays = np.load(file)
        if not isinstance(self.arrays, np.lib.npyio.NpzFile):
            raise TypeError("an array of numpy.save, not an npz file: write it with numpy.savez")

    def __getitem__(self, name):
        with one_header_at_a_time:
            return self.arrays[name]

    def __contains__(self, name):
        return name in self.arrays.files

    def __iter__(self):
        return iter(self.arrays.files)

    def __len__(self):
        return len(self.arrays.files)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.arrays.close()


# --- cache entries with a checksum ---

CACHE = os.path.expanduser(os.environ.get("NANOJEPA_CACHE", "~/.cache/nanojepa"))
complained = set()


def read_cache(path):
    """What write_cache wrote; None if it is missing or damaged, or if this user may not read it.
    The recording is the truth, and a cache that cannot be used only costs time."""
    try:
        with open(path, "rb") as f:
            digest = f.read(32)
            raw = f.read()
    except FileNotFoundError:
        return None
    except OSError as e:
        complain(path, f"a cache entry cannot be read: {e}")
        return None
    return raw if hashlib.sha256(raw).digest() == digest else None


def write_cache(path, raw, what):
    """Bytes and their checksum to a file. An error is printed: "WHAT not cached"."""
    try:
        write_atomically(path, hashlib.sha256(raw).digest() + raw)
    except OSError as e:
        complain(path, f"{what} not cached: {e}")


def complain(path, text):
    """Print what is wrong with a cache, once a process for each folder and kind of complaint."""
    kind = (os.path.dirname(path), text[:12])
    if kind not in complained:
        complained.add(kind)
        print(f"{text} (set NANOJEPA_CACHE to a folder of yours with room)")


# --- errors ---

# what a damaged recording may raise; anything else is our bug
READ_ERRORS = (ValueError, OSError, EOFError)

# the same for formats whose readers raise more (pickle, zip, HDF5)
DAMAGE = (
    *READ_ERRORS,
    LookupError,
    RuntimeError,
    TypeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

# errors of the disk that another try cannot fix
HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files of this machine",
    errno.ENOMEM: "give it more memory, or lower --num_workers",
    errno.EACCES: "let this user read it",
    errno.EPERM: "let this user read it",
    errno.ENOENT: "put the file back",
}


class Unreachable(OSError):
    """A URL or a disk gave nothing after all tries. The message is one sentence."""


def is_storage_error(error):
    """Whether an error of reading is about the disk, the network or the limits of this process, and
    not about the recording.

    Errors of the system have an errno. Errors about a damaged file have none, although HDF5 and
    Pillow raise OSError too. HDF5 writes the errno into its text only, in errors of several
    kinds."""
    if isinstance(error, (Unreachable, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return True
    return re.search(r"\berrno = [1-9]", str(error)) is not None


def storage_sentence(place, error):
    """The message for an error for which is_storage_error is true. place: the file, and the
    recording."""
    if isinstance(error, Unreachable):
        return str(error)
    in_text = re.search(r"\berrno = (\d+)", str(error))
    code = getattr(error, "errno", None)
    if not code and in_text:
        code = int(in_text[1])
    if isinstance(error, MemoryError):
        code = errno.ENOMEM
    remedy = REMEDIES.get(code, "fix the disk or its mount")
    message = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{place} cannot be read: {message}: {remedy}, then start again (this says nothing about"
        " the recording, so it is not left out)"
    )


# --- tries ---

PAUSES = (1.0, 3.0)  # seconds before a disk is asked a second and a third time

# a URL is asked TRIES times, with about 1, 3, 9 and 27 seconds between the tries
TRIES = 5
WAIT = 1.0
LONGEST = 30.0


def with_storage_retries(place, call):
    """call(), again after each of PAUSES if the disk failed, since a file server may come back.
    Then Unreachable: a run without the recording would be another run. Other errors pass."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except (*DAMAGE, MemoryError) as e:
            if not is_storage_error(e):
                raise
            is_final = isinstance(e, (Unreachable, MemoryError, *HOPELESS))
            if pause is None or is_final:
                raise Unreachable(storage_sentence(place, e)) from e
        time.sleep(pause)


def with_retries(url, call):
    """call(), again after a while if it fails, at most TRIES times; then Unreachable. Errors that
    another try cannot fix (404, no permission) are raised at once."""
    for attempt in range(TRIES):
        # a random part, or all nodes would ask at the same moment
        wait = 0
        if attempt:
            wait = random.uniform(0.8, 1.2) * min(WAIT * 3 ** (attempt - 1), LONGEST)
        time.sleep(wait)

        try:
            return call()
        except Unreachable:
            raise
        except Exception as e:  # storage libraries raise what they like; the last is raised again
            error = e
        cause = error.__cause__ or error
        if is_permanent(url, error, cause):
            break

    times = f"{attempt + 1} times" if attempt else "at once, so not tried again"
    raise Unreachable(
        f"{url} cannot be read: {type(cause).__name__}: {str(cause) or 'no reason given'} ({times})"
    ) from error


def is_permanent(url, error, cause):
    """Whether another try would give the same error. cause: the library's own error behind it."""
    if isinstance(error, ImportError):
        return True

    # 408 is a timeout, 429 is "too many requests"
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)

    # fsspec raises FileNotFoundError for every HTTP error
    missing = isinstance(error, (FileNotFoundError, PermissionError))
    return missing and (cause is error or not url.startswith("http"))
