"""Everything between a VPT or feature file and a batch: shards, the action scaler, the order of
clips, loaders.

    python -m data --inspect demo/train/shard-000000.tar      # shapes, ranges, mean and std of one batch

Local shards (tar files of KEY.mp4 + KEY.jsonl) are indexed, not streamed: the order of clips is a
pure function of (seed, epoch), dealt to ranks by index, so a run resumes exactly under any number
of workers, and a clip costs a seek instead of a 64 MB read. What cannot be sought (pipe:, http://,
s3://, gs://) is streamed, or copied into a local cache (files/remote.py). All end in the same
ClipReader."""

import argparse
import bz2
import collections
import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import pickle
import signal
import sys
import threading
import zlib
from typing import NamedTuple

import numpy as np
import torch
from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes
from sklearn.preprocessing import StandardScaler

from checkpoint import one_sentence
from files.disk import (
    DAMAGE,
    READ_ERRORS,
    Unreachable,
    persistently,
    write_atomically,
)
from files.features import feature_rows
from files.latents import NO_LABEL, read_labels, read_steps
from files.remote import cached
from files.shards import (
    Slice,
    each_once,
    expand,
    find_twins,
    index_shards,
    is_stream,
    line_warnings,
    read_ticks,
    shard_index,
    spread,
    stamp,
)
from files.streams import StreamedClips
from files.video import WrongDecoder, mp4_times, video_rate
from files.vpt import (
    ACTION_SPACES,
    ClipReader,
    step_size,
    wrap,
)

# --- files ---


# --- the same recording twice ---


# --- indexed shards ---


class Clips(torch.utils.data.Dataset):
    """Map-style dataset over indexed recordings. An item is (epoch, index, record number, place):
    place in [0, 1) is a share of the recording's valid starts, an int the number of a window (see
    windows). A clip that cannot be read is replaced by the next draw of that index, at most 20
    times (never the same again), and reported in "bad" as (file, key, reason). An error of the disk
    or the network says nothing about the recording: it is tried again, then the run ends."""

    def __init__(self, records, shares, reader, seed=0):
        self.records, self.reader, self.seed = records, reader, seed
        self.stamps = {
            path: stamp(path) for path in {r.shard for r in records} if os.path.exists(path)
        }
        self.cumulative = np.cumsum(np.asarray(shares, dtype=np.float64))
        self.opened = {}  # a plain dict, since macOS starts workers by pickling

    def _open(self, number):
        if number not in self.opened:
            r = self.records[number]
            with Slice(r.shard, *r.members["mp4"]) as f:
                times = mp4_times(f)
                frame_rate = video_rate(f, times)
            ticks = read_ticks(r)
            if len(self.opened) == 256:
                self.opened.popitem()
            starts = self.reader.starts(ticks, len(times), frame_rate)
            self.opened[number] = times, ticks, starts
        return self.opened[number]

    def locate(self, u):
        """u in [0, 1) -> (record number, place in [0, 1)): the recordings laid end to end, each as
        long as its share."""
        at = u * self.cumulative[-1]
        number = min(int(np.searchsorted(self.cumulative, at, side="right")), len(self.records) - 1)
        left = self.cumulative[number - 1] if number else 0.0
        return number, min((at - left) / (self.cumulative[number] - left), 1 - 1e-12)

    def windows_in(self, record):
        """Non-overlapping clips on the step grid of a recording. One at a rate that --fps does not
        divide counts as one, so that its window is read and its fault reported."""
        if "safetensors" in record.members:
            return record.length // (self.reader.frames // self.reader.frames_per_step)
        try:
            stride = step_size(record.rate, self.reader.fps)
        except ValueError:
            return 1
        return (record.lines - 1 + stride) // (self.reader.frames * stride)

    def read(self, number, place, rng):
        r = self.records[number]
        if "safetensors" in r.members:
            steps = self.reader.frames // self.reader.frames_per_step
            starts = r.length - steps + 1
            if starts < 1:
                raise ValueError(f"too short: {r.length} steps of features, a clip needs {steps}")
            start = int(place * starts) if isinstance(place, float) else place * steps
            z, actions, states = feature_rows(r, start, start + steps)
            names, actions, states = ACTION_SPACES[38], actions.numpy(), states.double().numpy()
            if self.reader.gui == "drop" and actions[:, names.index("gui_open")].any():
                return None
            actions = actions[:, [names.index(n) for n in ACTION_SPACES[self.reader.action_space]]]
            states = np.stack([wrap(states[:, 0] - states[0, 0]), states[:, 1]], axis=1)
            if self.reader.scaler is not None:
                actions = self.reader.scaler.transform(actions)
            actions[:, :4] += self.reader.noise * rng.standard_normal(actions[:, :4].shape)
            return {
                "z": z,
                "actions": torch.from_numpy(np.float32(actions)),
                "states": torch.from_numpy(np.float32(states)),
                "key": r.key,
            }
        times, ticks, starts = self._open(number)
        start = (
            int(place * starts)
            if isinstance(place, float)
            else place * self.reader.frames * step_size(ticks.rate, self.reader.fps)
        )
        if start >= starts:
            raise ValueError(
                f"window {place} starts at tick {start}, the last clip at {starts - 1}"
            )
        with Slice(r.shard, *r.members["mp4"]) as f:
            return self.reader(f, times, ticks, start, rng, r.key)

    def read_seeded(self, number, place, seed, located):
        """read with a generator of its own, from which `locate` may have drawn before: a second try
        after a fault of the disk gives the same clip."""
        rng = np.random.default_rng(seed)
        if located:
            rng.random()
        return self.read(number, place, rng)

    def __getitem__(self, item):
        epoch, index, number, place = item
        bad, before = [], Slice.total
        for attempt in range(20):
            seed = [self.seed, epoch, index, attempt]
            if attempt:
                number, place = self.locate(np.random.default_rng(seed).random())
            r = self.records[number]
            if os.path.exists(r.shard) and stamp(r.shard) != self.stamps.get(
                r.shard
            ):  # it would be read at the places of the old one
                raise ValueError(
                    f"{r.shard} has changed since this run opened it: put the old one back, or"
                    " start anew on what it is"
                )
            again = functools.partial(self.read_seeded, number, place, seed, attempt > 0)
            try:
                clip = persistently(f"{r.shard} {r.key}", again)
                if clip is not None:
                    return clip | {"bad": bad, "bytes": Slice.total - before}
            except Unreachable as e:  # says nothing about the recording
                raise ValueError(str(e)) from e
            except WrongDecoder as e:
                raise ValueError(f"{r.shard} {r.key}: {e}") from e
            except READ_ERRORS as e:
                bad.append((r.shard, r.key, f"{type(e).__name__}: {e}"))
        reason = bad[-1][2] if bad else "--gui drop leaves out nearly everything"
        raise ValueError(f"20 clips in a row cannot be used, the last from {r.shard}: {reason}")


class Order(torch.utils.data.Sampler):
    """Endless batches of items from batch `itr` of `epoch` on: clips spread evenly over the
    timeline of all recordings, in random order, a pure function of (seed, epoch) and the number of
    clips an epoch has; rank r takes the r-th part of each global batch."""

    def __init__(self, dataset, batch_size, batches_per_epoch, epoch=0, itr=0, rank=0, world=1):
        self.dataset, self.batch_size, self.batches = dataset, batch_size, batches_per_epoch
        self.epoch, self.itr, self.rank, self.world = epoch, itr, rank, world

    def __iter__(self):
        n = self.batches * self.batch_size * self.world
        for epoch in itertools.count(self.epoch):
            rng = np.random.default_rng([self.dataset.seed, epoch])
            u = (rng.permutation(n) + rng.random(n)) / n
            for batch in range(self.itr if epoch == self.epoch else 0, self.batches):
                first = (batch * self.world + self.rank) * self.batch_size
                yield [
                    (epoch, i, *self.dataset.locate(u[i]))
                    for i in range(first, first + self.batch_size)
                ]


def windows(dataset, batch_size, limit, rank=0, world=1, seed=0):
    """Batches of items for validation: non-overlapping windows on the step grid, at most `limit`,
    spread over all recordings; the batches do not depend on the number of ranks that share them;
    with a batch_size above 1 none has a single clip unless there is only one."""
    counts = [dataset.windows_in(record) for record in dataset.records]
    every = [(number, k) for number, count in enumerate(counts) for k in range(count)]
    chosen = np.random.default_rng(seed).permutation(len(every))[:limit]
    items = [(0, i, *every[j]) for i, j in enumerate(chosen)]
    parts = -(-len(items) // batch_size) if batch_size != 2 else len(items) // 2
    batches = np.array_split(np.arange(len(items)), max(parts, 1))
    return [[items[i] for i in b] for b in batches if len(b)][rank::world]


def check_fraction(val_fraction):
    """ValueError for what is no share: nan and -0.1 would hold out nothing, 1.5 all but one."""
    if not 0 <= val_fraction < 1:
        raise ValueError(
            f"--val_fraction {val_fraction:g} is no share of the recordings: give 0 (hold out none)"
            " or more, below 1"
        )


def split_records(records, val_fraction):
    """(train, val): the last shards are held out; recordings chosen by a hash of their key where
    there are fewer than ten shards, or where a key of the last ones is in others too (another copy
    of the same play). Never windows, and no key on both sides."""
    check_fraction(val_fraction)
    shards = [r.shard for r in records]
    keys = [r.recording for r in records]  # feature members of one recording (KEY@START) together
    names = sorted(set(shards), reverse=True)
    group = shards
    if len(names) >= 10 and val_fraction > 0:
        held = set(names[: held_count(names, val_fraction)])
        held_keys = {key for key, shard in zip(keys, shards) if shard in held}
        if any(key in held_keys for key, shard in zip(keys, shards) if shard not in held):
            group = keys
    if len(names) < 10:
        group = keys
    if group is keys:
        names = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
    if val_fraction > 0 and len(names) == 1 and len(set(shards)) > 1:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"WARNING: --val_fraction holds out none of {len(records)} recordings: all have the"
                f" key {names[0]}, and no key is on both sides; give them other names, or name"
                " held-out shards (--val_data)"
            )
    if val_fraction <= 0 or len(names) < 2:
        return records, []
    held = set(names[: held_count(names, val_fraction)])
    train = [r for r, g in zip(records, group) if g not in held]
    val = [r for r, g in zip(records, group) if g in held]
    return train, val


def held_count(names, val_fraction):
    """How many of the shards or recordings are held out: one at least, and one is left."""
    return min(max(round(len(names) * val_fraction), 1), len(names) - 1)


# --- loaders ---


def leave_signals(worker):
    """A loader process must not die of a SIGTERM or Ctrl-C to everybody (scancel, timeout, a
    terminal): the run needs its clips to finish the step and save. A SIGTERM of its parent it
    obeys: so are loader processes ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS

        def obey():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
                pass
            os._exit(0)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey, daemon=True).start()


def collate(clips):
    """Clips -> a batch: tensors stacked, keys and bad clips listed, "bytes" read for them summed
    up."""
    out = {
        k: torch.stack([c[k] for c in clips])
        for k in clips[0]
        if isinstance(clips[0][k], torch.Tensor)
    }
    lists = {"key": [c["key"] for c in clips], "bad": [b for c in clips for b in c["bad"]]}
    return out | lists | {"bytes": sum(c.get("bytes", 0) for c in clips)}


def open_records(data):
    """Shards -> ([Record], [(file, key, reason)] of what cannot be used). Raises ValueError if
    nothing can."""
    if streams := [p for p in expand(data) if is_stream(p)]:
        raise ValueError(f"{streams[0]} cannot be sought, which is needed here: copy it to a file")
    records, bad = index_shards(expand(data))
    if not records:
        raise ValueError(
            f"no usable recording in {data}: {'; '.join(f'{b[0]} {b[1]} {b[2]}' for b in bad[:3])}"
        )
    return each_once(records), bad


def open_lines(data, max_shards, val_fraction):
    """--data, for who needs JSONL members only -> ([Record or URL], [(file, key, reason)] that
    cannot be read). Reads tar headers. Splits before it thins out, so that nothing held out is used
    whatever max_shards is; below ten shards the split counts recordings, so videos that cannot be
    read must be known."""
    paths, records, bad = expand([p for group in data for p in group]), [], []
    if streams := [p for p in paths if is_stream(p)]:
        if len(streams) < len(paths) or val_fraction:
            raise ValueError(
                f"{streams[0]} cannot be sought: it goes neither with local shards nor with"
                " --val_fraction; copy it to a file"
            )
        return spread(streams, max_shards), []
    wanted = set(paths if val_fraction else spread(paths, max_shards))
    for group in data:
        files = [p for p in expand(group) if p in wanted]
        if val_fraction and len(files) < 10:
            indexed = [index_shards(files)]
        else:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                indexed = list(pool.map(shard_index, files))
        found = each_once([r for more, _ in indexed for r in more])
        bad += [b for _, more in indexed for b in more]
        bad += [
            (r.shard, r.key, "features; fit on the recordings they were made from")
            for r in found
            if "jsonl" not in r.members
        ]
        records += split_records([r for r in found if "jsonl" in r.members], val_fraction)[0]
    keep = set(spread(sorted({r.shard for r in records}), max_shards))
    return [r for r in records if r.shard in keep], bad


def twins_between(records, others):
    """Those of the others that are among the records too: of the same shard, of a link to it, or
    of a copy."""
    twins = find_twins(records + others)
    return [others[n - len(records)] for n, first in twins.items() if first < len(records) <= n]


def refuse_shared(sources):
    """The [Record] of each --data must be others: each --data is split by itself, so that one might
    hold out what the other trains on (ValueError)."""
    before = []
    for number, records in enumerate(sources):
        shared = twins_between(before, records)
        if shared:
            raise ValueError(
                f"--data number {number + 1} and an earlier one share {len(shared)} recordings,"
                f" {shared[0].shard} {shared[0].key} among them: name each once; --data_weights"
                " says how often it is taken"
            )
        before = before + records


def open_split(data, data_weights=None, val_data=None, val_fraction=0.0, max_bad_fraction=1.0):
    """--data as given ([[pattern, ...], ...], or simpler) and --val_data, or a val_fraction of each
    --data -> (train [Record], [share of the clips], val [Record], [bad]). Shares follow length and
    data_weights; train is empty for streams, which their loader opens. Raises ValueError when train
    and val share a recording, a --data gives none to train on, or too many are bad."""
    groups = [data] if isinstance(data, str) else data
    if data_weights and len(data_weights) != len(groups):
        raise ValueError(f"--data_weights has {len(data_weights)} numbers for {len(groups)} --data")
    for weight in data_weights or ():
        if not 0 < weight < math.inf:
            raise ValueError(
                f"--data_weights {weight:g} is no share of the clips: give numbers above 0, and"
                " leave out a --data that is not to be trained on"
            )
    train, shares, val, bad, sources = [], [], [], [], []
    for i, group in enumerate([] if any(map(is_stream, expand(data))) else groups):
        records, more = open_records(group)
        kept, held = split_records(records, 0 if val_data else val_fraction)
        total = sum(r.duration for r in kept)
        shares += [r.duration * (data_weights[i] / total if data_weights else 1.0) for r in kept]
        train, val, bad = train + kept, val + held, bad + more
        sources.append(records)
    refuse_shared(sources)
    if val_data:
        val, more = open_records(val_data)
        bad = bad + more
        shared = twins_between(train, val)
        if shared:
            raise ValueError(
                f"--val_data and --data share {len(shared)} recordings,"
                f" {shared[0].shard} {shared[0].key} among them: hold them out of --data"
            )
    if len(bad) > max_bad_fraction * (n := len(train) + len(val) + len(bad)) and n >= 100:
        worst = " ".join(bad[0])
        raise ValueError(
            f"{len(bad)} of {n} recordings cannot be read, {worst} among them: mend them, or raise"
            " --max_bad_fraction"
        )
    return train, shares, val, bad


def vpt_loader(
    data,
    batch_size,
    *,
    reader=None,
    data_weights=None,
    batches_per_epoch=None,
    num_workers=4,
    seed=0,
    epoch=0,
    itr=0,
    rank=0,
    world=1,
    pin_memory=False,
    cache_dir=None,
    cache_size=100.0,
):
    """Endless DataLoader over VPT (or feature) shards: batches {"video" (B, T·frames_per_step, 3,
    H, W) uint8, "actions" (B, T-1, A), "states" (B, T, 2), "key", "bad", "bytes"} (features: "z"
    (B, T, N, D) in place of video). data: patterns, or (records, shares) of open_split; with
    cache_dir, URLs among the patterns are copied there, at most cache_size GB. reader: a
    ClipReader, default ClipReader(). Without batches_per_epoch an epoch is one pass of
    non-overlapping clips. loader.bad lists recordings left out while indexing."""
    reader = reader or ClipReader()
    if cache_dir:
        data = cached(
            [expand(group) for group in ([data] if isinstance(data, str) else data)],
            cache_dir,
            cache_size,
        )
    options = {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "collate_fn": collate,
        "persistent_workers": num_workers > 0,
        "worker_init_fn": leave_signals,
    }
    urls = [] if isinstance(data, tuple) else expand(data)
    if any(map(is_stream, urls)):
        if data_weights or not all(map(is_stream, urls)):
            raise ValueError(
                "streamed shards cannot be mixed with local ones or weighted; copy them to local"
                " files first"
            )
        bad, options = [], options | {"batch_size": batch_size, "drop_last": True}
        dataset = StreamedClips(urls, reader, seed, epoch, rank, world)
    else:
        records, shares, _, bad = (
            (*data, [], []) if isinstance(data, tuple) else open_split(data, data_weights)
        )
        dataset = Clips(records, shares, reader, seed)
        if batches_per_epoch is None:
            steps, ticks = reader.frames // reader.frames_per_step, reader.frames * 20 / reader.fps
            clips = sum(
                r.duration / (steps if "safetensors" in r.members else ticks) for r in records
            )
            batches_per_epoch = max(int(clips) // (batch_size * world), 1)
        options["batch_sampler"] = Order(
            dataset, batch_size, batches_per_epoch, epoch, itr, rank, world
        )
    loader = torch.utils.data.DataLoader(dataset, **options)
    loader.bad = bad
    return loader


def prefetch(batches, device):
    """The same batches; on a GPU each one's copy (from pinned memory, on a stream of its own) runs
    while the one before is computed on."""
    if device.type != "cuda":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            batch = {
                k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
                for k, v in batch.items()
            }
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor in batch.values():
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(torch.cuda.current_stream(device))
        ahead = batch
    if ahead is not None:
        yield ahead


class Latents(torch.utils.data.Dataset):
    """Windows of `length` steps. An item is (epoch, index, file number, first step); the dict has z
    (T, C, H, W), shift (T-1, 2) uniform in [0, 1) by (seed, epoch, index), labels (T-1, L) int64
    where there are any, and key.

    `.labels` are the names that most files with labels have; a file that lacks one of them has
    NO_LABEL there, and is in `.unlabelled`. Other names that some files have are in `.unused`."""

    def __init__(self, files, length, seed=0):
        self.files, self.length, self.seed = files, length, seed
        if not files:
            raise ValueError(
                "the manifest has no files in this split: choose another, or make the manifest"
                " again with other ratios"
            )
        self.starts = np.array([max(f.steps - length + 1, 0) for f in files])
        if not self.starts.sum():
            raise ValueError(f"no file has the {length} steps of a window: lower --sequence_length")
        self.folder = os.path.commonpath([os.path.dirname(os.path.abspath(f.path)) for f in files])
        truth = [read_labels(f.path, f.steps) for f in files]
        sets = collections.Counter(tuple(sorted(t)) for t in truth if t)
        self.labels = []
        if sets:  # of two that are equally frequent the one that more files have
            have = {names: sum(t.keys() >= set(names) for t in truth) for names in sets}
            self.labels = list(max(sets, key=lambda names: (sets[names], have[names])))
        self.unused = sorted({k for t in truth for k in t} - set(self.labels))
        self.truth, self.unlabelled = [], []
        for f, found in zip(files, truth):
            values = np.full((f.steps - 1, len(self.labels)), NO_LABEL)
            if self.labels and found.keys() >= set(self.labels):
                values = np.stack([found[k] for k in self.labels], axis=1)
            elif self.labels:
                self.unlabelled.append(os.path.relpath(f.path, self.folder))
            self.truth.append(values)

    def locate(self, u):
        """(file number, first step) at place u in [0, 1) of all possible windows, in the order of
        the files."""
        ends = self.starts.cumsum()
        at = min(int(u * ends[-1]), int(ends[-1]) - 1)
        number = int(np.searchsorted(ends, at, side="right"))
        return number, at - int(ends[number] - self.starts[number])

    def __getitem__(self, item):
        epoch, index, number, first = item
        path, stop = self.files[number].path, first + self.length
        clip = {
            "z": torch.from_numpy(read_steps(path, first, stop)),
            "key": f"{os.path.relpath(path, self.folder)}@{first}",
            "bad": [],
        }
        clip["shift"] = torch.from_numpy(
            np.random.default_rng([self.seed, epoch, index]).random(
                (self.length - 1, 2), dtype=np.float32
            )
        )
        if self.labels:
            clip["labels"] = torch.from_numpy(self.truth[number][first : stop - 1].copy())
        return clip

    def windows(self, batch_size, limit, rank=0, world=1):
        """Batches of items for validation: windows that do not overlap, at most `limit`, from all
        files, in a fixed random order; the batches do not depend on the number of ranks that share
        them, and none has a single window unless there is only one."""
        every = [
            (n, k)
            for n, f in enumerate(self.files)
            for k in range(0, f.steps - self.length + 1, self.length)
        ]
        items = [
            (0, i, *every[j])
            for i, j in enumerate(np.random.default_rng(0).permutation(len(every))[:limit])
        ]
        count = min(round(len(items) / batch_size), len(items) // 2)
        parts = np.array_split(np.arange(len(items)), max(count, 1))
        return [[items[i] for i in part] for part in parts if len(part)][rank::world]


def latent_sequences(
    dataset,
    batch_size,
    *,
    batches_per_epoch=None,
    num_workers=0,
    epoch=0,
    itr=0,
    rank=0,
    world=1,
    items=None,
    pin_memory=False,
):
    """Endless DataLoader from batch `itr` of `epoch` on: {"z" (B, T, C, H, W) float32, "shift",
    "labels"?, "key"}; or of given `items`. The order is a pure function of (seed, epoch) and the
    size of an epoch, by default one pass of windows that do not overlap."""
    batches = batches_per_epoch or max(
        sum(f.steps // dataset.length for f in dataset.files) // (batch_size * world), 1
    )
    order = (
        items if items is not None else Order(dataset, batch_size, batches, epoch, itr, rank, world)
    )
    options = {
        "persistent_workers": num_workers > 0 and items is None,
        "worker_init_fn": leave_signals,
        "pin_memory": pin_memory,
    }
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=order, num_workers=num_workers, collate_fn=collate, **options
    )


class _ScalarsOnly(NumpyArrayWrapper):
    """joblib reads object arrays with a bare pickle.load. The one that a StandardScaler may have,
    the names of the columns it was fitted on, is read by our own unpickler: no code is run."""

    def read_array(self, unpickler, ensure_native_byte_order):
        if not self.dtype.hasobject:
            return super().read_array(unpickler, ensure_native_byte_order)
        names = _NamesUnpickler(unpickler.file_handle).load()
        if not isinstance(names, np.ndarray) or not all(isinstance(n, str) for n in names.flat):
            raise pickle.UnpicklingError("an array of objects that are no names")
        return names


def load_bytearray(unpickler):
    """What pickle's protocol 5 writes arrays as: pickle itself would make room for as many bytes as
    the file claims, before it looks whether they are there."""
    size = int.from_bytes(unpickler.read(8), "little")
    if size > LARGEST:
        raise pickle.UnpicklingError(f"an array that claims {size:,} bytes")
    unpickler.append(bytearray(unpickler.read(size)))


def safe_class(unpickler, module, name):
    """A class that an array of numbers or names needs; UnpicklingError for any other."""
    safe = ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")
    if module.split(".")[0] == "numpy" and name in safe:
        return pickle._Unpickler.find_class(unpickler, module, name)
    raise pickle.UnpicklingError(f"{module}.{name}")


class _NamesUnpickler(pickle._Unpickler):
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray}
    find_class = safe_class


# Admits StandardScaler and numpy arrays, nothing else: a file from elsewhere runs no code and
# claims no memory it does not fill.
class _ScalerUnpickler(NumpyUnpickler):
    dispatch = NumpyUnpickler.dispatch | {pickle.BYTEARRAY8[0]: load_bytearray}

    def find_class(self, module, name):
        ours = {
            "sklearn.preprocessing._data.StandardScaler": StandardScaler,
            "joblib.numpy_pickle.NumpyArrayWrapper": _ScalarsOnly,
        }
        if f"{module}.{name}" in ours:
            return ours[f"{module}.{name}"]
        return safe_class(self, module, name)


LARGEST = 1 << 26  # bytes, unpacked; a scaler has a thousand


PACKED = {
    b"x": zlib.decompressobj,
    b"\x1f\x8b": functools.partial(zlib.decompressobj, 31),
    b"BZ": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lzma.LZMADecompressor,
    b"\x5d\0": lzma.LZMADecompressor,
}


def unpacked(data):
    """The bytes of a joblib file, unpacked if joblib compressed them (compress=3, .gz, .xz)."""
    for magic, start in PACKED.items():
        if data.startswith(magic):
            unpacker = start()
            try:
                data = unpacker.decompress(data, LARGEST)
            except lzma.LZMAError as e:
                raise ValueError(f"damaged xz bytes: {e}") from e
            if not unpacker.eof:
                raise ValueError(f"compressed bytes that are cut, or more than {LARGEST:,}")
            return data
    if data.startswith(b"\x04\x22\x4d\x18"):
        raise ValueError("lz4 bytes: write it again with joblib.dump(scaler, path)")
    return data


class Fitted(NamedTuple):
    """What a StandardScaler does to its columns, in numbers."""

    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray
    samples: np.ndarray
    meta: dict


def fitted(scaler):
    """A StandardScaler -> the numbers with which ActionScaler does the same. Of one without the mean
    or the std, that is 0 or 1."""
    if not isinstance(scaler, StandardScaler):
        raise ValueError(f"a {type(scaler).__name__}, not a StandardScaler")
    if not hasattr(scaler, "n_samples_seen_"):
        raise ValueError("a StandardScaler that was never fitted")
    with_mean, with_std = (vars(scaler).get(k, True) for k in ("with_mean", "with_std"))
    width = len(scaler.mean_) if scaler.mean_ is not None else scaler.n_features_in_
    mean, scale = np.zeros(width), np.ones(width)
    if with_mean:
        mean = scaler.mean_
    if with_std:
        scale = scaler.scale_
    var = np.square(scale) if scaler.var_ is None or not with_std else scaler.var_
    meta = dict(vars(scaler).get("nanojepa", {}))
    columns = vars(scaler).get("feature_names_in_")
    if columns is not None:
        meta.setdefault("names", [str(name) for name in columns])
    return Fitted(mean, var, scale, scaler.n_samples_seen_, meta)


class ActionScaler(NamedTuple):
    """Standardiser of the continuous action dimensions: mean, var, scale (A_c,) float64, n samples,
    meta (dict of plain values: names, units, fps, frames_per_step, action_space or stride,
    fingerprint). scale is sqrt(var), or 1 where var is 0, as in StandardScaler."""

    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray
    n: int
    meta: dict

    @classmethod
    def from_moments(cls, count, mean, m2, meta):
        var = np.asarray(m2, dtype=np.float64) / count
        var = np.where(
            var <= (count * np.finfo(np.float64).eps * mean) ** 2, 0.0, var
        )  # rounding alone: scikit-learn's bound
        return cls(
            np.asarray(mean, dtype=np.float64),
            var,
            np.where(var > 0, np.sqrt(var), 1.0),
            int(count),
            meta,
        )

    @property
    def hash(self):
        return hashlib.sha256(self.mean.tobytes() + self.scale.tobytes()).hexdigest()[:16]

    def transform(self, actions):
        """actions (..., A) unscaled -> a copy with the leading continuous dimensions at mean 0,
        variance 1."""
        out = np.array(actions, dtype=np.float64)
        c = len(self.mean)
        out[..., :c] = (out[..., :c] - self.mean) / self.scale
        return out

    def save(self, path):
        """Write `.pkl` (a joblib StandardScaler) or `.safetensors`, atomically; the same numbers
        give the same bytes."""
        if str(path).endswith(".safetensors"):
            tensors = {
                "mean": self.mean,
                "var": self.var,
                "scale": self.scale,
                "count": np.array([self.n], dtype=np.int64),
            }
            data = safetensors_bytes(
                tensors, metadata={"nanojepa": json.dumps(self.meta, sort_keys=True)}
            )
        else:
            s = StandardScaler()
            s.mean_, s.var_, s.scale_, s.n_samples_seen_ = self.mean, self.var, self.scale, self.n
            s.n_features_in_, s.nanojepa = len(self.mean), self.meta
            data = pickle.dumps(s, protocol=4)  # what joblib.load reads too
        write_atomically(path, data)

    @classmethod
    def load(cls, path, flags="--data SHARDS"):
        """Read what `save` wrote, or any joblib StandardScaler. Raises FileNotFoundError, or
        ValueError for anything else."""
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"no action scaler at {path}; fit one with: python fit_scaler.py {flags} --output"
                f" {path}"
            )
        try:
            if str(path).endswith(".safetensors"):
                with safe_open(path, "numpy") as f:
                    mean, var, scale, n = (
                        f.get_tensor(k) for k in ("mean", "var", "scale", "count")
                    )
                    meta = json.loads((f.metadata() or {}).get("nanojepa", "{}"))
            else:
                data = unpacked(np.fromfile(path, np.uint8).tobytes())
                s = _ScalerUnpickler(str(path), io.BytesIO(data), True).load()
                mean, var, scale, n, meta = fitted(s)
            out = cls(
                *(np.array(x, dtype=np.float64) for x in (mean, var, scale)), int(np.max(n)), meta
            )
        except (
            *DAMAGE,
            pickle.UnpicklingError,
            SafetensorError,
            AttributeError,
            ImportError,
            ArithmeticError,
            SystemError,
        ) as e:
            raise ValueError(
                f"{path} is not an action scaler (it holds or lacks: {e}); fit one with"
                " fit_scaler.py, or write a StandardScaler with joblib.dump(scaler, path)"
            ) from e
        if not (
            out.mean.ndim == 1
            and out.mean.shape == out.scale.shape
            and np.isfinite(out.mean).all()
            and np.isfinite(out.scale).all()
            and (out.scale > 0).all()
        ):
            raise ValueError(
                f"{path} holds a scaler with broken numbers; fit it again with fit_scaler.py"
            )
        return out

    def check(self, path, names, fps, frames_per_step, stride=0):
        """Refuse a scaler that was fitted for other continuous dimensions, fps, frames per step or
        --stride (ValueError)."""
        if len(self.mean) != len(names) or self.meta.get("names", names) != names:
            raise ValueError(
                f"{path} scales {self.meta.get('names', len(self.mean))}, this run needs {names};"
                " fit it with fit_scaler.py"
            )
        for key, value in (("fps", fps), ("frames_per_step", frames_per_step), ("stride", stride)):
            if key in self.meta and float(self.meta[key]) != float(value):
                raise ValueError(
                    f"{path} was fitted with --{key} {self.meta[key]:g}, this run has {value:g}:"
                    " fit it again"
                )


# Of sums over all ticks of a step of real play; of differences of an arm's poses, 4 a second
STD_RANGE = {
    "pixels": (5.0, 500.0),
    "radians": (0.01, 1.0),
    "m": (1e-3, 0.3),
    "rad": (1e-3, 1.0),
    "closed": (1e-3, 1.0),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="look into a shard: shapes, ranges, mean and std of one batch",
        allow_abbrev=False,
    )
    parser.add_argument("--inspect", metavar="SHARD", required=True, help="a shard, glob or URL")
    parser.add_argument(
        "--action_space", type=int, default=13, choices=ACTION_SPACES, help="which actions to show"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="clips to read")
    args = parser.parse_args()
    sys.excepthook = one_sentence
    loader = vpt_loader(
        args.inspect,
        args.batch_size,
        num_workers=0,
        reader=ClipReader(action_space=args.action_space),
    )
    records = getattr(loader.dataset, "records", [])
    for line in line_warnings(records, 64):
        print(f"WARNING: {line}")
    clocks = collections.Counter((r.rate, r.frames_per_line) for r in records if "mp4" in r.members)
    for (rate, frames_per_line), count in clocks.most_common(4):
        print(
            f"clock    {count} recording{'s' if count > 1 else ''} of {rate:.4g} lines a second,"
            f" {frames_per_line} frame{'s' if frames_per_line > 1 else ''} a line"
        )
    batch = next(iter(loader))
    for file, key, reason in loader.bad + batch["bad"]:
        print(f"left out: {file} {key}: {reason}")
    for name in [k for k in ("video", "z", "actions", "states") if k in batch]:
        x = batch[name].float()
        print(
            f"{name:8} {str(tuple(x.shape)):24} {str(batch[name].dtype)[6:]:8} from {x.min():.3f}"
            f" to {x.max():.3f}"
        )
    print(f"keys     {', '.join(batch['key'][:4])}")
    print(f"{'action':18} {'min':>9} {'max':>9} {'mean':>9} {'std':>9}")
    for name, x in zip(ACTION_SPACES[args.action_space], batch["actions"].flatten(0, 1).T):
        print(f"{name:18} {x.min():9.3f} {x.max():9.3f} {x.mean():9.3f} {x.std():9.3f}")
