"""Run the frozen encoder once over VPT shards or robot episodes and write its features as shards,
from which training needs neither video nor encoder.

    python encode.py --data demo/train/*.tar --out demo/features/train --encoder vit_tiny --crop_size 64
    torchrun --nproc_per_node=8 encode.py --data VPT/*.tar --out features --encoder vjepa2_vitl
    python encode.py --dataset droid --data droid/*.tfrecord* --out droid-features --phases 4      # for train_lora.py
    python encode.py --data VPT/*.tar --out latents --vae diffusers:CogVideoX-2b/vae        # for train_lam.py

Reads KEY.mp4 + KEY.jsonl, writes one shard per input shard with KEY@START.safetensors: z (S, N, D)
features of S steps, not yet layer-normed, bfloat16 (or int8: model.pack_features), actions (S-1,
38) unscaled, states (S, 2) absolute yaw and pitch in radians. START is the tick of the first step:
--phases P steps through a recording P times, from places spread over its first step (clip, for
--encode clip). A run that was killed goes on with the same command; what cannot be read is listed
in left_out.jsonl. Of robots it writes one shard per TFRecord, or per episode in files of its own:
files/robot_features.py. With --vae it writes KEY.h5 instead, `latents` (chunks, C, 2, h, w) float16
of chunks of 8 frames, each encoded alone, at 8 frames a second and 512 pixels unless told
otherwise, and KEY.actions.npz, yaw and forward between latent steps, for eval_lam.py."""

import argparse
import collections
import concurrent.futures
import functools
import io
import itertools
import json
import os
import shutil
import signal
import sys
import tarfile

import torch
import torch.distributed as dist
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from checkpoint import lock, one_sentence, peak_memory
from droid import DroidReader, find_episodes, index_episodes
from files.disk import READ_ERRORS, disk_failed, disk_sentence, write_atomically
from files.episodes import index_file
from files.features import (
    Source,
    index_play,
    pack_features,
    plan_episode,
    plan_recording,
    segments,
    settings,
    sources,
    tar_names,
)
from files.latents import encode_latents, find_files, open_vae
from files.logs import append_jsonl
from files.remote import Shard, cached
from files.shards import expand, is_stream, line_warnings, shard_index
from files.video import WrongDecoder
from files.vpt import ClipReader, step_size
from kernels import chosen
from model import encode_steps
from weights import (
    encoder_hash,
    open_encoder,
)

SETTINGS, LEFT_OUT = (
    "encode.json",
    "left_out.jsonl",
)  # what the files of an output folder were made with, and what is not in them
OF_PLAY, OF_ROBOTS = (
    "vae encode frames_per_step frames_per_clip decoder".split(),
    "stride crop camera state_keys action_keys verify".split(),
)

# --- flags ---
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument(
    "--dataset", default="vpt", choices=["vpt", "droid"], help="gameplay shards or robot episodes"
)
parser.add_argument(
    "--data",
    "--data_path",
    nargs="+",
    action="append",
    required=True,
    help="shards, episodes: paths, globs, {a..b}",
)
parser.add_argument(
    "--cache_dir",
    help="copy VPT shards at URLs into this folder (of each node) when their turn comes",
)
parser.add_argument(
    "--cache_size",
    type=float,
    default=100.0,
    help="GB that --cache_dir may hold; what was used longest ago goes first",
)
parser.add_argument("--out", required=True, help="folder for the feature shards")
parser.add_argument(
    "--encoder",
    default="vjepa2_vitl",
    help="path, URL or name, or vit_tiny (random); droid: vjepa2_ac_vitg if not given",
)
parser.add_argument(
    "--vae",
    metavar="diffusers:FOLDER",
    help="folder of a video VAE (Wan, CogVideoX): write H5 latents",
)
parser.add_argument(
    "--encode",
    default="tubelet",
    choices=["tubelet", "frame", "clip"],
    help="what the encoder sees (droid: a frame)",
)
parser.add_argument(
    "--frames_per_clip",
    type=int,
    default=16,
    help="frames of a clip: what --encode clip sees at once",
)
parser.add_argument(
    "--fps", type=float, default=5.0, help="sampled frames a second (droid: 4 if not given)"
)
parser.add_argument(
    "--frames_per_step", type=int, default=2, help="sampled frames a step (droid: 1)"
)
parser.add_argument(
    "--stride",
    type=int,
    help="droid: rows between sampled frames in place of --fps; 15 is Meta's on raw DROID",
)
parser.add_argument(
    "--crop",
    default="reference",
    choices=["reference", "square"],
    help="droid: reference is at most 1.35:1, squeezed",
)
parser.add_argument(
    "--camera",
    nargs="+",
    action="extend",
    help="droid: cameras, each of which is encoded (default: exterior_1)",
)
parser.add_argument(
    "--state_keys",
    nargs="+",
    action="extend",
    help="droid: fields of the state (default: the 7-D pose)",
)
parser.add_argument(
    "--action_keys",
    nargs="+",
    action="extend",
    help="droid: fields of the action (default: differences of the pose)",
)
parser.add_argument(
    "--verify",
    action=argparse.BooleanOptionalAction,
    help="droid: check all checksums of TFRecords, which reads them once (default: files up to 50 GB)",
)
parser.add_argument("--crop_size", type=int, default=256, help="pixels of the square crop")
parser.add_argument("--decoder", default="pyav", choices=["pyav", "decord"], help="video decoder")
parser.add_argument(
    "--phases",
    type=int,
    default=1,
    help="times each recording is stepped through, from different first frames",
)
parser.add_argument(
    "--store",
    default="bf16",
    choices=["bf16", "int8"],
    help="how features are stored; int8 takes half the bytes",
)
parser.add_argument("--batch_size", type=int, default=32, help="steps encoded at once")
parser.add_argument(
    "--num_workers",
    type=int,
    default=min(8, os.cpu_count()),
    help="threads a rank that decode ahead of the encoder",
)
parser.add_argument(
    "--dtype", default="float32", choices=["float32", "bfloat16"], help="precision of the encoder"
)


def check_settings(out, made):
    """ValueError if a folder holds what other settings (dict) made."""
    if not os.path.exists(os.path.join(out, SETTINGS)):
        return
    # shards lie in the folder itself, latents of keys such as day1/clip in folders of it
    if any(n.endswith(".tar") for n in os.listdir(out)) or find_files(out)[0]:
        with open(os.path.join(out, SETTINGS)) as f:
            if (old := json.load(f)) != made:
                raise ValueError(
                    f"{out} holds what other settings made ({old}): choose another --out"
                )


def estimate(records, tokens, width, args):
    """(steps, bytes) of the features of indexed recordings, within a percent: by the clock of each,
    and as if no line were bad."""
    cut = args.encode, args.frames_per_clip, args.frames_per_step, args.phases
    runs = []
    for r in records:
        if isinstance(r, Source):
            runs.append(r.runs)
            continue
        try:
            runs.append(segments(r.lines, step_size(r.rate, args.fps), *cut))
        except ValueError:
            continue  # left out, with its reason, when its turn comes
    runs, robot = [n for found in runs for *_, n in found if n >= 2], args.dataset == "droid"
    row = tokens * (2 * width if args.store == "bf16" else width + 2) + 4 * (
        7 + 7 if robot else 38 + 2
    )
    return sum(runs), sum(runs) * row + len(runs) * (
        (3500 if robot else 1500) + 8 * width * (args.store == "int8")
    )


def check_room(records, tokens, width, args):
    """What all ranks together will write, as a sentence; OSError if the disk has no room for it.
    Collective."""
    total = torch.tensor(
        [sum(r.duration for r in records) / 72000, *estimate(records, tokens, width, args)]
    ).double()
    if dist.is_initialized():
        dist.all_reduce(total)
    hours, steps, size = total.tolist()
    os.makedirs(args.out, exist_ok=True)
    free = shutil.disk_usage(args.out).free
    what = "hours of episodes" if args.dataset == "droid" else "hours of play"
    text = (
        f"{hours:.2f} {what}, {steps:,.0f} steps x {tokens} tokens x {width} channels in"
        f" {args.store}, take {size / 1e9:,.3f} GB"
    )
    if size > free:
        less = " --store int8 for half of it," * (args.store == "bf16") + " fewer --phases," * (
            args.phases > 1
        )
        raise OSError(
            f"{text}, and {args.out} has {free / 1e9:,.3f} GB free: make room,{less} or put --out"
            " on a larger disk"
        )
    return f"{text} of the {free / 1e9:,.3f} GB free in {args.out}"


def decode_ahead(records, plan, args):
    """(record, future of a part) in order, at least one a recording, --num_workers parts ahead of
    the one that is taken; threads are enough, since decoders do not hold Python's lock. For what
    cannot be read it is a future that raises."""

    def fail(error):
        raise error

    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(max(args.num_workers, 1)) as pool:
        for record in records:
            try:
                calls = plan(record)
            except READ_ERRORS as e:
                calls = [functools.partial(fail, e)]
            for call in calls:
                waiting.append((record, pool.submit(call)))
                if len(waiting) > args.num_workers:
                    yield waiting.popleft()
        yield from waiting


@torch.inference_mode()
def encode_recording(parts, encoder, args, device):
    """The parts of one recording -> [(name of a segment, its tensors, its own metadata)], what is
    wrong with the recording or ''. An error of the disk, the encoder or its flags is raised: the
    shard must not be finished without the recording."""
    z = collections.defaultdict(list)
    for record, part in parts:
        try:
            labels, videos = part.result()
        except WrongDecoder as e:
            raise ValueError(f"{record.shard} {record.key}: {e}") from e
        except READ_ERRORS as e:
            if disk_failed(e):
                raise OSError(disk_sentence(f"{record.shard} {record.key}", e)) from e
            return [], f"{type(e).__name__}: {e}"
        for i, video in videos:
            h = encode_steps(encoder, video[None].to(device), args.encode, args.frames_per_step)[0]
            z[i].append(h.to("cpu", torch.bfloat16 if args.store == "bf16" else h.dtype))
    return [
        (name, pack_features(torch.cat(z.pop(i)), args.store) | label, more)
        for i, (name, label, more) in enumerate(labels)
    ], ""


if __name__ == "__main__":
    args = parser.parse_args()
    if robot := args.dataset == "droid":
        parser.set_defaults(fps=4.0, encode="frame", frames_per_step=1, encoder="vjepa2_ac_vitg")
    elif args.vae:
        parser.set_defaults(fps=8.0, crop_size=512)
    args = parser.parse_args()
    if odd := [
        k for k in (OF_PLAY if robot else OF_ROBOTS) if getattr(args, k) != parser.get_default(k)
    ]:
        parser.error(
            f"--{odd[0]} is for --dataset"
            f" {'vpt: robots have one frame a step' if robot else 'droid'}"
        )
    if low := [
        k
        for k in ("phases", "batch_size", "crop_size", "frames_per_step", "frames_per_clip", "fps")
        if getattr(args, k) <= 0
    ]:
        parser.error(f"--{low[0]} {getattr(args, low[0]):g} is too small")
    sys.excepthook = one_sentence
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    signal.signal(
        signal.SIGTERM, lambda *a: sys.exit(143)
    )  # so that the shard under way is removed
    paths = (find_episodes if robot else expand)([p for group in args.data for p in group])
    if os.path.realpath(args.out) in {os.path.dirname(os.path.realpath(p)) for p in paths}:
        raise ValueError(f"--out {args.out} is where the recordings are: choose another folder")
    if world > 1:
        dist.init_process_group("gloo")
    if rank == 0:
        lock(args.out)
    if world > 1:
        dist.barrier()  # until what a run that was killed left is removed
    share = paths[rank::world]
    if not robot and (urls := [p for p in paths if is_stream(p)]):
        if not args.cache_dir:
            raise ValueError(
                f"{urls[0]}: encode.py needs to seek: name a --cache_dir that shards are copied to,"
                " or copy them yourself"
            )
        [share] = cached(
            [share], args.cache_dir, args.cache_size, print if rank == 0 else lambda text: None
        )
    if args.vae:
        if args.decoder != "pyav":
            raise ValueError(f"--decoder {args.decoder}: latents are made of PyAV's pictures")
        made = {k: getattr(args, k) for k in ("vae", "fps", "crop_size", "dtype")}
        check_settings(args.out, made)
        records, bad = index_play(share)
        for line in line_warnings(records) if rank == 0 else []:
            print(f"WARNING: {line}")
        keys = [[r.key for r in records]]
        if world > 1:
            dist.all_gather_object(keys := [None] * world, keys[0])
        if twice := [k for k, n in collections.Counter(itertools.chain(*keys)).items() if n > 1]:
            raise ValueError(
                f"two shards hold a recording {twice[0]}: encode them into different --out folders"
            )
        vae = open_vae(args.vae, getattr(torch, args.dtype)).to(device)
        if rank == 0:
            write_atomically(os.path.join(args.out, SETTINGS), json.dumps(made).encode())
        encode_latents(
            records,
            bad,
            vae,
            args.out,
            args.fps,
            args.crop_size,
            max(args.batch_size // 8, 1),
            device,
        )
        print(f"rank {rank}: peak memory {peak_memory(device):.0f} MiB")
        sys.exit()
    encoder = open_encoder(args.encoder, args.crop_size, args.frames_per_clip).to(device)
    meta = {
        k: str(getattr(args, k))
        for k in ("encode", "fps", "frames_per_step", "crop_size", "frames_per_clip")
    }
    meta |= {"encoder": encoder_hash(encoder), "grid": str(args.crop_size // encoder.patch_size)}
    meta |= {"store": args.store} if args.store != "bf16" else {}
    encoder = encoder.to(dtype := getattr(torch, args.dtype))
    made = {"phases": args.phases, "dtype": args.dtype}
    if robot:
        reader = DroidReader(
            2,
            args.fps,
            args.crop_size,
            args.crop,
            args.camera or ["exterior_1"],
            args.stride,
            args.state_keys,
            args.action_keys,
        )
        meta |= {"dataset": "droid"} | settings(reader)
        plan, (names, made["folder"]) = (
            functools.partial(plan_episode, reader=reader, size=args.batch_size),
            tar_names(paths),
        )
    else:
        reader = ClipReader(
            args.frames_per_clip,
            args.fps,
            args.frames_per_step,
            args.crop_size,
            encode=args.encode,
            decoder=args.decoder,
        )
        meta |= {"action_space": "38"}
        meta |= {"decoder": args.decoder} if args.decoder != "pyav" else {}
        plan = functools.partial(
            plan_recording, reader=reader, phases=args.phases, size=args.batch_size
        )
        names = {p: os.path.basename(p.split("?")[0]) for p in paths}
    targets = {p: os.path.join(args.out, name) for p, name in names.items()}
    if len(set(targets.values())) < len(paths):
        raise ValueError(
            "two input shards have the same file name: encode them into different --out folders"
        )
    check_settings(args.out, made := meta | made)
    for path in (
        p for p in share if os.path.exists(targets[p])
    ):  # done in an earlier run, or not ours
        keys, source = (
            {r.recording for r in shard_index(targets[path])[0]},
            path.peek() if isinstance(path, Shard) else path,
        )
        theirs = (
            {e["key"] for e in index_file(path, False)[1]}
            if robot
            else {r.key for r in shard_index(source)[0]}
        )
        if foreign := keys - theirs:
            raise ValueError(
                f"{args.out} holds a {os.path.basename(path)} of other recordings ({min(foreign)}):"
                " choose another --out"
            )
    mine = [p for p in share if not os.path.exists(targets[p])]
    records, bad = (
        sources(*index_episodes(mine, reader, args.verify, print), reader, args.phases)
        if robot
        else index_play(mine)
    )
    of = {path: [*group] for path, group in itertools.groupby(records, key=lambda r: r.shard)}
    room = check_room(records, int(meta["grid"]) ** 2, encoder.embed_dim, args)
    if world > 1:
        dist.barrier()  # before rank 0 writes what the others have just looked at
    if rank == 0:
        for line in line_warnings([] if robot else records):
            print(f"WARNING: {line}")
        print(f"encoder in {args.dtype} on {device}; {chosen(device, dtype)}\nto encode: {room}")
        write_atomically(os.path.join(args.out, SETTINGS), json.dumps(made).encode())
    progress = tqdm(total=len(records), unit="recording", disable=rank > 0, desc="encode")
    groups = itertools.groupby(
        decode_ahead(records, plan, args), key=lambda x: (x[0].shard, x[0].key)
    )
    members = []
    for path in mine:

        def write_shard(out, path=path):
            with tarfile.open(fileobj=out, mode="w") as tar:
                for record in of.get(path, []):
                    encoded, flaw = encode_recording(next(groups)[1], encoder, args, device)
                    bad.extend([(record.shard, record.key, flaw)] if flaw else [])
                    for name, tensors, more in encoded:
                        data = safetensors_bytes(tensors, metadata=meta | more)
                        end = 8 + int.from_bytes(
                            data[:8], "little"
                        )  # of the header, whose keys come in random order
                        head = json.dumps(
                            json.loads(data[8:end]),
                            sort_keys=True,
                            separators=(",", ":"),
                            ensure_ascii=False,
                        ).encode()
                        data = data[:8] + head.ljust(end - 8) + data[end:]
                        member = tarfile.TarInfo(f"{record.key}@{name}.safetensors")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                        members.append(member.name)
                    progress.update()

        try:
            write_atomically(targets[path], write_shard)
        except OSError as e:
            why = f"{targets[path]} ({e.strerror or e}): the shards that are finished stay"
            raise OSError(f"{why}; mend this and run the same command again") from e
        append_jsonl(
            os.path.join(args.out, LEFT_OUT),
            [dict(zip(("file", "key", "reason"), b)) for b in bad if b[0] == path],
        )
    progress.close()
    for file, key, reason in bad:
        print(f"left out: {file} {key}: {reason}")
    if mine and not members:
        for path in mine:
            os.unlink(targets[path])
        raise ValueError(
            "nothing could be encoded, see"
            f" above{'' if robot else ' (robot episodes need --dataset droid)'}"
        )
    if os.path.exists(list_of_bad := os.path.join(args.out, LEFT_OUT)) and rank == 0:
        print(
            f"what could not be read is in {list_of_bad}; delete a shard of {args.out} to have it"
            " encoded again"
        )
    size = sum(os.path.getsize(targets[p]) for p in mine) / 2**20
    print(
        f"rank {rank} encoded {len(mine)} of {len(paths)} shards: {size:,.1f} MiB; peak memory"
        f" {peak_memory(device):.0f} MiB"
    )
    if world > 1:
        dist.destroy_process_group()
