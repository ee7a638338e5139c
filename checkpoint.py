"""Atomic, checksummed, rotated save and load of a training run.

A checkpoint is `checkpoint-epochNNN.pth.tar` (N whole epochs done) or
`checkpoint-epochNNN-itrNNNNN.pth.tar` (stopped inside one), and `checkpoint-latest.pth.tar` is a
symlink to the newest. It is what torch.save writes and then, in eight hex digits, the CRC-32 of all
that: the CRCs inside the zip do not cover its directory, where one flipped bit makes torch.load
return garbage."""

import concurrent.futures
import copy
import errno
import fcntl
import gc
import glob
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import zlib

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from files.disk import make_folder, write_atomically
from files.logs import bytes_text, count_text, list_checkpoints

LATEST = "checkpoint-latest.pth.tar"

# of the dictionary in a checkpoint: 2 has "settings", which evaluation reads by name
FORMAT = 2

BROKEN = (
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)
open_locks = []  # open files of `lock`: a lock lives as long as its file is open
writers = []  # each Writer: an error that ends the run waits for it


def short_excepthook(kind, error, trace):
    """For sys.excepthook: errors that the user can fix are printed as one line; everything else, or
    everything with NANOJEPA_DEBUG=1, as a traceback."""
    # a checkpoint that is being written becomes whole first. On a full disk the log may fail before
    # it does: the checkpoint's sentence says more
    in_main_thread = threading.current_thread() is threading.main_thread()
    disk_is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if in_main_thread:
        for late in errors_of_writers():
            if disk_is_full:
                kind = type(late)
                error = late
                trace = late.__traceback__
            else:
                print("error:", late, file=sys.stderr)

    text = str(error).rpartition("\nValueError: ")[2]
    debug = bool(os.environ.get("NANOJEPA_DEBUG"))
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    in_a_pipe = bool(files) and "multiprocessing" in files[-1]
    pipe_broke = issubclass(kind, (OSError, EOFError)) and in_a_pipe

    # a loader hands batches over in a thread of its own. It is no error there that the training,
    # told to stop, takes no more
    if pipe_broke and not in_main_thread and not debug:
        return

    # a loader process that the kernel killed shows up in one of two ways
    killed = pipe_broke or "DataLoader worker (pid" in text
    if killed:
        if in_main_thread:
            # torch's handler would raise again at exit
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        text = (
            f"a loader process was killed ({text.strip() or kind.__name__}): lower --num_workers if"
            " memory ran out; continue with --resume"
        )

    can_be_fixed = killed or issubclass(kind, (ValueError, OSError))
    if can_be_fixed and not debug:
        print("error:", text, "(NANOJEPA_DEBUG=1 shows where)", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def peak_memory(device):
    """The most MiB that this process has held so far: of the GPU's memory, or on a CPU of its own
    (Python and libraries are 300)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20

    # on Linux ru_maxrss starts with that of the process that started this one
    if sys.platform == "linux":
        with open("/proc/self/status") as f:
            return int(re.search(r"VmHWM:\s+(\d+) kB", f.read())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def remove_leftovers(out_dir, pattern):
    """Delete temporary files of a run that was killed while it wrote them."""
    for path in glob.glob(os.path.join(glob.escape(out_dir), pattern)):
        os.unlink(path)


def lock(out_dir):
    """Make the folder of a run and hold it while this process lives, however it ends. ValueError if
    another process holds it."""
    make_folder("--out_dir", out_dir)
    f = open(os.path.join(out_dir, "lock"), "a+")
    open_locks.append(f)

    # after a restart, NFS may keep a dead node's lock for a while
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    give_up = time.monotonic() + (120 if restarted else 0)
    while True:
        try:
            # not flock: loader processes outlive a killed run, and would inherit that lock
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError) as e:
            if time.monotonic() >= give_up:
                f.seek(0)
                raise ValueError(
                    f"{out_dir} is in use by {f.read().strip()}: wait for it, stop it, or choose"
                    " another folder"
                ) from e
            time.sleep(1)
        except OSError as e:
            raise OSError(
                f"{out_dir} cannot be locked ({e.strerror}): mount it with locks (Lustre: -o"
                " flock), or choose another"
            ) from e

    remove_leftovers(out_dir, "*.tmp")
    f.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=f, flush=True)


def check_unused(out_dir):
    """ValueError if a new run would write among the checkpoints of an earlier one."""
    if list_checkpoints(out_dir):
        raise ValueError(
            f"{out_dir} holds checkpoints of an earlier run: pass --resume to continue it, or"
            " another --out_dir"
        )


def disk_text(out_dir, count, size):
    """Whether `count` checkpoints of `size` bytes fit on the disk of out_dir, which need not exist
    yet: a sentence."""
    folder = os.path.abspath(out_dir)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    verdict = "enough" if count * size < free else "NOT ENOUGH"
    return (
        f"{count_text(count, 'checkpoint')} of {bytes_text(size)}, {bytes_text(free)} of disk free:"
        f" {verdict}"
    )


def _crc(f, size):
    """CRC-32 of the first `size` bytes of an open file, as eight hex digits. The file then stands
    after them."""
    f.seek(0)
    crc = 0
    while size > 0:
        part = f.read(min(size, 1 << 24))
        if not part:
            break
        crc = zlib.crc32(part, crc)
        size -= len(part)
    return b"%08x" % crc


def path_of(out_dir, epoch, itr):
    """The path of the checkpoint of a moment: N whole epochs, and steps inside the next one."""
    inside_epoch = f"-itr{itr:05d}" if itr else ""
    return os.path.join(out_dir, f"checkpoint-epoch{epoch:03d}{inside_epoch}.pth.tar")


def save(out_dir, state, epoch, itr=0, keep_last=2, keep_every=25):
    """Write a checkpoint, point `latest` at it, then delete older ones except the last `keep_last`
    and each `keep_every`-th epoch. Raises OSError naming the last good checkpoint when it cannot be
    written (disk full); that one is then untouched."""
    path = path_of(out_dir, epoch, itr)
    link = os.path.join(out_dir, LATEST)
    last_good = next(reversed(list_checkpoints(out_dir)), "none")
    remove_leftovers(out_dir, "checkpoint-*.tmp")

    def write(f):
        torch.save(state, f)
        f.write(_crc(f, f.tell()))

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as e:  # torch's zip writer turns a full disk into a RuntimeError
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise OSError(
            f"could not write {path} ({reason}); last good checkpoint: {last_good}"
        ) from e
    os.symlink(os.path.basename(path), link + ".tmp")
    os.replace(link + ".tmp", link)

    # rotate: the newest ones stay, and each keep_every-th whole epoch
    checkpoints = list(list_checkpoints(out_dir).items())
    for old, (old_epoch, old_itr) in checkpoints[: max(len(checkpoints) - keep_last, 0)]:
        kept_for_good = not old_itr and keep_every and old_epoch % keep_every == 0
        if old != path and not kept_for_good:
            os.unlink(old)
    return path


class Writer:
    """Writes checkpoints in a thread: training waits for a copy of the tensors in host memory, and
    not for the disk. One is written at a time. Python ends only after the thread has, whatever
    ends the run; a process that is killed keeps its previous checkpoint.

    writes: whether this rank does. With FSDP all ranks call `save`, since each has a part."""

    def __init__(self, writes=True):
        self.writes = writes
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.pending = None
        writers.append(self)

    def save(self, out_dir, state, epoch, itr=0, keep_last=2, keep_every=25):
        """Copy `state`, and `save` the copy in the thread. Returns the path. Waits until the one
        before is written, and raises what that raised."""
        # wait first, then copy: there are never two copies
        self.wait()
        gc.collect()  # matplotlib's figures are cycles of 3 MB, and Python would wait many epochs
        if self.writes:
            state = on_host(state, {})
            self.pending = self.pool.submit(save, out_dir, state, epoch, itr, keep_last, keep_every)
        else:
            gather(state)
        return path_of(out_dir, epoch, itr)

    def check(self):
        """Raises what `save` raised in the thread, once. Does not wait."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self):
        """Return when nothing is being written. Raises what `save` raised, once."""
        pending = self.pending
        self.pending = None
        if pending:
            pending.result()


def errors_of_writers():
    """What went wrong in the threads of all Writers, after waiting for them: OSErrors."""
    errors = []
    for writer in writers:
        try:
            writer.wait()
        except OSError as e:
            errors.append(e)
    return errors


def gather(value):
    """This rank's part in the `on_host` of another one, of which it keeps no copy: gathering the
    sharded tensors, in the same order."""
    if isinstance(value, DTensor):
        value.full_tensor()
    elif isinstance(value, dict):
        for entry in value.values():
            gather(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            gather(entry)


def on_host(value, copies):
    """A copy of a checkpoint's dictionary that training does not change, tensors on the CPU. Those
    that share memory share it in the copy too: it is written once. copies: an empty dict, for the
    memory that is copied so far. With sharded tensors a collective, and every rank gets whole
    copies."""
    if isinstance(value, DTensor):
        # the gathered tensor is gone after this line, and the next one may get its address: it does
        # not go into `copies`
        return on_host(value.full_tensor(), {})
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        place = (storage.device, storage.data_ptr(), storage.nbytes())
        if place not in copies:
            copies[place] = storage.clone() if value.device.type == "cpu" else storage.cpu()
        twin = torch.empty(0, dtype=value.dtype)
        return twin.set_(copies[place], value.storage_offset(), value.size(), value.stride())

    # a state_dict has versions beside its entries: a shallow copy keeps them
    if isinstance(value, dict):
        twin = copy.copy(value)
        for name, entry in value.items():
            twin[name] = on_host(entry, copies)
        return twin
    if isinstance(value, list | tuple):
        return type(value)([on_host(entry, copies) for entry in value])
    return value


def load(path):
    """A checkpoint's dictionary, after checking its CRC. Raises ValueError for a cut, damaged or
    foreign file; runs no pickled code."""
    try:
        with open(path, "rb") as f:
            if _crc(f, os.path.getsize(path) - 8) != f.read():
                raise ValueError("its checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except (*BROKEN, pickle.UnpicklingError) as e:  # a cut or foreign pickle may raise any of them
        raise ValueError(
            f"{path} is damaged or no checkpoint of ours: {type(e).__name__}"
            f" {str(e).partition(chr(10))[0]}"
        ) from e


# what the first version's flags are called in settings, where the name has changed
RENAMED = {"camera": "cameras"}

# flags of the first version's adapters, which settings hold together
LORA = ("targets", "r", "alpha", "dropout", "rslora", "fused_qkv")

# settings that not every stage and version writes down, as they were where they are missing
UNSAID = {
    "stride": None,
    "decoder": "pyav",
    "predict": "features",
    "loss_exp": 1.0,
    "save_encoder": False,
    "gui": "keep",
    "cache_dir": None,
}


def settings_of(state, path="this checkpoint"):
    """What must be known to judge a run, by name, from its checkpoint's dictionary: `settings`,
    completed by UNSAID. The names are those of train_ac.py, train_lora.py and train_lam.py, where
    `settings` is built. Checkpoints of the first version hold flags (`args`) in their place.
    ValueError for a format that this version does not know, and for what is no checkpoint of a
    training script."""
    version = state.get("format", 1)
    if version > FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version of nanojepa reads formats up to {FORMAT}:"
            " judge it with the version that wrote it, or update this one"
        )
    if "settings" not in state and "args" not in state:
        raise ValueError(f"{path} holds no settings: it is no checkpoint of a training script")

    settings = state.get("settings") or settings_of_flags(state)

    # what a resumed run must have in common stands beside the settings, and counts
    beside = ("encode", "fps", "frames_per_step", "frames_per_clip", "decoder")
    return UNSAID | settings | {name: state[name] for name in beside if name in state}


def settings_of_flags(state):
    """The settings of a checkpoint of the first version, from its flags."""
    settings = {RENAMED.get(name, name): value for name, value in state["args"].items()}
    if "lam" in state:
        return {"stage": "lam"} | settings
    if "base_hash" not in state:
        settings["data"] = settings.get("data") or [["VPT/*.tar"]]  # the default of --data
        return {"stage": "ac"} | settings

    # a robot's frames are encoded one by one
    settings |= {"stage": "lora", "encode": "frame", "frames_per_step": 1}
    settings["lora"] = {name: state["args"][name] for name in LORA}
    return settings


def load_latest(out_dir):
    """(dictionary, path) of the newest good checkpoint of a run, (None, None) if there is none.
    Prints which newer ones are damaged. With several ranks a collective. ValueError when all
    checkpoints are damaged, or when ranks find different ones."""
    state, path = newest_good(out_dir)
    if dist.is_initialized():
        names = [None] * dist.get_world_size()
        dist.all_gather_object(names, path and os.path.basename(path))
        if len(set(names)) > 1:
            raise ValueError(
                f"ranks find different checkpoints in {out_dir}"
                f" ({', '.join(sorted({str(x) for x in names}))}): it must be one folder that all"
                " nodes see"
            )
    return state, path


def newest_good(out_dir):
    """load_latest for one process."""
    paths = list(list_checkpoints(out_dir))
    for path in reversed(paths):
        try:
            return load(path), path
        except ValueError as e:
            print(f"{e}; trying the one before")
    if paths:
        raise ValueError(
            f"all {len(paths)} checkpoints in {out_dir} are damaged: restore one, or start again in"
            " another --out_dir"
        )
    return None, None


# --- sharded weights ---
#
# With FSDP each rank holds a part of every tensor. In a checkpoint tensors are whole (on_host), so
# that it opens on any number of ranks, with FSDP or without.


def part_like(tensor, like):
    """What this rank holds of a whole tensor that is sharded like another one."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def load_whole(module, state):
    """load_state_dict for a module that may be sharded, from whole tensors."""
    own = module.state_dict()
    module.load_state_dict({k: part_like(v, own[k]) if k in own else v for k, v in state.items()})


def load_whole_optimizer(optimizer, state):
    """load_state_dict for an optimizer of weights that may be sharded, from whole tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {}
    for number, tensors in state["state"].items():
        like = params[number]
        parts[number] = {}
        for name, value in tensors.items():
            is_moment = value.shape == like.shape
            parts[number][name] = part_like(value, like) if is_moment else value
    optimizer.load_state_dict(state | {"state": parts})
