"""Train a decoder that shows what features look like: from the features of a frozen encoder, one
step at a time, to the picture that the step ends with.

On a laptop, from feature shards and the video that they were made from:

    python train_decoder.py --data demo/features/train/*.tar --val_data demo/features/val/*.tar \\
        --video demo/train/*.tar demo/val/*.tar --crop_size 48 --fps 10 --picture_size 96 \\
        --feature_norm standardize --epochs 4 --ipe 100 --pixels_cache out/pixels

On 8 GPUs, from video, with the released ViT-L:

    torchrun --nproc_per_node=8 --max_restarts=3 train_decoder.py --data VPT/*.tar --resume

From robot episodes, which train_lora.py reads as well:

    python train_decoder.py --dataset droid --data droid/*.tfrecord* --encoder vjepa2_ac_vitg

The encoder never sees the decoder. Features get noise in training, so that predictions decode, too.
Reads feature shards of play and their video, or with --encoder video alone (VPT shards, plain video
without lines, robot episodes). Writes to --out_dir: train.csv, val.csv, curves.png, pictures.png
(recorded above decoded, on held-out recordings), bad_clips.jsonl, args.json and checkpoints.
eval.py shows what a predictor predicts with it. You can stop it at any time and continue with
--resume."""

import argparse
import contextlib
import functools
import gc
import importlib.util
import math
import os
import re
import sys
import time


# --- flags --- (same in every train_*.py)
class Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, then the flags, with the default of each that has one."""

    def _get_help_string(self, action):
        # no default to show: there is none, or it is just "off", or the text names it already
        unset = action.default in (None, argparse.SUPPRESS) or action.default is False
        if unset or "(default" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"

    def _format_action_invocation(self, action):
        """The first spelling only: the others are old names, and names in other people's guides."""
        # a switch can also be turned off: --compile, --no-compile
        names = action.option_strings
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{names[0]}, --no-{names[0][2:]}"
        # one spelling, or -h with --help: argparse's own line will do
        if len(names) < 2 or "--help" in names:
            return super()._format_action_invocation(action)

        # many spellings: argparse would repeat the placeholder after each of them
        return f"{names[0]} {self._format_args(action, names[0][2:].upper())}"


# no abbreviations: --val must not mean --val_data today and another flag next year
parser = argparse.ArgumentParser(
    description=__doc__, usage="%(prog)s [flags]", formatter_class=Help, allow_abbrev=False
)

# a flag that can be given as --NAME or --no-NAME
switch = argparse.BooleanOptionalAction

# CPUs that this process may use: a container or SLURM may allow fewer than the machine has
cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# --- flags of this stage ---
flag = parser.add_argument_group("data").add_argument
# what to train on, and what to hold out
flag("--dataset", default="vpt", choices=["vpt", "droid"], help="gameplay shards or plain video, or robot episodes")  # fmt: skip
flag("--data", "--data_path", nargs="+", action="append", help="training shards, videos or episodes: paths, globs, {a..b} ranges; may be repeated (default: VPT/*.tar)")  # fmt: skip
flag("--data_weights", type=float, nargs="+", help="share of the clips from each --data (default: by length)")  # fmt: skip
flag("--val_data", nargs="+", action="append", help="held-out shards or videos; may be repeated (default: --val_fraction of --data)")  # fmt: skip
flag("--val_fraction", type=float, default=0.1, help="share of the shards held out (below ten shards: of the recordings)")  # fmt: skip
flag("--val_clips", type=int, default=128, help="held-out clips to validate on; 0 turns validation off")  # fmt: skip
flag("--recordings", metavar="FILE", help="take only these recordings of --data: a file of names, one a line")  # fmt: skip
# pictures: the frames that features were made from
flag("--video", nargs="+", help="shards of video that the features were made from, those of --val_data included")  # fmt: skip
flag("--picture_size", type=int, help="side of the decoded picture in pixels (default: --crop_size)")  # fmt: skip
flag("--every_frame", action=switch, default=False, help="decode every frame of a step, not its last one alone")  # fmt: skip
flag("--pixels_cache", help="decode each recording once into this folder; its frames take picture x picture x 3 bytes each")  # fmt: skip
# a clip: by default 16 frames in 3.2 s, which are 8 steps of two frames
flag("--frames_per_clip", type=int, default=16, help="sampled frames of a clip")
flag("--fps", type=float, default=5.0, help="sampled frames a second (droid: 4)")
flag("--frames_per_step", type=int, default=2, help="sampled frames a step (droid: 1)")
flag("--crop_size", type=int, default=256, help="pixels of the square crop that the encoder sees")
# how it is read
flag("--video_decoder", default="pyav", choices=["pyav", "decord"], help="what reads video; --decoder of other programs")  # fmt: skip
flag("--num_workers", type=int, default=min(8, cpus), help="loader processes of each rank; the default is the usable CPUs, at most 8")  # fmt: skip
flag("--max_bad_fraction", type=float, default=0.01, help="stop if more than this share of clips cannot be read (after 100 clips)")  # fmt: skip

flag = parser.add_argument_group("robots (--dataset droid)").add_argument
# as in train_lora.py: how a clip is cut, and seen by which camera
flag("--stride", type=int, help="rows between sampled frames in place of --fps; 15 is Meta's on raw DROID")  # fmt: skip
flag("--crop", default="reference", choices=["reference", "square"], help="reference: the centre, at most 1.35:1, squeezed to a square as Meta does")  # fmt: skip
flag("--camera", "--camera_view", nargs="+", action="extend", help="cameras; each clip draws one of them (default: exterior_1)")  # fmt: skip
# which parts of an episode are used: what is held out depends on it, too
flag("--idle_filter", default="light", choices=["off", "openpi", "light"], help="leave out stretches without motion (droid.py)")  # fmt: skip
flag("--success", default="all", choices=["all", "only"], help="only: leave out failed episodes")
# a robot whose actions are no poses of a gripper: its clips are not read without them
flag("--state_keys", nargs="+", action="extend", help="fields of the state (default: the 7-D pose); other ones need --action_keys")  # fmt: skip
flag("--action_keys", nargs="+", action="extend", help="fields of the action (default: differences of the pose)")  # fmt: skip

flag = parser.add_argument_group("model and loss").add_argument
# the encoder is frozen; these say what it is and what it sees
flag("--encoder", "--encoder_path", help="weights of the frozen encoder, for video: a path, URL or name, or vit_tiny, random weights (default: vjepa2_vitl; droid: vjepa2_ac_vitg)")  # fmt: skip
flag("--encode", default="tubelet", choices=["tubelet", "frame", "clip"], help="what the encoder sees at once: the frames of a step, one frame, or the whole clip (droid: frame)")  # fmt: skip
flag("--feature_norm", default="layer", choices=["layer", "standardize"], help="that of the predictor whose predictions will be decoded")  # fmt: skip
# size of the decoder
flag("--width", type=int, default=192, help="width of the decoder's blocks, and of its convolutions at the patch grid")  # fmt: skip
flag("--depth", type=int, default=2, help="transformer blocks of the decoder")
flag("--num_heads", type=int, default=4, help="attention heads of the decoder")
flag("--least_width", type=int, default=48, help="channels of its last convolutions; every doubling of the grid halves the channels down to this")  # fmt: skip
# what it learns: pictures, or the latents of somebody's autoencoder for pictures
flag("--vae", help="learn latents of this image autoencoder: diffusers:FOLDER or taesd:FOLDER (default: pixels)")  # fmt: skip
flag("--noise", type=float, default=0.8, help="features get noise of a std from 0 to this in training; their own is 1")  # fmt: skip
flag("--gradient", type=float, default=1.0, help="weight of the error of the picture's gradients; 0 is off")  # fmt: skip
flag("--lpips", help="also train on and report LPIPS: NVIDIA's vgg16.pt, a TorchScript file")
flag("--lpips_weight", type=float, default=0.1, help="weight of LPIPS; 0 only reports it")
# less memory, more speed
flag("--activation_checkpointing", "--use_activation_checkpointing", "--gradient_checkpointing", action=switch, default=False, help="recompute blocks in the backward pass to save memory")  # fmt: skip
flag("--compile", "--compile_model", action=switch, default=False, help="torch.compile the decoder and the encoder")  # fmt: skip

flag = parser.add_argument_group("optimizer").add_argument
# a step takes --batch_size x --grad_accum x ranks clips, and all steps of each
flag("--batch_size", "--per_device_batch_size", type=int, default=16, help="clips per rank and micro-batch")  # fmt: skip
flag("--grad_accum", "--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step")  # fmt: skip
# length of the run; an epoch is --ipe steps, however much data there is
flag("--epochs", "--num_epochs", type=int, default=50, help="epochs of --ipe steps")
flag("--ipe", type=int, default=300, help="steps of an epoch")
flag(
    "--max_steps",
    type=int,
    help="stop after this many steps; the learning rates stay those of the whole run",
)
# learning rate: warm-up from --start_lr, constant --lr, anneal to --final_lr
flag("--lr", "--learning_rate", type=float, default=1e-3, help="learning rate between warm-up and anneal")  # fmt: skip
flag("--start_lr", type=float, default=0.0, help="learning rate at the start of the warm-up")
flag("--final_lr", type=float, default=0.0, help="learning rate of the last step")
flag("--warmup", type=int, default=1, help="epochs of linear warm-up")
flag("--anneal", type=int, default=2, help="epochs of linear anneal at the end")
# AdamW
flag("--weight_decay", type=float, default=0.04, help="AdamW decay of matrices")
flag("--grad_clip", "--gradient_clipping", type=float, default=1.0, help="largest gradient norm; 0 turns clipping off")  # fmt: skip
flag("--dtype", choices=["bfloat16", "float16", "float32"], help="autocast precision (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip

flag = parser.add_argument_group("run").add_argument
# checkpoints, and how to continue from them
flag("--out_dir", default="out/decoder", help="folder of this run")
flag("--resume", action=switch, default=False, help="continue from the newest good checkpoint in --out_dir, if there is one")  # fmt: skip
flag("--save_every_freq", type=int, default=25, help="epochs between checkpoints that are kept for good")  # fmt: skip
flag("--keep_last", type=int, default=2, help="newest checkpoints to keep beside those (one is written each epoch)")  # fmt: skip
# what it reports, and how often
flag("--val_every", type=int, default=1, help="epochs between validations")
flag("--log_every", "--log_every_n_steps", type=int, default=10, help="steps between log lines")
# the same seed gives the same weights, the same order of clips and the same noise
flag("--seed", type=int, default=239, help="seed of weights, clip order and noise")
flag("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
flag("--peak_tflops", type=float, help="TFLOP/s that the device can reach in --dtype, for MFU in the log (default: from its data sheet, for A100, H100 and a few more)")  # fmt: skip
# extras
flag("--wandb_project", help="also log to Weights & Biases (pip install wandb)")
flag("--dry_run", action=switch, default=False, help="check everything, run three steps, write nothing")  # fmt: skip

# flags of one dataset only
OF_PLAY = ["data_weights", "recordings", "frames_per_step", "video", "video_decoder"]
OF_PLAY += ["pixels_cache"]
OF_ROBOTS = ["stride", "crop", "camera", "idle_filter", "success", "state_keys", "action_keys"]

if __name__ == "__main__":
    # tests and loader processes import this file without our flags
    args = parser.parse_args()
    robots = args.dataset == "droid"
    if robots:
        # a step is one frame; the flags are read again over these defaults
        parser.set_defaults(fps=4.0, frames_per_step=1, encode="frame")
        args = parser.parse_args()

# heavy imports come after parsing: --help answers at once
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# ours: model.py is the model and its losses, data.py makes batches of recordings, weights.py
# opens other people's weights, checkpoint.py saves and finds those of this run
import checkpoint
import weights
from data import (
    Clips,
    PicturedClips,
    StopSignal,
    collate,
    fill_pixels_cache,
    holds_play,
    open_films,
    open_split,
    prefetch,
    read_names,
    vpt_loader,
    windows,
)
from droid import DroidClips, DroidReader, find_episodes, open_droid
from evaluation.decoded import (
    PICTURES,
    Pictures,
    decoded_rows,
    picture_summary,
    plot_decoder_curves,
    plot_pictures,
)
from evaluation.pictures import find_videos
from files.films import FilmReader, film_paths
from files.logs import (
    StepRow,
    append_jsonl,
    bytes_text,
    changed_flags,
    check_finite,
    count_text,
    eta,
    log_line,
    mean_over_ranks,
    open_logs,
    train_row,
)
from files.vpt import ClipReader
from kernels.flops import forward_flops, peak_to_assume
from model import DecoderModel, PictureDecoder, channel_stats, make_features_of
from weights import decoder_of, open_source


# --- helpers ---
def lr_at(step, total_steps, warmup, anneal, start_lr, lr, final_lr):
    """Learning rate of a step (from 1): `warmup` steps of linear warm-up, constant, and a linear
    anneal over the last `anneal` steps (vjepa2 schedulers.py)."""
    # 1) warm-up: Adam's moments are still rough, so the first steps are smaller
    if step < warmup:
        return start_lr + step / warmup * (lr - start_lr)

    # 2) constant: a longer run begins in the same way
    anneal_begins = total_steps - anneal
    if step < anneal_begins:
        return lr

    # 3) anneal: ever smaller steps average out the noise of single batches
    return lr + (step - anneal_begins) / max(anneal, 1) * (final_lr - lr)


if __name__ == "__main__":
    # what the user can fix is printed as one line, everything else as a traceback
    sys.excepthook = checkpoint.short_excepthook

    # wrong flags end the run here, before anything is read or written
    for name in ("batch_size", "grad_accum", "epochs", "ipe", "log_every", "val_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is too small: use 1 or more")

    # weights of losses, and noise
    for name in ("noise", "gradient", "lpips_weight"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)} is negative: 0 turns it off")

    # SSIM, which validation prints, looks at windows of 11 pixels
    if (args.picture_size or args.crop_size) < 11:
        parser.error(f"--picture_size {args.picture_size or args.crop_size} is too small: from 11")

    # the schedule must fit into the run
    if args.warmup + args.anneal > args.epochs:
        parser.error(
            f"--warmup {args.warmup} and --anneal {args.anneal} do not fit into --epochs"
            f" {args.epochs}"
        )

    # LPIPS compares pictures, and with --vae the decoder makes latents
    if args.vae and args.lpips:
        parser.error("--lpips compares pictures, and --vae learns latents: give one of them")

    # a flag of the other dataset would do nothing
    for name in OF_PLAY if robots else OF_ROBOTS:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --dataset {'vpt' if robots else 'droid'}")
    if robots and not args.data:
        parser.error("--dataset droid needs --data: episodes, folders of them, or URLs")

    # W&B is optional; say now that it is missing, not after minutes of reading
    if args.wandb_project and not importlib.util.find_spec("wandb"):
        parser.error("--wandb_project needs the package wandb: pip install wandb")

    # --- distributed --- (same in every train_*.py)
    # torchrun sets these three; without it the run is one process, rank 0 of 1
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def print0(*parts, sep=" "):
        """Print on rank 0, at once."""
        if rank == 0:
            print(*parts, sep=sep, flush=True)

    # a GPU if there is one, otherwise the CPU
    if args.device and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device {args.device} is none of cpu, cuda and cuda:N")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"--device {args.device}: PyTorch finds no GPU here")

        # the ranks of a node share its GPUs: each takes that of its local rank
        if device.index is None:
            device = torch.device("cuda", local_rank)
        elif world > 1:
            parser.error(f"--device {args.device} is one GPU, and this run has {world} processes")

        # TF32 is much faster, and bfloat16 autocast has fewer bits still
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True

    # gradients go through NCCL between GPUs; the stop signal and log values are on the CPU: gloo
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    # every rank initialises the same weights
    torch.manual_seed(args.seed)

    # weights stay in float32, autocast computes in args.dtype
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    autocast = functools.partial(
        torch.autocast, device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"
    )

    # --- data ---
    # what is quick to check comes first. A new run must not write over an earlier one
    if not args.resume and not args.dry_run:
        checkpoint.check_unused(args.out_dir)

    # --val_data takes the place of a split of --data; --val_clips 0 turns both off
    data = args.data or [["VPT/*.tar"]]
    val_data = args.val_data if args.val_clips else None
    val_fraction = args.val_fraction if args.val_clips and not args.val_data else 0.0

    # a pattern or a path without a file is an error now, not after the model is built
    find_files = find_episodes if robots else film_paths
    paths = [find_files(group) for group in [*data, *(val_data or [])]]
    only = None if args.recordings is None else read_names(args.recordings)
    vae = weights.open_picture_vae(args.vae).to(device) if args.vae else None
    lpips = weights.Lpips(args.lpips).to(device) if args.lpips else None

    # one process at a time may write to the folder
    if rank == 0 and not args.dry_run:
        checkpoint.lock(args.out_dir)
    print0(f"reading {count_text(len(sum(paths, [])), 'file')}")
    groups = paths[: len(data)]
    val_data = paths[len(data) :] or None

    # a clip: how it is cut and seen; shards of features must have been made in the same way
    clip_settings = {
        "fps": args.fps,
        "frames_per_step": args.frames_per_step,
        "crop_size": args.crop_size,
        "frames_per_clip": args.frames_per_clip,
    }

    # shards of play have lines, plain video and robots have none. All 38 dims of an action:
    # features are compared with the video that they were made from
    is_play = not robots and holds_play(sum(paths, []))
    if robots:
        reader = DroidReader(
            args.frames_per_clip,
            args.fps,
            args.crop_size,
            args.crop,
            args.camera or ["exterior_1"],
            args.stride,
            args.state_keys,
            args.action_keys,
        )
    elif is_play:
        reader = ClipReader(
            **clip_settings, encode=args.encode, decoder=args.video_decoder, action_space=38
        )
    else:
        if args.video_decoder != "pyav":
            raise ValueError("--video_decoder is for shards of play: plain video is read by PyAV")
        reader = FilmReader(**clip_settings)

    # recordings are held out whole: clips of one recording resemble each other
    if robots:
        train, val, bad = open_droid(
            sum(groups, []),
            val_data and sum(val_data, []),
            val_fraction,
            reader,
            idle_filter=args.idle_filter,
            success=args.success,
            max_bad_fraction=args.max_bad_fraction,
            log=print0,
        )
        shares = None
    else:
        open_data = open_split if is_play else functools.partial(open_films, reader=reader)
        train, shares, val, bad = open_data(
            groups,
            data_weights=args.data_weights,
            val_data=val_data,
            val_fraction=val_fraction,
            max_bad_fraction=args.max_bad_fraction,
            only=only,
        )
    if bad:
        print0(
            f"{count_text(len(bad), 'recording')} cannot be used, {' '.join(bad[0])} among them;"
            " all are listed in bad_clips.jsonl"
        )
    if not train:
        raise ValueError("streams are read once, from front to back: copy the shards to files")

    # training goes ahead without validation, but then nothing shows how pictures will look
    if args.val_clips and not val:
        print0(
            "WARNING: nothing to validate on: a single recording cannot be split; pass --val_data"
        )

    # features need the video they were made from; pictures of video are its own frames, which
    # can be made smaller but not larger
    size = args.picture_size or args.crop_size
    has_features = "safetensors" in train[0].members
    if robots and has_features:
        raise ValueError(
            f"{train[0].shard} holds features of a robot: a decoder is trained on the episodes that"
            " they were made from"
        )
    if has_features and not args.video:
        raise ValueError(
            f"{train[0].shard} holds features: name the shards of video that they were made from"
            " with --video"
        )
    if not has_features and size > args.crop_size:
        raise ValueError(
            f"--picture_size {size} is larger than --crop_size {args.crop_size}: pictures of that"
            " size need stored features (encode.py) and --video"
        )

    # stored frames: of the pictures, or of what the encoder sees
    videos = find_videos(args.video, train + val) if args.video else {}
    decoder_name = None
    if not robots:
        decoder_name = decoder_of(train + val, args.video_decoder, "--video_decoder")
        reader.decoder = decoder_name
    if args.pixels_cache and not is_play:
        raise ValueError("--pixels_cache is for shards of play: drop the flag for plain video")
    if args.pixels_cache:
        fill_pixels_cache(
            list(videos.values()) if has_features else train + val,
            args.pixels_cache,
            size if has_features else args.crop_size,
            decoder_name,
            args.num_workers,
            rank,
            world,
        )

    def clips_of(records, shares):
        """A dataset of these records."""
        if robots:
            return DroidClips(records, reader, args.seed)
        if not has_features:
            return Clips(records, shares, reader, args.seed, args.pixels_cache)
        return PicturedClips(
            records, shares, reader, videos, size, args.every_frame, args.seed, args.pixels_cache
        )

    # validation sees each clip once, in the same order whatever the number of ranks
    train_set = clips_of(train, shares)
    val_set = clips_of(val, [1.0] * len(val))

    # --- model ---
    # the frozen encoder; shards of features need none
    name = args.encoder or ("vjepa2_ac_vitg" if robots else None)
    encoder, feature_source = open_source(train + val, name, encode=args.encode, **clip_settings)
    if encoder is not None:
        encoder.to(device, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)

    # what the decoder gives: three channels for each frame of a step, or the latents of these
    frames = args.frames_per_step if args.every_frame else 1
    channels = 3 * frames
    target_size = size
    if vae is not None:
        channels = vae.channels * frames
        target_size = size // vae.factor
        if size % vae.factor:
            raise ValueError(
                f"--picture_size {size} is no multiple of {vae.factor}, as --vae needs"
            )

    # one step at a time: a picture shows one moment
    decoder_size = {
        "embed_dim": feature_source["embed_dim"],
        "grid": feature_source["grid"],
        "channels": channels,
        "size": target_size,
        "width": args.width,
        "depth": args.depth,
        "num_heads": args.num_heads,
        "least_width": args.least_width,
    }
    decoder = PictureDecoder(**decoder_size).to(device)
    decoder.activation_checkpointing = args.activation_checkpointing

    # one forward gives all losses: DDP synchronises the gradients of a single forward
    model = DecoderModel(decoder, args.noise, lpips)
    num_parameters = sum(p.numel() for p in decoder.parameters())
    print0(
        f"decoder {num_parameters:,} parameters; {feature_source['grid']}x{feature_source['grid']}"
        f" patches x {feature_source['embed_dim']} to {frames} x {size}x{size} pixels; encoder"
        f" {feature_source['encoder_hash']}"
    )

    # batch -> features, on the device. The means and stds of the feature channels are filled in
    # below, from the checkpoint or by measuring, for --feature_norm standardize
    feature_stats = {"mean": None, "std": None}
    features_of = make_features_of(
        encoder, args.encode, args.frames_per_step, feature_stats, device, autocast
    )

    # batch -> pictures in [0, 1], and pictures <-> what the decoder gives
    pictures = Pictures(size, args.frames_per_step, args.encode, args.every_frame, vae, device)

    # MFU in the log is the share of this that training reaches; None: not known
    peak = peak_to_assume(device, args.dtype, args.peak_tflops, print0)
    step_flops = None

    # --- optimizer, resume ---
    # weight decay on matrices only: biases and norms should not shrink
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim <= 1]
    param_groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]

    # Meta's betas; fused: one kernel for all parameters
    optimizer = torch.optim.AdamW(
        param_groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True
    )

    # float16 would lose small gradients: the loss is scaled up for them; otherwise a no-op
    loss_scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

    # steps done so far, those before a restart included
    step = 0
    total_steps = args.epochs * args.ipe

    # what a resumed run must have in common with its checkpoint: otherwise the weights load and
    # mean something else
    must_match = {
        **feature_source,
        "picture_decoder": decoder_size,
        "picture_size": size,
        "every_frame": args.every_frame,
        "vae": args.vae,
        "decoder": decoder_name,
        "encode": args.encode,
        **clip_settings,
        # None: play
        "stride": args.stride,
        "crop": args.crop if robots else None,
        "feature_norm": args.feature_norm,
        "noise": args.noise,
        "ipe": args.ipe,
    }

    # resume from the newest checkpoint that is whole; without any, --resume starts a new run
    state = None
    path = None
    if args.resume:
        state, path = checkpoint.load_latest(args.out_dir)
    if state is not None:
        for name, value in must_match.items():
            if state.get(name) != value:
                raise ValueError(
                    f"{path} was trained with {name} {state.get(name)}, this run has {value}:"
                    " resume with the same, or start a new run in another --out_dir"
                )

        # the next step will be the one that would have come without the interruption
        decoder.load_state_dict(state["picture_decoder_weights"])
        optimizer.load_state_dict(state["optimizer"])
        loss_scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        for name, value in state["feature_stats"].items():
            feature_stats[name] = None if value is None else value.to(device)
        step = state["epoch"] * args.ipe + state["itr"]
        print0(
            f"resumed from {path} at epoch {state['epoch']}, itr {state['itr']};",
            changed_flags(state["args"], vars(args)),
        )

    # a new run measures the channels on 256 clips, as train_ac.py does on the same data, and the
    # mean picture on 64, because the decoder starts there; the ranks share the clips
    else:

        def sample(count):
            """Batches of up to `count` training clips, a share of them for each rank."""
            for items in windows(train_set, args.batch_size, count, rank, world):
                yield collate([train_set[i] for i in items])

        if args.feature_norm == "standardize":
            raw = (features_of(batch, normalize=False)[0] for batch in sample(256))
            feature_stats |= channel_stats(raw, feature_source["embed_dim"], device)
        targets = (pictures.targets(batch).flatten(1)[None, :, None] for batch in sample(64))
        mean = channel_stats(targets, decoder.mean.numel(), device)["mean"]
        decoder.mean.copy_(mean.view_as(decoder.mean))

    # how far this run goes: the schedule's end, --max_steps, or three steps to try it
    last_step = min(total_steps, args.max_steps or total_steps)
    if args.dry_run:
        last_step = min(last_step, step + 3)
    next_command = f"python eval.py --checkpoint RUN --decoder {args.out_dir}"

    # a finished job that SLURM starts again must end well
    if step >= last_step:
        print0(f"nothing left to do: {step} steps are done; see predictions with: {next_command}")
        if world > 1:
            dist.destroy_process_group()
        sys.exit()

    # the shapes of training never change: compile for these alone
    if args.compile:
        decoder.compile(dynamic=False)
        if encoder is not None:
            encoder.compile(dynamic=False)

    # DDP averages gradients over the ranks; as views of its buckets they need no second copy. The
    # mean picture is the same on all ranks and stays
    ddp = model
    if world > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    # columns of train.csv and val.csv; a resumed run drops rows after its checkpoint
    losses_of_a_row = ["l1_loss", "gradient_loss", "lpips_loss"]
    loss_weights = [1.0, args.gradient, args.lpips_weight if args.lpips else 0.0]
    loss_weights = torch.tensor(loss_weights, device=device)
    train_columns = ["epoch", "itr", *losses_of_a_row, "total_loss", "lr", "grad_norm"]
    train_columns += ["clips_per_s", "data_wait", "memory_mib", "bytes_per_s", "mfu"]
    val_columns = ["epoch", *losses_of_a_row, *PICTURES]
    headers = {
        "train": (train_columns, *divmod(step, args.ipe)),
        "val": (val_columns, *divmod(step, args.ipe)),
    }

    # rank 0 writes; the id in the checkpoint continues the same W&B run
    wandb_id = (state or {}).get("wandb_id") or os.urandom(4).hex()
    writes = rank == 0 and not args.dry_run
    writer = checkpoint.Writer()
    log = None
    if writes:
        log = open_logs(
            args.out_dir, headers, vars(args), state is not None, args.wandb_project, wandb_id
        )

    # what a judge of the checkpoint must know, by names that stay when a flag is renamed
    settings = {
        "stage": "decoder",
        "dataset": args.dataset,
        "data": data,
        "val_data": args.val_data,
        "recordings": only,
        "val_fraction": args.val_fraction,
        "val_clips": args.val_clips,
        "video": args.video,
        "encode": args.encode,
        **clip_settings,
        "decoder": decoder_name,
        "encoder": args.encoder,
        "feature_norm": args.feature_norm,
        "noise": args.noise,
        "gradient": args.gradient,
        "lpips": args.lpips,
        "dtype": args.dtype,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "grad_accum": args.grad_accum,
    }

    def note_bad(clips):
        """Clips that could not be read go into bad_clips.jsonl."""
        if not args.dry_run:
            rows = [dict(zip(("file", "key", "reason"), clip)) for clip in clips]
            append_jsonl(f"{args.out_dir}/bad_clips.jsonl", rows)

    def save(epoch, itr):
        """Write a checkpoint and the curves (rank 0)."""
        # all that --resume, eval.py and play need
        state = {
            "format": checkpoint.FORMAT,
            "settings": settings,
            "picture_decoder_weights": decoder.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": loss_scaler.state_dict(),
            "epoch": epoch,
            "itr": itr,
            "lr": args.lr,
            "batch_size": args.batch_size,
            "world_size": world,
            "args": vars(args),
            "rng": torch.get_rng_state(),
            "feature_stats": feature_stats,
            "held_out": sorted({record.name for record in val}),
            "wandb_id": wandb_id,
            **must_match,
        }

        # written in a thread while training continues. The write is atomic: a run that is killed
        # keeps its previous checkpoint
        path = writer.save(args.out_dir, state, epoch, itr, args.keep_last, args.save_every_freq)
        plot_decoder_curves(args.out_dir, args.ipe)
        return path

    def validate(epoch):
        """Errors of decoded pictures on the held-out clips of all ranks, beside a copy of the step
        before and the mean picture: (a row of val.csv, a line about it)."""
        # each rank decodes a share of the clips and gets the results of all
        rows, shown, failed = decoded_rows(
            model,
            val_set,
            features_of,
            pictures,
            args.batch_size,
            args.val_clips,
            args.num_workers,
            autocast,
        )
        note_bad(failed)

        # the first picture of several recordings, recorded above decoded
        if writes:
            plot_pictures(os.path.join(args.out_dir, "pictures.png"), shown)
        row, text = picture_summary(rows)
        return {"epoch": epoch} | row, text

    # --- train ---
    # SLURM's SIGTERM and Ctrl-C: the loop ends its step and saves
    stop = StopSignal()
    if not args.dry_run:
        stop.listen()

    # the loader starts where the checkpoint stopped: the order of clips depends on the seed alone
    loader = vpt_loader(
        train_set,
        args.batch_size,
        num_workers=args.num_workers,
        batches_per_epoch=args.ipe * args.grad_accum,
        epoch=step // args.ipe,
        itr=step % args.ipe * args.grad_accum,
        rank=rank,
        world=world,
        pin_memory=device.type == "cuda",
    )
    note_bad(bad if rank == 0 else [])

    # the next batch is copied to the GPU while this one is computed on
    batches = prefetch(loader, device)

    # how many clips were read, and which of them could not be
    clips_seen = 0
    bad_clips = []

    # what the next log line is about
    steps_to_log = []  # a StepRow for each step since the last log line
    data_seconds = 0.0
    log_started = time.perf_counter()

    while step < last_step:
        epoch, itr = divmod(step, args.ipe)

        # the rate depends on the step alone, so a resumed run follows the same curve
        lr = lr_at(
            step + 1,
            total_steps,
            args.warmup * args.ipe,
            args.anneal * args.ipe,
            args.start_lr,
            args.lr,
            args.final_lr,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward and backward, over --grad_accum micro-batches
        losses = torch.zeros(len(losses_of_a_row), device=device)
        keys = []
        bytes_read = 0
        for micro in range(args.grad_accum):
            # how long the GPU waits for data is a column of train.csv: data_wait
            asked = time.perf_counter()
            batch, halt = stop.next_batch(batches, world)
            data_seconds += time.perf_counter() - asked
            if halt:
                break
            if batch is None:
                raise ValueError(f"rank {rank} got no clip: use fewer workers")

            # a few clips may be bad, but not many
            note_bad(batch["bad"])
            keys += batch["key"]
            bytes_read += batch["bytes"]
            bad_clips += batch["bad"]
            clips_seen += len(batch["key"]) + len(batch["bad"])
            if clips_seen >= 100 and len(bad_clips) > args.max_bad_fraction * clips_seen:
                raise ValueError(
                    f"{len(bad_clips)} of {clips_seen} clips cannot be read, the last one is"
                    f" {' '.join(bad_clips[-1])}; see bad_clips.jsonl"
                )

            # DDP averages gradients once a step: on the last micro-batch
            last_micro = micro == args.grad_accum - 1
            with contextlib.nullcontext() if last_micro or world == 1 else ddp.no_sync():
                z = features_of(batch)[0].flatten(0, 1)  # (B*T, N, E)
                targets = pictures.targets(batch)

                # other noise in every step and on every rank, the same after a restart
                noise_seed = ((args.seed + step) * args.grad_accum + micro) * world + rank
                with autocast():
                    parts = ddp(z, targets, seed=noise_seed)
                loss = (parts * loss_weights).sum() / args.grad_accum
                loss_scaler.scale(loss).backward()

            # once, for MFU: encoder and VAE only go forward; the decoder's backward pass takes twice
            # as much as its forward pass. LPIPS is frozen and sees two pictures; its backward pass
            # goes through the decoded one alone, so it takes half as much as its forward pass
            if peak and not step_flops:
                decoder_flops = forward_flops(model.decoder, z)
                lpips_flops = forward_flops(model, z, targets) - decoder_flops
                flops = 3 * decoder_flops + 1.5 * lpips_flops
                flops += forward_flops(features_of, batch) + forward_flops(pictures.targets, batch)
                step_flops = args.grad_accum * flops

            # a mean over micro-batches, left on the GPU: reading it here would wait
            losses += parts.detach() / args.grad_accum

        # a signal that came while it waited for clips: what there is of this step is dropped
        if not halt:
            # clip the gradient; with inf its norm is only measured, for the log
            loss_scaler.unscale_(optimizer)
            max_norm = args.grad_clip or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

            # step; in float16 a step with overflowed gradients is skipped
            loss_scaler.step(optimizer)
            loss_scaler.update()
            optimizer.zero_grad(set_to_none=True)

            # tensors go into the row as they are; the next log line reads them
            steps_to_log.append(StepRow(epoch, itr, lr, losses, grad_norm, keys, bytes_read))
            step += 1

            # a signal may reach the ranks in different steps: they must agree where to stop
            halt = stop.agreed(world)

        # save at the end of each epoch and wherever the run ends
        epochs_done, inside = divmod(step, args.ipe)
        must_save = inside == 0 or step == last_step or halt

        # a checkpoint that could not be written ends the run
        writer.check()

        # once in a while: read the losses back, check them, log them
        # (a row for every step since the last time)
        if steps_to_log and (must_save or step % args.log_every == 0):
            seconds = (time.perf_counter() - log_started) / len(steps_to_log)
            wait = data_seconds / len(steps_to_log)
            memory = checkpoint.peak_memory(device)
            mfu = step_flops / seconds / peak if peak else None
            for row in mean_over_ranks(steps_to_log, world, torch.float64):
                total = sum(w * x for w, x in zip(loss_weights.tolist(), row.losses))
                place = f"epoch {row.epoch}, itr {row.itr}"
                check_finite(row, total, place, args.out_dir, args.dtype)
                columns = train_row(row, losses_of_a_row, seconds, wait, world, memory, mfu)
                columns["total_loss"] = total
                columns["bytes_per_s"] = row.bytes_read / seconds
                if writes:
                    log("train", columns, row.epoch * args.ipe + row.itr)

            # the terminal shows the last of these steps
            place = f"epoch {epochs_done:3d} itr {inside:4d}"
            text = f"l1 {columns['l1_loss']:.4f}  gradient {columns['gradient_loss']:.4f}"
            if args.lpips:
                text += f"  lpips {columns['lpips_loss']:.4f}"
            print0(log_line(place, text, columns, (last_step - step) * seconds, device))

            # start the next stretch
            steps_to_log = []
            data_seconds = 0.0
            log_started = time.perf_counter()

        # once an epoch: validate (all ranks), save (rank 0)
        if must_save:
            # after a signal there is no time to validate: SLURM ends the job soon
            due = epochs_done % args.val_every == 0 or step == last_step
            if val and due and (inside == 0 or args.dry_run) and not halt:
                row, text = validate(epochs_done)
                if writes:
                    log("val", row, step)
                place = f"{step} steps" if inside else f"epoch {epochs_done}"
                print0(f"held out after {place}: {text}")
            if writes:
                path = save(epochs_done, inside)

            # validating and saving do not count as training time
            log_started = time.perf_counter()

        # stopped by a signal: all is saved
        if halt:
            break

    # the last checkpoint is on the disk, or an error says why not
    writer.wait()

    # what was done, and what to do next
    print0(f"peak memory {checkpoint.peak_memory(device):.0f} MiB")
    if args.dry_run:
        # what to know before renting GPUs: hours, memory, disk
        shapes = [f"{k} {tuple(v.shape)}" for k, v in batch.items() if isinstance(v, torch.Tensor)]

        # checkpoints on the disk at the end: the last ones, and those kept for good
        checkpoints = args.keep_last
        if args.save_every_freq:
            checkpoints += args.epochs // args.save_every_freq
        print0(
            f"dry run, nothing written; {count_text(len(train), 'recording')} to train on,"
            f" {len(val)} held out, {len(bad)} unusable; a batch: {' '.join(shapes)}"
        )
        print0(
            f"{total_steps} steps x {seconds:.2f} s here make {eta(total_steps * seconds)};"
            f" {bytes_text(memory * 2**20)} of memory at the peak"
        )

        # bytes: weights and two moments of Adam, 4 each
        with_adam = 12 * num_parameters
        print0(checkpoint.disk_text(args.out_dir, checkpoints, with_adam))

        # the next command
        print0("to train, run the same command without --dry_run")
    elif halt:
        print0(
            f"stopped at epoch {epochs_done}, itr {inside}; saved {path}; continue with --resume"
        )
    else:
        print0(
            f"{step} of {total_steps} steps done; saved {path}; see predictions with:"
            f" {next_command}"
        )

    # --- end --- (same in every train_*.py)
    # all ranks leave together; a process that just exits can hang the others
    if world > 1:
        del ddp  # its threads must end before Python does (pytorch/pytorch#190489)
        gc.collect()
        dist.destroy_process_group()
