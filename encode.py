"""Run the frozen encoder once over VPT shards or robot episodes and write its features as shards.
Training from those needs neither video nor encoder.

    python encode.py --data demo/train/*.tar --out demo/features --encoder vit_tiny --crop_size 64
    torchrun --nproc_per_node=8 encode.py --data VPT/*.tar --out features --encoder vjepa2_vitl
    python encode.py --dataset droid --data droid/*.tfrecord* --out robot-features --phases 4
    python encode.py --data VPT/*.tar --out latents --vae diffusers:CogVideoX-2b/vae

Play, for train_ac.py: reads KEY.mp4 + KEY.jsonl and writes one shard per input shard. Its members
are KEY@START.safetensors: z (S, N, D), features of S steps, not yet layer-normed, in bfloat16 (or
int8: files/features.py), actions (S-1, 38), unscaled, states (S, 2), absolute yaw and pitch in
radians. START is the tick of the first step. --phases P goes through a recording P times, from
places spread over its first step (with --encode clip over its first clip).

Robots, for train_lora.py: writes one shard per TFRecord, or per episode that is a file of its own
(files/features.py).

--vae, for train_lam.py: writes KEY.h5, `latents` (chunks, C, 2, h, w) float16 of chunks of 8
frames, each encoded alone, at 8 frames a second and 512 pixels unless told otherwise. Beside it
KEY.actions.npz contains yaw and forward between latent steps, for eval_lam.py. A VAE of pictures
(AutoencoderTiny, AutoencoderKL, TAESD) makes a step of each frame, and a chunk of two. Plain video
will do as well (files, folders, tars of them): it has no actions, so no KEY.actions.npz.

A run that was killed continues with the same command. What cannot be read is listed in
left_out.jsonl."""

import argparse
import math
import os

# --- flags ---
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
# lists can be given at once or flag by flag; each --data stays a list of its own
several = {"nargs": "+", "action": "extend"}
repeated = {"nargs": "+", "action": "append"}

flag = parser.add_argument_group("data").add_argument
# what is read, and where the features go
flag("--dataset", default="vpt", choices=["vpt", "droid"], help="gameplay shards or robot episodes")
flag("--data", "--data_path", **repeated, required=True, help="paths, globs, {a..b}")
flag("--recordings", metavar="FILE", help="take only these of --data: a file of names, one a line")
flag("--cache_dir", help="copy shards at URLs into this folder (of each node) when first needed")
limit = (
    "size limit of --cache_dir in GB (%(default)g); least recently used shards are deleted first"
)
flag("--cache_size", type=float, default=100.0, help=limit)
flag("--out", required=True, help="folder to write to")

flag = parser.add_argument_group("encoder").add_argument
# the encoder must be the one of the training run
flag("--encoder", default="vjepa2_vitl", help="path, URL, name (%(default)s; droid: ..._ac_vitg)")
of_vaes = "write H5 latents of this VAE: Wan, CogVideoX, or of pictures (Tiny, KL; taesd:FOLDER)"
flag("--vae", metavar="diffusers:FOLDER", help=of_vaes)
# stored once for many runs: float32 by default
modes = ["tubelet", "frame", "clip"]
seen = "what the encoder sees at once: a step, a frame or a clip (%(default)s; droid: frame)"
flag("--encode", default="tubelet", choices=modes, help=seen)
flag("--dtype", default="float32", choices=["float32", "bfloat16"], help="precision (%(default)s)")

flag = parser.add_argument_group("what a step is").add_argument
# these must be the same in the training run
flag("--fps", type=float, default=5.0, help="sampled frames a second (%(default)g; droid: 4)")
flag("--frames_per_step", type=int, default=2, help="sampled frames a step (%(default)s; droid: 1)")
flag("--frames_per_clip", type=int, default=16, help="frames that --encode clip sees (%(default)s)")
flag("--crop_size", type=int, default=256, help="pixels of the square crop (%(default)s)")
flag("--decoder", default="pyav", choices=["pyav", "decord"], help="video decoder (%(default)s)")
# more features from the same video: steps that begin between those of the first pass
flag("--phases", type=int, default=1, help="passes, each from another first frame (%(default)s)")

flag = parser.add_argument_group("robots (--dataset droid)").add_argument
# as in train_lora.py; each camera is encoded
flag("--stride", type=int, help="rows between frames instead of --fps; Meta's for raw DROID is 15")
crops = ["reference", "square"]
shape = "reference: the centre, at most 1.35:1, squeezed to a square (%(default)s)"
flag("--crop", default="reference", choices=crops, help=shape)
flag("--camera", **several, help="cameras to encode, one or more (exterior_1)")
flag("--state_keys", **several, help="fields of the state (the 7-D pose)")
flag("--action_keys", **several, help="fields of the action (differences of the pose)")
switch = argparse.BooleanOptionalAction
checksums = "first read all TFRecords once to check their checksums (local files up to 50 GB)"
flag("--verify", action=switch, help=checksums)

flag = parser.add_argument_group("storage and speed").add_argument
# room on the disk, memory of the encoder, CPUs that decode
numbers = "number format of the features; int8 takes half the space (%(default)s)"
flag("--store", default="bf16", choices=["bf16", "int8"], help=numbers)
flag("--batch_size", type=int, default=32, help="steps encoded at once (%(default)s)")
threads = min(8, os.cpu_count())
flag("--num_workers", type=int, default=threads, help="decoding threads of a rank (%(default)s)")

# flags of one dataset only
OF_PLAY = ["recordings", "vae", "encode", "frames_per_step", "frames_per_clip", "decoder"]
OF_ROBOTS = ["stride", "crop", "camera", "state_keys", "action_keys", "verify"]


def read_flags():
    """The flags, with the defaults of their dataset. Ends the program for those that do not fit."""
    # the defaults of the dataset are set first, then the flags are read again over them
    args = parser.parse_args()
    robots = args.dataset == "droid"
    if robots:
        # as Meta trained its AC predictor, whose file also contains the encoder
        parser.set_defaults(fps=4.0, encode="frame", frames_per_step=1, encoder="vjepa2_ac_vitg")
    elif args.vae:
        # a VAE gets larger pictures, and more of them a second, than an encoder
        parser.set_defaults(fps=8.0, crop_size=512)
    args = parser.parse_args()

    # a flag of the other dataset would do nothing: refuse it
    for name in OF_PLAY if robots else OF_ROBOTS:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --dataset {'vpt' if robots else 'droid'}")

    # each message names one flag
    for name in ("phases", "batch_size", "crop_size", "frames_per_step", "frames_per_clip", "fps"):
        value = getattr(args, name)
        if value <= 0:
            parser.error(f"--{name} {value:g} is too small")
        if not value < math.inf:
            parser.error(f"--{name} {value:g} is no number that can be used")
    return args


# before the imports that take seconds, for --help and misspelt flags
if __name__ == "__main__":
    args = read_flags()

import collections
import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import shutil
import signal
import sys
import tarfile
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save as safetensors_bytes

from checkpoint import lock, peak_memory, short_excepthook
from data import holds_play, read_names, refuse_unknown
from droid import DroidReader, find_episodes, index_episodes
from files.disk import (
    READ_ERRORS,
    is_storage_error,
    make_folder,
    storage_sentence,
    write_atomically,
)
from files.episodes import index_file
from files.features import (
    PLAY,
    ROBOTS,
    encodable_episodes,
    estimate,
    index_play,
    pack_features,
    plan_episode,
    plan_recording,
    play_runs,
    reader_settings,
    tar_names,
)
from files.films import film_index, film_paths, index_films
from files.kinds import kind_of, sentence_of
from files.latents import encode_latents, find_files, merged_frames
from files.logs import append_jsonl
from files.progress import tqdm
from files.remote import Shard, cached
from files.shards import expand, is_stream, line_warnings, shard_index
from files.video import WrongDecoder
from files.vpt import ClipReader
from kernels import describe_kernels
from model import encode_steps
from weights import encoder_hash, open_encoder, open_latent_vae

# beside the shards: what they were made with, and what is not in them and why
SETTINGS = "encode.json"
LEFT_OUT = "left_out.jsonl"


class Job(NamedTuple):
    """What this process has to do, whatever it encodes."""

    paths: list  # all input files
    share: list  # those of this rank
    out: str  # the folder to write to
    rank: int
    world: int
    device: torch.device


class Encoding(NamedTuple):
    """How steps become features."""

    encoder: torch.nn.Module
    encode: str  # tubelet, frame or clip, see model.encode_steps
    frames_per_step: int
    store: str  # bf16 or int8
    dtype: torch.dtype
    batch_size: int  # steps
    num_workers: int  # threads that decode ahead


# --- the output folder ---


def check_settings(out, made_with):
    """ValueError if a folder contains what other settings (a dict) made."""
    # a new folder, or one where nothing was finished, takes any settings
    path = os.path.join(out, SETTINGS)
    if not os.path.exists(path):
        return

    # shards lie in the folder itself, latents of keys such as day1/clip in folders of it
    has_shards = any(n.endswith(".tar") for n in os.listdir(out))
    if not has_shards and not find_files(out)[0]:
        return

    # features of two encoders or frame rates in one folder would be trained on as one
    with open(path) as f:
        old = json.load(f)
    if old != made_with:
        differences = []
        for name in sorted(set(old) | set(made_with)):
            there = old.get(name)
            here = made_with.get(name)
            if there != here:
                differences.append(f"{name} is {there} there, {here} here")
        raise ValueError(
            f"{out} holds what other settings made ({'; '.join(differences)}): choose another --out"
        )


def write_settings(out, made_with):
    # before the first shard: a run with other settings that starts later must see them
    write_atomically(os.path.join(out, SETTINGS), json.dumps(made_with).encode())


def refuse_other_kinds(path):
    """ValueError if the first file of --data is nothing that has lines of actions. A shard that is
    damaged is left out later, with its reason."""
    if is_stream(path):
        return
    kind = kind_of(path)
    if kind in ("film", "films"):
        raise ValueError(
            f"{path} is plain video, and features go with actions: with lines of actions beside it,"
            " pack both with python -m prepare.shards; without any, give --vae (latents for"
            " train_lam.py), or train_vjepa.py the video as it is"
        )
    if kind == "robot":
        raise ValueError(f"{path} is robot episodes: add --dataset droid")
    if kind in ("latents", "lines", "parquet", "weights"):
        raise ValueError(f"{sentence_of(path, kind)}; encode.py takes shards of play")


def target_files(names, out):
    """{input file: name} -> {input file: the shard that is written}. ValueError if two are one."""
    # day1/a.tar and day2/a.tar would both become a.tar
    targets = {path: os.path.join(out, name) for path, name in names.items()}
    if len(set(targets.values())) < len(targets):
        raise ValueError(
            "two input shards have the same file name: encode them into different --out folders"
        )
    return targets


def check_finished(share, targets, out, keys_of):
    """ValueError if a shard that is there already contains recordings that its input file (of which
    keys_of gives the keys) does not have: it is not of an earlier run of ours."""
    # a finished shard is kept, so it must be of these very recordings
    for path in share:
        if not os.path.exists(targets[path]):
            continue

        # the same name, but other recordings: a shard of another data set
        keys = {r.recording for r in shard_index(targets[path])[0]}
        foreign = keys - keys_of(path)
        if foreign:
            raise ValueError(
                f"{out} holds a {os.path.basename(path)} of other recordings ({min(foreign)}):"
                " choose another --out"
            )


def play_keys(path):
    """Keys of the recordings in a shard, or in a Shard that is not copied yet."""
    # peek: the index is enough, the video need not be copied for it
    source = path.peek() if isinstance(path, Shard) else path
    return {r.key for r in shard_index(source)[0]}


def files_with(job, only, keys_of):
    """The Job with those of its input files that contain a recording of `only`, names. keys_of:
    from a file to the keys in it. ValueError if a name is in no file of any rank. Collective."""
    # files without one are not written: an empty shard would say that it is finished
    names = set()
    share = []
    for path in job.share:
        keys = keys_of(path)
        names |= keys
        # a file without readable recordings stays: what is wrong with it is told later
        if not keys or keys & set(only):
            share.append(path)

    # a rank sees its own files alone
    of_ranks = [names]
    if job.world > 1:
        of_ranks = [None] * job.world
        dist.all_gather_object(of_ranks, names)
    refuse_unknown(only, set().union(*of_ranks))
    return job._replace(share=share)


def picked(records, bad, only):
    """Records and flaws, (file, key, reason), of the recordings in `only` (names), or all if that
    is None. What is wrong with a whole file has no key, and stays."""
    if only is None:
        return records, bad
    wanted = set(only)
    records = [r for r in records if r.key in wanted]
    return records, [flaw for flaw in bad if not flaw[1] or flaw[1] in wanted]


def film_keys(path):
    """Keys of the videos in a file. Nothing is measured for them."""
    return {record.key for record in film_index(path)[0]}


def robot_keys(path):
    """Keys of the episodes in a file."""
    # without checksums: they are checked when the episodes are read
    return {e["key"] for e in index_file(path, False)[1]}


# --- room on the disk ---


def robot_runs(records):
    """Steps of each segment that episodes (Sources) will give."""
    # a segment of one step has no action between steps
    runs = []
    for r in records:
        runs += [steps for _, _, steps in r.runs if steps >= 2]
    return runs


def check_room(records, what, steps, size, tokens, width, store, phases, out):
    """What all ranks together will write, as a sentence. what: "hours of play"; steps, size: this
    rank's, of `estimate`. OSError if the disk has no room for it. Collective."""
    # each rank knows its share; the disk must hold all of them. An hour is 72,000 ticks
    hours = sum(r.duration for r in records) / 72000
    total = torch.tensor([hours, steps, size]).double()
    if dist.is_initialized():
        dist.all_reduce(total)
    hours, steps, size = total.tolist()

    # the folder is made first: free space is that of its disk
    make_folder("--out", out)
    free = shutil.disk_usage(out).free
    # the same sentence in the log and in the error
    text = (
        f"{hours:.2f} {what}, {steps:,.0f} steps x {tokens} tokens x {width} channels in"
        f" {store}, take {size / 1e9:,.3f} GB"
    )
    if size > free:
        # only what this run has not done already
        remedies = ["make room"]
        if store == "bf16":
            remedies.append("--store int8 for half of it")
        if phases > 1:
            remedies.append("fewer --phases")
        raise OSError(
            f"{text}, and {out} has {free / 1e9:,.3f} GB free: {', '.join(remedies)}, or put --out"
            " on a larger disk"
        )
    return f"{text} of the {free / 1e9:,.3f} GB free in {out}"


# --- from recordings to shards ---


def decode_ahead(records, plan, num_workers):
    """(record, future of a part) in order, at least one a recording, num_workers parts ahead of
    the one that is taken. Threads are enough, since decoders do not hold Python's lock. What cannot
    be read gives a future that raises."""

    # an error takes its place in the order of recordings, as a future that raises
    def fail(error):
        raise error

    # the oldest part is handed out as soon as enough others wait behind it
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(max(num_workers, 1)) as pool:
        for record in records:
            # the plan reads the actions; the video is decoded in the threads
            try:
                calls = plan(record)
            except READ_ERRORS as e:
                calls = [functools.partial(fail, e)]
            for call in calls:
                waiting.append((record, pool.submit(call)))
                if len(waiting) > num_workers:
                    yield waiting.popleft()

        # the last parts, with nothing left to decode behind them
        yield from waiting


@torch.inference_mode()
def encode_recording(parts, how, device):
    """The parts of one recording -> [(name of a segment, its tensors, its own metadata)], what is
    wrong with the recording or "". An error of the disk, the encoder or its flags is raised: the
    shard must not be finished without the recording."""
    # a recording comes in parts, so a long video need not be in memory whole
    features = collections.defaultdict(list)  # segment: its features, part after part
    for record, part in parts:
        # a recording that is damaged is left out; a flag that is wrong or a disk that fails would
        # leave out all of them, so those end the run
        try:
            labels, videos = part.result()
        except WrongDecoder as e:
            raise ValueError(f"{record.shard} {record.key}: {e}") from e
        except READ_ERRORS as e:
            if is_storage_error(e):
                raise OSError(storage_sentence(f"{record.shard} {record.key}", e)) from e
            return [], f"{type(e).__name__}: {e}"

        # to the CPU at once: features of a whole recording need not fit on the GPU
        for i, video in videos:
            video = video[None].to(device)
            h = encode_steps(how.encoder, video, how.encode, how.frames_per_step)[0]
            h = h.to("cpu", torch.bfloat16 if how.store == "bf16" else h.dtype)
            features[i].append(h)

    # join the parts of each segment, in the form that is stored
    encoded = []
    for i, (name, motion, metadata) in enumerate(labels):
        z = torch.cat(features.pop(i))
        encoded.append((name, pack_features(z, how.store) | motion, metadata))
    return encoded, ""


def member_bytes(tensors, metadata):
    """A safetensors file whose header is sorted: the library writes its keys in random order, and a
    run that was interrupted should give the same bytes."""
    # a safetensors file is 8 bytes of size, a JSON header, the tensors
    data = safetensors_bytes(tensors, metadata=metadata)
    end = 8 + int.from_bytes(data[:8], "little")  # of the header

    # as long as before, so the offsets of the tensors stay right
    header = json.dumps(
        json.loads(data[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    return data[:8] + header.ljust(end - 8) + data[end:]


def encode_all(records, groups, how, device, bad, progress):
    """(record, what encode_recording gives) of each record of a shard. groups: an iterator over the
    parts of each in order. What cannot be read is added to `bad`."""
    for record in records:
        # groups are in the order of records, so the next one is this record's
        _, parts = next(groups)
        encoded, flaw = encode_recording(parts, how, device)

        # the shard is finished without this recording, and the list says so
        if flaw:
            bad.append((record.shard, record.key, flaw))
        yield record, encoded
        progress.update()


def write_members(out, recordings, meta, names):
    """Write what encode_all gives into an open file, as a tar; its members are added to `names`."""
    with tarfile.open(fileobj=out, mode="w") as tar:
        for record, encoded in recordings:
            # all segments of a recording stand together; a name gives recording and first tick
            for name, tensors, metadata in encoded:
                data = member_bytes(tensors, meta | metadata)
                # a fixed header, without time or owner: the same run gives the same bytes
                member = tarfile.TarInfo(f"{record.key}@{name}.safetensors")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                names.append(member.name)


def write_shards(job, targets, records, bad, plan, how, meta):
    """Encode indexed recordings and write the shards of this rank that are not there yet. plan: a
    recording -> functions that decode a part each. bad: [(file, key, reason)] of the index.
    ValueError if nothing could be encoded."""
    # shards are whole or not there, so what is there is done
    todo = [p for p in job.share if not os.path.exists(targets[p])]
    of_shard = {path: [*group] for path, group in itertools.groupby(records, key=lambda r: r.shard)}

    # one queue over all shards: at the end of one the next is decoded already
    ahead = decode_ahead(records, plan, how.num_workers)
    groups = itertools.groupby(ahead, key=lambda x: (x[0].shard, x[0].key))

    # counted for all shards of this rank
    bad = list(bad)
    written = 0

    # recordings are counted, not shards: a shard may take an hour
    progress = tqdm(total=len(records), unit="recording", disable=job.rank > 0, desc="encode")
    for path in todo:
        # a generator: recordings are encoded while the shard is written
        recordings = encode_all(of_shard.get(path, []), groups, how, job.device, bad, progress)
        names = []
        write = functools.partial(write_members, recordings=recordings, meta=meta, names=names)

        # what can fail here is the disk, and what is finished stays
        try:
            write_atomically(targets[path], write)
        except OSError as e:
            reason = f"{targets[path]} ({e.strerror or e}): the shards that are finished stay"
            raise OSError(f"{reason}; fix this and run the same command again") from e
        written += len(names)

        # written with each shard: a run that is killed has listed what its shards lack
        rows = []
        for file, key, reason in bad:
            if file == path:
                rows.append({"file": file, "key": key, "reason": reason})
        append_jsonl(os.path.join(job.out, LEFT_OUT), rows)
    progress.close()

    # after the progress bar, where it can be read
    for file, key, reason in bad:
        print(f"left out: {file} {key}: {reason}")

    # empty shards are removed: the next run would take them for finished
    if todo and not written:
        for path in todo:
            os.unlink(targets[path])
        example = f" ({' '.join(bad[0])})" if bad else ""
        raise ValueError(f"nothing could be encoded, see above{example}")

    # finished shards are not tried again, even if a recording has been repaired since
    left_out = os.path.join(job.out, LEFT_OUT)
    if os.path.exists(left_out) and job.rank == 0:
        print(
            f"what could not be read is in {left_out}; to encode a shard again, delete it from"
            f" {job.out}"
        )

    # what this rank has done
    size = sum(os.path.getsize(targets[p]) for p in todo) / 2**20
    print(
        f"rank {job.rank} encoded {len(todo)} of {len(job.paths)} shards: {size:,.1f} MiB; peak"
        f" memory {peak_memory(job.device):.0f} MiB"
    )


# --- the three programs ---


def encode_play(job, how, meta, made_with, reader, phases, only):
    """VPT shards -> feature shards of the same names. meta: metadata of each member; made_with:
    further settings that all shards of a folder share; only: names of the recordings, or None."""
    # the folder must be empty, or of an earlier run with the same settings and input
    names = {p: os.path.basename(p.split("?")[0]) for p in job.paths}
    targets = target_files(names, job.out)
    check_settings(job.out, meta | made_with)
    check_finished(job.share, targets, job.out, play_keys)

    # only what is left to do is opened
    todo = [p for p in job.share if not os.path.exists(targets[p])]
    records, bad = picked(*index_play(todo), only)
    runs = play_runs(
        records,
        fps=reader.fps,
        encode=how.encode,
        frames_per_clip=int(meta["frames_per_clip"]),
        frames_per_step=how.frames_per_step,
        phases=phases,
    )

    # the disk is checked before anything is written
    announce(job, how, records, runs, "hours of play", PLAY, meta, phases)
    if job.rank == 0:
        write_settings(job.out, meta | made_with)

    # encode
    plan = functools.partial(plan_recording, reader=reader, phases=phases, size=how.batch_size)
    write_shards(job, targets, records, bad, plan, how, meta)


def encode_robots(job, how, meta, made_with, reader, phases, verify):
    """Robot episodes -> feature shards, one a TFRecord or an episode that is a file of its own.
    verify: of droid.index_episodes."""
    # the folder must be empty, or of an earlier run with the same settings and input
    names, folder = tar_names(job.paths)
    made_with = made_with | {"folder": folder}
    targets = target_files(names, job.out)
    check_settings(job.out, meta | made_with)
    check_finished(job.share, targets, job.out, robot_keys)

    # only what is left to do is opened
    todo = [p for p in job.share if not os.path.exists(targets[p])]
    episodes, bad = index_episodes(todo, reader, verify, print)
    records, bad = encodable_episodes(episodes, bad, reader, phases)
    runs = robot_runs(records)

    # the disk is checked before anything is written
    announce(job, how, records, runs, "hours of episodes", ROBOTS, meta, phases)
    if job.rank == 0:
        write_settings(job.out, meta | made_with)

    # encode
    plan = functools.partial(plan_episode, reader=reader, size=how.batch_size)
    write_shards(job, targets, records, bad, plan, how, meta)


def announce(job, how, records, runs, what, kind, meta, phases):
    """Print what will be written. OSError if the disk is too small. Collective."""
    # from steps, not from video: nothing is decoded for it
    tokens = int(meta["grid"]) ** 2
    width = how.encoder.embed_dim
    steps, size = estimate(runs, tokens, width, how.store, **kind)
    room = check_room(records, what, steps, size, tokens, width, how.store, phases, job.out)

    # rank 0 is about to write into the folder: first all ranks must have looked at it
    if job.world > 1:
        dist.barrier()
    if job.rank > 0:
        return

    # odd lines, the encoder, the room: what one wants to know before hours of encoding
    if kind is PLAY:
        for line in line_warnings(records):
            print(f"WARNING: {line}")
    name = str(how.dtype).removeprefix("torch.")
    print(f"encoder in {name} on {job.device}; {describe_kernels(job.device, how.dtype)}")
    print(f"to encode: {room}")


def encode_vae(job, made_with, vae, fps, crop_size, dtype, batch_size, only):
    """VPT shards -> KEY.h5 with latents of the VAE `vae`, and KEY.actions.npz. only: of
    encode_play."""
    # latents of two VAEs in one folder would be trained on as one
    check_settings(job.out, made_with)

    # what is odd in the recordings is known before hours of encoding
    records, bad = picked(*index_play(job.share), only)
    if job.rank == 0:
        for line in line_warnings(records):
            print(f"WARNING: {line}")

    encode_records(records, bad, job, made_with, vae, fps, crop_size, dtype, batch_size)


def encode_film_vae(job, made_with, vae, fps, crop_size, dtype, batch_size, only):
    """Plain video -> KEY.h5 with latents of the VAE `vae`. only: names to take, None: all."""
    check_settings(job.out, made_with)
    records, bad = picked(*index_films(job.share), only)
    if job.rank == 0:
        print("plain video: no lines are read, so there is no KEY.actions.npz")
    encode_records(records, bad, job, made_with, vae, fps, crop_size, dtype, batch_size)


def encode_records(records, bad, job, made_with, vae, fps, crop_size, dtype, batch_size):
    """Encode records and write KEY.h5 of each. Collective: no two ranks may have the same key."""
    # files are named by the keys alone, so no two ranks may have one
    keys = [r.key for r in records]
    if job.world > 1:
        of_ranks = [None] * job.world
        dist.all_gather_object(of_ranks, keys)
        keys = [key for of_rank in of_ranks for key in of_rank]
    twice = [key for key, n in collections.Counter(keys).items() if n > 1]
    if twice:
        raise ValueError(
            f"two shards contain a recording {twice[0]}: encode them into different --out folders"
        )

    # a VAE is large: it is loaded when nothing else can go wrong
    model = open_latent_vae(vae, dtype).to(job.device)
    merged = merged_frames(model)
    if merged == 1 and crop_size % model.factor:
        raise ValueError(
            f"--crop_size {crop_size} is no multiple of {model.factor}, as --vae needs"
        )
    if job.rank == 0:
        write_settings(job.out, made_with)

    # a chunk is two latent steps of several frames: fewer of them are encoded at once than steps
    chunks = max(batch_size // (2 * merged), 1)
    encode_latents(records, bad, model, job.out, fps, crop_size, chunks, job.device)
    print(f"rank {job.rank}: peak memory {peak_memory(job.device):.0f} MiB")


def stop(signum, frame):
    # as an exception, so that open files are closed and removed
    sys.exit(143)


def silent(text):
    # in place of print on all ranks but the first
    pass


if __name__ == "__main__":
    # what the user can fix is printed as one line, everything else as a traceback
    sys.excepthook = short_excepthook

    # when SLURM ends the job, the half-written shard is removed
    signal.signal(signal.SIGTERM, stop)
    robots = args.dataset == "droid"
    only = None if args.recordings is None else read_names(args.recordings)

    # --- distributed ---
    # torchrun sets these; ranks share the files and otherwise work alone
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))

    # each rank of a node has a GPU of its own
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)

    # --- data ---
    # output beside the recordings would be found as input by the next run
    patterns = [p for group in args.data for p in group]
    films = False
    if args.vae:
        # shards of play, or plain video, which has no lines
        paths = film_paths(patterns)
        films = not holds_play(paths)
    if not films:
        paths = find_episodes(patterns) if robots else expand(patterns)
    if not robots and not args.vae:
        refuse_other_kinds(paths[0])
    if os.path.realpath(args.out) in {os.path.dirname(os.path.realpath(p)) for p in paths}:
        raise ValueError(f"--out {args.out} is where the recordings are: choose another folder")

    # one run at a time writes to a folder. The others wait until rank 0 has removed what a killed
    # run left
    if world > 1:
        dist.init_process_group("gloo")
    if rank == 0:
        make_folder("--out", args.out)
        lock(args.out)
    if world > 1:
        dist.barrier()

    # shards at URLs are copied first: encoding jumps to frames, and a stream only runs forward
    share = paths[rank::world]
    urls = [p for p in paths if is_stream(p)]
    if urls and not robots:
        if not args.cache_dir:
            raise ValueError(
                f"{urls[0]}: encode.py needs to seek: name a --cache_dir, and shards are copied"
                " there, or copy them yourself"
            )
        print0 = print if rank == 0 else silent
        [share] = cached([share], args.cache_dir, args.cache_size, print0)

    # what each of the three programs above needs to know
    job = Job(paths, share, args.out, rank, world, device)
    dtype = getattr(torch, args.dtype)

    # a shard with some of its recordings would pass for a finished one with others
    chosen = {}
    if only:
        job = files_with(job, only, film_keys if films else play_keys)
        digest = hashlib.sha256("\n".join(sorted(set(only))).encode()).hexdigest()
        chosen["recordings"] = f"{len(set(only))} names, sha256 {digest[:16]}"

    # --- latents of a VAE ---
    if args.vae:
        if args.decoder != "pyav":
            raise ValueError(f"--decoder {args.decoder}: latents are made of PyAV's pictures")

        # latents of another of these would not belong into the same folder
        made_with = {k: getattr(args, k) for k in ("vae", "fps", "crop_size", "dtype")}
        make_latents = encode_film_vae if films else encode_vae
        make_latents(
            job, made_with, args.vae, args.fps, args.crop_size, dtype, args.batch_size, only
        )
        if rank == 0:
            print(f"next: python -m prepare.manifest {args.out}")
        sys.exit()

    # --- encoder ---
    # written into every member: training refuses features of other settings or another encoder
    encoder = open_encoder(args.encoder, args.crop_size, args.frames_per_clip).to(device)
    meta = {}
    for name in ("encode", "fps", "frames_per_step", "crop_size", "frames_per_clip"):
        meta[name] = str(getattr(args, name))
    meta["encoder"] = encoder_hash(encoder)
    meta["grid"] = str(args.crop_size // encoder.patch_size)
    if args.store != "bf16":
        meta["store"] = args.store

    # not in the members, but the same for a whole folder
    made_with = {"phases": args.phases, "dtype": args.dtype} | chosen

    # the hash above is of the weights before this cast
    how = Encoding(
        encoder.to(dtype),
        args.encode,
        args.frames_per_step,
        args.store,
        dtype,
        args.batch_size,
        args.num_workers,
    )

    # --- encode ---
    if robots:
        # two frames: the shortest clip with an action, so the shortest episodes can be used
        camera = args.camera or ["exterior_1"]
        keys = (args.state_keys, args.action_keys)
        reader = DroidReader(2, args.fps, args.crop_size, args.crop, camera, args.stride, *keys)
        meta |= {"dataset": "droid"} | reader_settings(reader)
        encode_robots(job, how, meta, made_with, reader, args.phases, args.verify)
    else:
        reader = ClipReader(
            args.frames_per_clip,
            args.fps,
            args.frames_per_step,
            args.crop_size,
            encode=args.encode,
            decoder=args.decoder,
        )

        # all 38 actions are stored: --action_space is chosen in training
        meta["action_space"] = "38"
        if args.decoder != "pyav":
            meta["decoder"] = args.decoder
        encode_play(job, how, meta, made_with, reader, args.phases, only)
    if rank == 0:
        # the next command
        script = "train_lora.py" if robots else "train_ac.py"
        print(
            f"to train on them: python {script} --data {args.out}/*.tar, with the --fps and sizes"
            " of this run"
        )

    # all ranks leave together; a process that just exits can hang the others
    if world > 1:
        dist.destroy_process_group()
