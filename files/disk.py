"""What a disk or a network does: atomic writes, caches, and which errors say nothing about the
data."""

import errno
import hashlib
import os
import random
import re
import struct
import time
import zipfile
import zlib

import av
from PIL import Image


def write_atomically(path, data):
    """Bytes (or a function that writes to an open file) to a file that is either the old one or the
    new one, whatever happens."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
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
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        os.fsync(folder)  # the rename itself must survive a power cut
        os.close(folder)
    except OSError as e:
        if e.errno and not e.filename:
            e.filename = path  # which write() does not know
        raise
    finally:
        if os.path.exists(tmp):
            os.unlink(tmp)


CACHE = os.path.expanduser(os.environ.get("NANOJEPA_CACHE", "~/.cache/nanojepa"))


def read_cache(path):
    """What write_cache put there; None where that is missing, damaged or not for this user to read:
    the recording is the truth, and a cache that cannot be used only costs time."""
    try:
        with open(path, "rb") as f:
            digest, raw = f.read(32), f.read()
    except FileNotFoundError:
        return None
    except OSError as e:
        complain(path, f"a cache entry cannot be read: {e}")
        return None
    return raw if hashlib.sha256(raw).digest() == digest else None


def write_cache(path, raw, what):
    try:
        write_atomically(path, hashlib.sha256(raw).digest() + raw)
    except OSError as e:
        complain(path, f"{what} not cached: {e}")


def complain(path, text):
    """Says what is wrong with a cache, once a process of each folder and kind of complaint."""
    kind = (os.path.dirname(path), text[:12])
    if kind not in complained:
        complained.add(kind)
        print(f"{text} (set NANOJEPA_CACHE to a folder of yours with room)")


complained = set()


READ_ERRORS = (
    ValueError,
    OSError,
    EOFError,
    av.FFmpegError,
)  # what a damaged recording may raise; anything else is our bug


DAMAGE = (
    *READ_ERRORS,
    LookupError,
    RuntimeError,
    TypeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)


TRIES, WAIT, LONGEST = 5, 1.0, 30.0  # seconds: about 1, 3, 9, 27 between the tries


PAUSES = (1.0, 3.0)  # seconds before a disk is asked a second and a third time


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
    """What a URL or a disk did not give, after all tries: one sentence."""


def memory_is_short():
    """Whether this process cannot have another 256 MB."""
    try:
        return not bytearray(1 << 28)
    except MemoryError:
        return True


def disk_failed(error):
    """Whether an error of reading says something of the disk, of the network or of the limits of
    this process, and nothing of the recording.

    What the system says has an errno. A damaged file has none: HDF5, Pillow and FFmpeg raise their
    own kinds of OSError. HDF5 only writes the errno into its text, in errors of several kinds.
    FFmpeg's "out of memory" may also be a length in a damaged file."""
    if isinstance(error, Unreachable):
        return True
    if isinstance(error, MemoryError):
        return not isinstance(error, av.FFmpegError) or memory_is_short()
    if isinstance(error, av.FFmpegError):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return True
    return re.search(r"\berrno = [1-9]", str(error)) is not None


def disk_sentence(place, error):
    """What to say of an error of which disk_failed is true; place: the file, and the recording."""
    if isinstance(error, Unreachable):
        return str(error)
    text = re.search(r"\berrno = (\d+)", str(error))
    code = getattr(error, "errno", None) or (int(text[1]) if text else None)
    if isinstance(error, MemoryError):
        code = errno.ENOMEM
    remedy = REMEDIES.get(code, "fix the disk or its mount")
    said = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{place} cannot be read: {said}: {remedy}, then start again (this says nothing about the"
        " recording, so it is not left out)"
    )


def persistently(place, call):
    """call(), again after PAUSES where the disk failed, since a server of files may come back;
    then Unreachable: to leave the recording out would be another run. Other errors pass."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except (*DAMAGE, MemoryError) as e:
            if not disk_failed(e):
                raise
            again = not isinstance(e, (Unreachable, MemoryError, *HOPELESS))
            if pause is None or not again:
                raise Unreachable(disk_sentence(place, e)) from e
        time.sleep(pause)


def trying(url, call):
    """call(), again after a while if it fails, TRIES times at most; Unreachable then. Not again
    where the server says that it will not."""
    for attempt in range(TRIES):
        time.sleep(
            random.uniform(0.8, 1.2) * min(WAIT * 3 ** (attempt - 1), LONGEST) if attempt else 0
        )  # not all nodes at once
        try:
            return call()
        except Unreachable:
            raise
        except Exception as e:  # storage libraries raise what they like; the last is raised again
            error, cause = e, e.__cause__ or e  # fsspec calls each HTTP error "not found"
        final = isinstance(error, (FileNotFoundError, PermissionError)) and (
            cause is error or not url.startswith("http")
        )
        if isinstance(status := getattr(cause, "status", None), int):
            final = 400 <= status < 500 and status not in (408, 429)
        if final or isinstance(error, ImportError):
            break
    times = f"{attempt + 1} times" if attempt else "at once, so not tried again"
    raise Unreachable(
        f"{url} cannot be read: {type(cause).__name__}: {str(cause) or 'no reason given'} ({times})"
    ) from error
