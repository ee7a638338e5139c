"""Atomic, checksummed, rotated save and load of a training run; random generators and data position."""

import os


def write_atomically(path, data):
    """Bytes to a file that is either the old one or the new one, whatever happens: temporary file, fsync, rename."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    tmp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.unlink(tmp)
