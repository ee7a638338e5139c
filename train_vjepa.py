"""Train a video encoder on your own video, without labels: V-JEPA 2's masked pretraining, new or
continued from released weights.

On a laptop, an encoder for the demo:

    python train_vjepa.py --data demo/train/*.tar --val_data demo/val/*.tar --fps 10 \\
        --encoder_arch vit_tiny --crop_size 64 --pred_dim 128 --pred_depth 3 --pred_heads 4 \\
        --epochs 10 --ipe 100 --warmup 1 --anneal 3 --batch_size 32 --lr 1e-3 \\
        --scaler demo/scaler.pkl --idm 1 --variance 1 --covariance 0.04 --pixels_cache out/pixels

On 8 GPUs, a ViT-L from scratch, or from Meta's file with --init_from vitl.pt:

    torchrun --nproc_per_node=8 --max_restarts=3 train_vjepa.py --data VPT/*.tar --resume

Reads shards of play, or plain video without any lines (files, folders, tars). Writes to --out_dir:
train.csv, val.csv, curves.png, bad_clips.jsonl, args.json and checkpoints, whose weights are in
Meta's layout: every later stage takes the folder as its --encoder. You can stop it at any time and
continue with --resume."""

import argparse
import contextlib
import copy
import functools
import gc
import importlib.util
import math
import os
import re
import sys
import time
import warnings


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
flag("--data", "--data_path", nargs="+", action="append", help="shards of play, or plain video: files, folders, tars, globs, {a..b} ranges; may be repeated (default: VPT/*.tar)")  # fmt: skip
flag("--data_weights", type=float, nargs="+", help="share of the clips from each --data (default: by length)")  # fmt: skip
flag("--val_data", nargs="+", action="append", help="held-out shards or videos; may be repeated (default: --val_fraction of --data)")  # fmt: skip
flag("--val_fraction", type=float, default=0.1, help="share of the shards held out (below ten shards: of the recordings)")  # fmt: skip
flag("--val_clips", type=int, default=256, help="held-out clips to validate on; 0 turns validation off")  # fmt: skip
flag("--recordings", metavar="FILE", help="take only these recordings of --data: a file of names, one a line")  # fmt: skip
flag("--probe_clips", type=int, default=256, help="training clips that each validation fits its probe of actions on; 0 is off")  # fmt: skip
flag("--cache_dir", help="copy shards at URLs into this folder (of each node) when first needed; without it they are streamed")  # fmt: skip
flag("--cache_size", type=float, default=100.0, help="size limit of --cache_dir in GB; the least recently used shards are deleted first")  # fmt: skip
flag("--scaler", default="vpt_action_scaler.pkl", help="action statistics from fit_scaler.py, for --idm")  # fmt: skip
flag("--frames_per_clip", "--dataset_fpcs", type=int, nargs="+", default=16, help="sampled frames of a clip; one number, or one for each --data")  # fmt: skip
flag("--fps", type=float, nargs="+", default=5.0, help="sampled frames a second; one number, or one for each --data")  # fmt: skip
flag("--tubelet_size", type=int, default=2, help="frames that the patch embedding merges into a step")  # fmt: skip
flag("--crop_size", type=int, default=256, help="pixels of the square crop")
flag("--action_space", type=int, default=36, help="actions of --idm and of the probe: 13, 18, 36 or 38 (see docs/data.md)")  # fmt: skip
flag("--gui", default="keep", choices=["keep", "drop"], help="drop: leave out clips with an open inventory")  # fmt: skip
flag("--decoder", default="pyav", choices=["pyav", "decord"], help="video decoder")
flag("--num_workers", type=int, default=min(8, cpus), help="loader processes a rank; at most 8 of the usable CPUs unless given")  # fmt: skip
flag("--pixels_cache", help="decode each recording once into this folder, at --crop_size; its frames take crop x crop x 3 bytes each")  # fmt: skip
flag("--max_bad_fraction", type=float, default=0.01, help="stop if more than this share of clips cannot be read (after 100 clips)")  # fmt: skip
flag("--horizontal_flip", action=switch, default=False, help="mirror half of the clips; not with --idm")  # fmt: skip
flag("--random_resize_scale", type=float, default=1.0, help="smallest random crop as a share of the short side (Meta: 0.55)")  # fmt: skip
flag("--random_aspect", type=float, nargs=2, default=[1.0, 1.0], help="least and largest aspect ratio of a random crop, which is then stretched (Meta: 0.75 1.35)")  # fmt: skip
flag("--motion_shift", type=float, default=0.0, help="move the crop over the clip by up to this share of it")  # fmt: skip
flag("--temporal_jitter", type=int, default=0, help="move each sampled frame by up to this many ticks (1/20 s)")  # fmt: skip

flag = parser.add_argument_group("model and loss").add_argument
flag("--encode", default="clip", choices=["clip", "tubelet"], help="what the encoder sees at once: the whole clip (Meta), or the frames of a step, as train_ac.py does")  # fmt: skip
flag("--encoder_arch", help="size of a new encoder (default: vit_large_16)")
flag("--patch_size", type=int, default=16, help="side of a patch in pixels")
flag("--pred_dim", "--pred_embed_dim", type=int, default=384, help="width of the mask predictor")
flag("--pred_depth", type=int, default=12, help="blocks of the mask predictor")
flag("--pred_heads", "--pred_num_heads", type=int, default=12, help="attention heads of the mask predictor")  # fmt: skip
flag("--init_from", help="continue from the encoder, target_encoder and predictor in this file (Meta's V-JEPA 2 or 2.1) or run folder, in whole")  # fmt: skip
flag("--activation_checkpointing", "--use_activation_checkpointing", "--gradient_checkpointing", action=switch, default=False, help="recompute blocks in the backward pass to save memory")  # fmt: skip
flag("--compile", "--compile_model", action=switch, default=False, help="torch.compile the blocks of all three networks")  # fmt: skip
flag("--fsdp", action=switch, default=False, help="shard weights, gradients and optimizer over the ranks (torch's fully_shard), for encoders of a billion weights")  # fmt: skip
flag("--mask_blocks", type=int, nargs="+", default=[8, 2], help="blocks of each kind of mask")
flag("--mask_scale", type=float, nargs="+", default=[0.15, 0.7], help="share of the picture that a block of each kind covers")  # fmt: skip
flag("--mask_steps", type=float, nargs="+", default=[], help="in place of blocks: hide this share of the steps of a clip; several shares are several kinds of masks")  # fmt: skip
flag("--mask_aspect", type=float, nargs=2, default=[0.75, 1.5], help="least and largest aspect ratio of a block")  # fmt: skip
flag("--ema", type=float, nargs=2, default=[0.99, 0.999], help="the teacher's momentum in the first and the last step (Meta, 90,000 steps: 0.99925 0.99925)")  # fmt: skip
flag("--loss_exp", type=float, default=1.0, help="1: L1, 2: half squared error")
flag("--masked", type=float, default=1.0, help="weight of the masked loss; 0 leaves it out, and the predictor untrained")  # fmt: skip
flag("--context_loss", type=float, help="weight of V-JEPA 2.1's loss on the tokens that the encoder sees; needs --init_from with a 2.1 file (default: 0.5 with one, otherwise off)")  # fmt: skip
flag("--context_warmup", type=int, nargs=2, default=[15000, 30000], metavar=("START", "END"), help="steps after which the weight of the context loss begins to grow, and is whole (the default is Meta's)")  # fmt: skip
flag("--sigreg", type=float, default=0.0, help="weight of SIGReg on the mean features of steps, against collapse; 0 is off")  # fmt: skip
flag("--sigreg_directions", type=int, default=256, help="random directions of SIGReg")
flag("--sigreg_dim", type=int, default=128, help="width of the projection that SIGReg sees")
flag("--variance", type=float, default=0.0, help="weight of the variance term, against channels that die; 0 is off")  # fmt: skip
flag("--covariance", type=float, default=0.0, help="weight of the covariance term, against channels that say the same; 0 is off")  # fmt: skip
flag("--idm", type=float, default=0.0, help="weight of inverse dynamics: the action, predicted from two consecutive steps; 0 is off")  # fmt: skip
flag("--idm_hotbar", action=switch, default=False, help="inverse dynamics also predicts the hotbar's keys and slots, which can be read at the bottom of the picture")  # fmt: skip

flag = parser.add_argument_group("optimizer").add_argument
flag("--batch_size", "--per_device_batch_size", type=int, default=24, help="clips per rank and micro-batch")  # fmt: skip
flag("--grad_accum", "--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step")  # fmt: skip
flag("--epochs", "--num_epochs", type=int, default=300, help="epochs of --ipe steps")
flag("--ipe", type=int, default=300, help="steps of an epoch")
flag("--max_steps", type=int, help="stop after this many steps; the schedule stays")
flag("--lr", "--learning_rate", type=float, default=5.25e-4, help="learning rate between warm-up and anneal")  # fmt: skip
flag("--start_lr", type=float, default=1e-4, help="learning rate at the start of the warm-up")
flag("--final_lr", type=float, default=1e-6, help="learning rate of the last step")
flag("--warmup", type=int, default=40, help="epochs of linear warm-up")
flag("--anneal", type=int, default=40, help="epochs of linear anneal at the end (cool-down)")
flag("--weight_decay", type=float, default=0.04, help="AdamW decay of matrices")
flag("--grad_clip", "--gradient_clipping", type=float, default=0.0, help="largest gradient norm; 0 is off")  # fmt: skip
flag("--dtype", choices=["bfloat16", "float16", "float32"], help="autocast precision (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip

flag = parser.add_argument_group("run").add_argument
flag("--out_dir", default="out/vjepa", help="folder of this run")
flag("--resume", action=switch, default=False, help="continue from the newest good checkpoint in --out_dir, if there is one")  # fmt: skip
flag("--save_every_freq", type=int, default=25, help="keep the checkpoint of every so many epochs for good")  # fmt: skip
flag("--keep_last", type=int, default=2, help="other checkpoints to keep (one is written each epoch)")  # fmt: skip
flag("--val_every", type=int, default=1, help="epochs between validations")
flag("--log_every", "--log_every_n_steps", type=int, default=10, help="steps between log lines")
flag("--seed", type=int, default=239, help="seed of weights, clip order and masks")
flag("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
flag("--peak_tflops", type=float, help="TFLOP/s that the device can reach in --dtype, for MFU in the log (default: from its data sheet, for A100, H100 and a few more)")  # fmt: skip
flag("--wandb_project", help="also log to Weights & Biases (pip install wandb)")
flag("--dry_run", action=switch, default=False, help="check everything, run three steps, write nothing")  # fmt: skip

if __name__ == "__main__":
    args = parser.parse_args()

# heavy imports come after parsing: --help answers at once
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import weights
from data import (
    ActionScaler,
    Clips,
    StopSignal,
    clips_by_data,
    fill_pixels_cache,
    holds_play,
    open_films,
    open_split,
    prefetch,
    read_names,
    vpt_loader,
    windows,
)
from evaluation.pretraining import (
    PROBE,
    SPREAD,
    collapse_sentence,
    context_sentence,
    inverse_probe,
    plot_curves,
    probe_text,
    read_windows,
    some_tokens,
)
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
from files.remote import cached
from files.shards import line_warnings
from files.vpt import ACTION_SPACES, CONTINUOUS, ClipReader, hotbar_columns
from kernels.flops import forward_flops, peak_to_assume
from model import (
    Encoder21,
    InverseDynamics,
    MaskedModel,
    MaskPredictor,
    MaskPredictor21,
    context_weight_at,
    feature_spread,
    momentum_at,
    new_projector,
    pixels_to_video,
    random_aspect,
    sample_masks,
    sample_step_masks,
    teacher_targets,
    update_teacher,
)


# --- helpers ---
def lr_at(step, total_steps, warmup, anneal, start_lr, lr, final_lr):
    """Learning rate of a step (from 1): `warmup` steps of linear warm-up, constant, and a linear
    anneal over the last `anneal` steps (vjepa2 schedulers.py)."""
    if step < warmup:
        return start_lr + step / warmup * (lr - start_lr)
    anneal_begins = total_steps - anneal
    if step < anneal_begins:
        return lr
    return lr + (step - anneal_begins) / max(anneal, 1) * (final_lr - lr)


if __name__ == "__main__":
    sys.excepthook = checkpoint.short_excepthook

    # stored frames are of the centre of the picture
    if args.pixels_cache:
        for name in ("random_resize_scale", "random_aspect", "motion_shift"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(
                    f"--{name} moves the crop, and --pixels_cache holds the centre alone: drop one"
                )

    # --frames_per_clip and --fps: one number for all --data, or one for each
    data = args.data or [["VPT/*.tar"]]
    clips_of_data = []
    for name in ("frames_per_clip", "fps"):
        numbers = getattr(args, name)
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if len(numbers) not in (1, len(data)):
            parser.error(
                f"--{name} has {len(numbers)} numbers for {len(data)} --data: give one for all, or"
                " one for each; --data is repeated for each data set"
            )
        numbers = numbers * len(data) if len(numbers) == 1 else numbers
        clips_of_data.append(numbers)

        # the first data set is what later stages are told, and what --val_data is read as
        setattr(args, name, numbers[0])
    clips_of_data = list(zip(*clips_of_data))
    is_mixed = len(set(clips_of_data)) > 1

    # one check, one message
    for name in ("batch_size", "grad_accum", "epochs", "ipe", "log_every", "val_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is too small: 1 is the least")
    for name in ("masked", "sigreg", "variance", "covariance", "idm", "probe_clips"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)} is below 0, which turns it off")
    if args.context_loss and args.context_loss < 0:
        parser.error(f"--context_loss {args.context_loss} is below 0, which turns it off")
    if args.context_loss and not args.masked:
        parser.error("--context_loss goes with the masked loss: drop it, or --masked 0")
    if not 0 <= args.context_warmup[0] <= args.context_warmup[1]:
        parser.error(f"--context_warmup {args.context_warmup}: give two steps, the first one first")
    if args.warmup + args.anneal > args.epochs:
        parser.error(
            f"--warmup {args.warmup} and --anneal {args.anneal} do not fit into --epochs"
            f" {args.epochs}"
        )
    if args.action_space not in ACTION_SPACES:
        sizes = ", ".join(map(str, ACTION_SPACES))
        parser.error(f"--action_space {args.action_space} is none of {sizes}")
    if args.encoder_arch and args.encoder_arch not in weights.ARCHITECTURES:
        names = ", ".join(weights.ARCHITECTURES)
        parser.error(f"--encoder_arch {args.encoder_arch} is none of {names}")
    if args.encoder_arch and args.init_from:
        parser.error("--encoder_arch: the encoder's size is that of --init_from, leave it out")
    if args.crop_size % args.patch_size:
        parser.error(
            f"--crop_size {args.crop_size} is no multiple of --patch_size {args.patch_size}"
        )
    for frames, _ in clips_of_data:
        if frames < 1:
            parser.error(f"--frames_per_clip {frames} is too small: 1 is the least")
        if frames % args.tubelet_size:
            parser.error(
                f"--frames_per_clip {frames} is no multiple of --tubelet_size {args.tubelet_size}"
            )
    shortest = min(frames for frames, _ in clips_of_data)
    if len(args.mask_blocks) != len(args.mask_scale):
        parser.error(
            f"--mask_blocks has {len(args.mask_blocks)} numbers and --mask_scale"
            f" {len(args.mask_scale)}: give one of each for every kind of mask"
        )
    if min(args.mask_blocks) < 1:
        parser.error(f"--mask_blocks {min(args.mask_blocks)} is too small: 1 is the least")
    if not 0 < min(args.mask_scale) <= max(args.mask_scale) < 1:
        parser.error(f"--mask_scale {args.mask_scale}: shares are above 0 and below 1")
    if args.mask_steps and not 0 < min(args.mask_steps) <= max(args.mask_steps) < 1:
        parser.error(f"--mask_steps {args.mask_steps}: shares are above 0 and below 1")
    if args.mask_steps and shortest < 2 * args.tubelet_size:
        parser.error("--mask_steps needs clips of two steps: more --frames_per_clip")
    if not 0 < args.mask_aspect[0] <= args.mask_aspect[1]:
        parser.error(f"--mask_aspect {args.mask_aspect}: give two numbers above 0, the least first")
    if not 0 < args.random_aspect[0] <= args.random_aspect[1]:
        parser.error(
            f"--random_aspect {args.random_aspect}: give two numbers above 0, the least first"
        )
    if not 0 <= min(args.ema) <= max(args.ema) <= 1:
        parser.error(f"--ema {args.ema}: momentum is from 0 to 1")
    if not args.masked and not args.idm:
        parser.error(
            "--masked 0 without --idm: nothing is learned from the video, give one of them"
        )
    if args.idm and args.horizontal_flip:
        parser.error("--horizontal_flip mirrors what --idm has to read the turns from: drop one")
    if args.idm and shortest < 2 * args.tubelet_size:
        parser.error("--idm needs clips of two steps: more --frames_per_clip")
    if args.idm and is_mixed:
        parser.error("--idm reads actions of one length: give one --frames_per_clip and one --fps")
    if args.fsdp and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        parser.error("--fsdp shards over several processes: start it with torchrun")
    if args.fsdp and args.dtype == "float16":
        parser.error("--fsdp goes with --dtype bfloat16 or float32: float16 needs scaled gradients")
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
    val_data = args.val_data if args.val_clips else None
    val_fraction = args.val_fraction if args.val_clips and not args.val_data else 0.0

    # a pattern or a path without a file is an error now, not after the model is built
    paths = [film_paths(group) for group in [*data, *(val_data or [])]]
    if args.init_from and not os.path.exists(args.init_from):
        raise FileNotFoundError(f"--init_from {args.init_from}: no such file or run folder")

    only = None if args.recordings is None else read_names(args.recordings)

    # only --idm looks at actions while it trains
    scaler = None
    if args.idm:
        suggested_flags = (
            f"--data {' '.join(sum(data, []))} --fps {args.fps:g} --frames_per_step"
            f" {args.tubelet_size} --val_fraction {val_fraction:g}"
        )
        if args.recordings:
            suggested_flags += f" --recordings {args.recordings}"
        scaler = ActionScaler.load(args.scaler, suggested_flags)
        scaler.check(args.scaler, CONTINUOUS, args.fps, args.tubelet_size)

    # one process at a time may write to the folder
    if rank == 0 and not args.dry_run:
        checkpoint.lock(args.out_dir)
    print0(f"reading {count_text(len(sum(paths, [])), 'file')}")

    # shards at URLs are copied to a local disk when they are first needed
    if args.cache_dir:
        paths = cached(paths, args.cache_dir, args.cache_size, print0)
    groups = paths[: len(data)]
    val_data = paths[len(data) :] or None

    # shards of play have actions, plain video has none
    is_play = holds_play(sum(paths, []))
    if not is_play:
        for name in ("idm", "gui", "decoder", "temporal_jitter"):
            if getattr(args, name) != parser.get_default(name):
                raise ValueError(
                    f"--{name} needs shards of play, and {sum(paths, [])[0]} is plain video, which"
                    " has no lines: drop the flag, or train on shards of play alone"
                )
        print0("plain video: there are no actions to probe, only the loss is validated")

    # a clip: how it is cut and seen
    action_names = ACTION_SPACES[args.action_space]
    clip_settings = {
        "fps": args.fps,
        "frames_per_step": args.tubelet_size,
        "crop_size": args.crop_size,
        "frames_per_clip": args.frames_per_clip,
    }

    # augmentation is for training; validation takes clips as they are
    augmentation = {
        "horizontal_flip": args.horizontal_flip,
        "random_resize_scale": args.random_resize_scale,
        "motion_shift": args.motion_shift,
    }
    if is_play:
        options = {
            "encode": "tubelet",
            "action_space": args.action_space,
            "decoder": args.decoder,
            "gui": args.gui,
        }
        augmentation["temporal_jitter"] = args.temporal_jitter

    # a reader for each --data
    readers = []
    val_readers = []
    for frames, fps in clips_of_data:
        own = clip_settings | {"frames_per_clip": frames, "fps": fps}
        if is_play:
            val_readers.append(ClipReader(**own, **options))
            readers.append(ClipReader(**own, **options, **augmentation, scaler=scaler))
        else:
            val_readers.append(FilmReader(**own))
            readers.append(FilmReader(**own, **augmentation))
    open_data = open_split if is_play else functools.partial(open_films, reader=readers)

    # recordings are held out whole: clips of one recording resemble each other
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
    for line in line_warnings(train + val) if rank == 0 and is_play else []:
        print0(f"WARNING: {line}")
    for record in train + val:
        if record.is_features:
            raise ValueError(f"{record.shard} holds features: an encoder is trained on video")

    # training goes ahead without validation, but then nothing shows what the features are good for
    if args.val_clips and not val:
        print0(
            "WARNING: nothing to validate on: streams and single recordings cannot be split; pass"
            " --val_data"
        )
    held_out_names = {record.name for record in val}
    if args.idm:
        fitted_on = scaler.meta.get("recordings")
        if fitted_on:
            scaler_saw_them = bool(held_out_names & set(fitted_on))
        else:
            scaler_fraction = scaler.meta.get("val_fraction", val_fraction)
            scaler_saw_them = bool(val) and val_fraction not in (0, scaler_fraction)
        if scaler_saw_them:
            print0(
                "warning: the scaler was fitted on recordings held out here; fit it on the training"
                " shards only (fit_scaler.py --val_fraction)"
            )

    # where clips differ, a batch is of one --data
    if is_mixed and not train:
        raise ValueError(
            "--frames_per_clip and --fps of each --data need local shards: give one number for"
            " streams, or a --cache_dir"
        )
    train_set = (train, shares) if train else groups
    val_shares = [1.0] * len(val)
    val_set = Clips(val, val_shares, val_readers[0], args.seed, args.pixels_cache)
    if is_mixed:
        train_set = clips_by_data(train, shares, groups, readers, args.seed, args.pixels_cache)
    if is_mixed and val:
        val_set = clips_by_data(val, val_shares, groups, val_readers, args.seed, args.pixels_cache)

    # an action of one data set is another one at another rate
    probes = bool(is_play and args.probe_clips and train and val and not is_mixed)
    validates = bool(val and (probes or args.masked))
    probe_set = Clips(train, [1.0] * len(train), val_readers[0], args.seed, args.pixels_cache)
    if is_mixed and is_play and args.probe_clips:
        print0("clips of different lengths or rates: only the loss is validated, not actions")
    if val and not windows(val_set, 1, 1):
        raise ValueError(
            "the held-out recordings hold no whole clip: hold out more, or pass --val_clips 0"
        )

    # decoding would take most of the time of a small encoder: do it once
    if args.pixels_cache and not is_play:
        raise ValueError("--pixels_cache is for shards of play: drop the flag for plain video")
    if args.pixels_cache and not train:
        raise ValueError("--pixels_cache needs local shards: streams are decoded as they come")
    if args.pixels_cache:
        fill_pixels_cache(
            train + val,
            args.pixels_cache,
            args.crop_size,
            args.decoder,
            args.num_workers,
            rank,
            world,
        )

    # --- model ---
    # encoder and predictor are trained, the teacher follows the encoder
    grid = args.crop_size // args.patch_size
    if args.init_from:
        parts = weights.read_file(args.init_from)
        which = "encoder" if "encoder" in parts else "target_encoder"
        encoder = weights.load_encoder(args.init_from, which=which)
        teacher = weights.load_encoder(args.init_from, which="target_encoder")
        for name in ("tubelet_size", "patch_size"):
            if getattr(args, name) != getattr(encoder, name):
                raise ValueError(
                    f"--{name} {getattr(args, name)}, but {args.init_from} has"
                    f" {getattr(encoder, name)}: give that"
                )
    else:
        encoder = weights.build_encoder(
            args.encoder_arch or "vit_large_16",
            args.crop_size,
            args.frames_per_clip,
            args.seed,
            patch_size=args.patch_size,
            tubelet_size=args.tubelet_size,
        )
        teacher = copy.deepcopy(encoder)

    # the predictor
    kinds = len(args.mask_steps or args.mask_blocks)
    is_21 = isinstance(encoder, Encoder21)
    new_layers = []
    if args.init_from and "predictor" in parts:
        predictor, new_layers = weights.load_mask_predictor(args.init_from, (grid, grid), encoder)
        own = {
            "pred_dim": predictor.pred_dim,
            "pred_depth": len(predictor.predictor_blocks),
            "pred_heads": predictor.num_heads,
        }
        for name, value in own.items():
            if getattr(args, name) not in (parser.get_default(name), value):
                raise ValueError(
                    f"--{name} {getattr(args, name)}, but the predictor in {args.init_from} has"
                    f" {value}: leave the flag out"
                )
    else:
        kind_of_predictor = MaskPredictor21 if is_21 else MaskPredictor
        predictor = kind_of_predictor(
            encoder.embed_dim,
            (grid, grid),
            pred_dim=args.pred_dim,
            depth=args.pred_depth,
            num_heads=args.pred_heads,
            num_mask_tokens=kinds,
        )
        if args.init_from:
            print0(f"--init_from {args.init_from} holds no predictor: a new one is trained")

    # V-JEPA 2.1 has a loss on the tokens of the context, too
    if args.context_loss is None:
        args.context_loss = 0.5 if is_21 and args.masked else 0.0
    if args.context_loss and not is_21:
        raise ValueError(
            f"--context_loss {args.context_loss:g} needs --init_from with a V-JEPA 2.1 file: other"
            " predictors have no head for it; leave the flag out"
        )

    # the optional regularisers
    projector = None
    if args.sigreg:
        projector = new_projector(encoder.embed_dim, 4 * encoder.embed_dim, args.sigreg_dim)

    # what is open in the hotbar is no target: an encoder that reads the bottom of the picture could
    # predict it, and see nothing else
    hotbar = hotbar_columns(action_names)
    inverse = None
    inverse_of = None  # all actions
    if hotbar and not args.idm_hotbar:
        inverse_of = [i for i in range(len(action_names)) if i not in hotbar]
    if args.idm:
        targets = inverse_of or action_names
        inverse = InverseDynamics(encoder.embed_dim, len(targets), (grid, grid))

    encoder.train().requires_grad_(True)
    predictor.freeze_unused(with_context=bool(args.context_loss))
    if is_21:
        encoder.freeze_unused(predictor.num_levels)
    if not args.masked:
        predictor.requires_grad_(False)  # DDP would wait for its gradients
    teacher.to(device)
    model = MaskedModel(
        encoder,
        predictor,
        projector,
        inverse,
        encode=args.encode,
        loss_exp=args.loss_exp,
        directions=args.sigreg_directions,
        decorrelate=bool(args.variance or args.covariance),
        continuous=len(CONTINUOUS),
        inverse_of=inverse_of,
        with_context=bool(args.context_loss),
    ).to(device)
    encoder.activation_checkpointing = args.activation_checkpointing
    predictor.activation_checkpointing = args.activation_checkpointing
    size = {
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "patch_size": encoder.patch_size,
        "tubelet_size": encoder.tubelet_size,
        "pred_dim": predictor.pred_dim,
        "pred_depth": len(predictor.predictor_blocks),
        "pred_heads": predictor.num_heads,
        "mask_tokens": len(predictor.mask_tokens),
    }
    lengths = sorted({frames // args.tubelet_size for frames, _ in clips_of_data})
    num_parameters = sum(p.numel() for p in model.parameters())
    encoder_parameters = sum(p.numel() for p in encoder.parameters())
    print0(
        f"encoder {encoder_parameters:,} parameters, with predictor and heads"
        f" {num_parameters:,}; clips of {' or '.join(map(str, lengths))} steps x {grid}x{grid}"
        " patches"
    )

    def masks_of(video, step_seed, group):
        """Masks of each kind for a video (B, 3, T, H, W). Ranks that share step_seed have blocks of
        one size; `group` tells apart what one step draws."""
        clips = len(video)
        shape = (video.shape[2] // args.tubelet_size, grid, grid)
        masks = []
        for kind in range(kinds):
            seed = [args.seed, step_seed, kind]
            if args.mask_steps:
                mask = sample_step_masks(clips, shape, args.mask_steps[kind], [*seed, 1 + group])
            else:
                mask = sample_masks(
                    clips,
                    shape,
                    args.mask_blocks[kind],
                    args.mask_scale[kind],
                    args.mask_aspect,
                    size_seed=seed,
                    place_seed=[*seed, 1 + group],
                    even=args.encode == "tubelet",
                )
            masks.append(mask.to(device))
        return masks

    def targets_of(video):
        """The teacher's layer-normed features of all tokens of clips, (B, L, E) float32; (B, L, 4E)
        where V-JEPA 2.1's predictor has all four levels."""
        with torch.no_grad(), autocast():
            return teacher_targets(teacher, video, args.encode, model.levels)

    def loss_weights_at(step):
        """The weight of each loss in a step (from 1): that of the context loss grows."""
        context = context_weight_at(step, args.context_loss, *args.context_warmup)
        return [args.masked, args.sigreg, args.variance, args.covariance, args.idm, context]

    # from here on, with --fsdp, every rank holds a part of each weight
    if args.fsdp:
        mesh = init_device_mesh(device.type, (world,))
        blocks = [*encoder.blocks, *teacher.blocks, *predictor.predictor_blocks]
        for part in [*blocks, model, teacher]:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # blocks also return keys and values, which are views; nothing here writes into them
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")

    # MFU in the log is the share of this that training reaches; None: not known
    peak = peak_to_assume(device, args.dtype, args.peak_tflops, print0)
    flops_of_shape = {}

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
    if args.context_loss:
        print0(context_sentence(total_steps, args.context_loss, *args.context_warmup))

    # what a resumed run must have in common with its checkpoint: otherwise the weights load and
    # mean something else
    must_match = {
        "size": size,
        "decoder": args.decoder,
        "fps": args.fps,
        "frames_per_clip": args.frames_per_clip,
        "clips_of_data": clips_of_data if is_mixed else None,  # None: runs from before, too
        "crop_size": args.crop_size,
        "encode": args.encode,
        "mask_blocks": args.mask_blocks,
        "mask_steps": args.mask_steps,
        "sigreg_is_on": bool(args.sigreg),
        "idm_is_on": bool(args.idm),
        "action_names": action_names if args.idm else None,
        # None: all actions, and runs from before --idm_hotbar
        "inverse_of": inverse_of if args.idm else None,
        "scaler_hash": scaler.hash if args.idm else None,
        "context_is_on": bool(args.context_loss) or None,  # None: runs from before this flag
        "ipe": args.ipe,
    }

    # resume from the newest checkpoint that is whole; without any, --resume starts a new run
    state = None
    path = None
    first_rank = None  # effective rank of the targets at the start
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
        checkpoint.load_whole(encoder, weights.without_prefix(state["encoder"]))
        checkpoint.load_whole(teacher, weights.without_prefix(state["target_encoder"]))
        checkpoint.load_whole(predictor, weights.without_prefix(state["predictor"]))
        for name, head in (("projector", projector), ("inverse", inverse)):
            if head is not None:
                checkpoint.load_whole(head, state[name])
        checkpoint.load_whole_optimizer(optimizer, state["optimizer"])
        loss_scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        first_rank = state["first_rank"]
        step = state["epoch"] * args.ipe + state["itr"]
        print0(
            f"resumed from {path} at epoch {state['epoch']}, itr {state['itr']};",
            changed_flags(state["args"], vars(args)),
        )

        # another number of GPUs is fine, but only the same number of clips in a step gives the
        # same clips
        clips_now = args.batch_size * world * args.grad_accum
        clips_before = state["batch_size"] * state["world_size"] * state["args"]["grad_accum"]
        if clips_now != clips_before:
            inside = ""
            if state["itr"]:
                inside = f"; in epoch {state['epoch']} some clips come twice and others not at all"
            print0(
                f"a step now takes {clips_now} clips, not {clips_before}: other clips from here"
                f" on{inside}; change --grad_accum or --batch_size to keep them"
            )
        elif world != state["world_size"]:
            print0(
                f"{world} ranks, not {state['world_size']}: the same {clips_now} clips in each"
                " step as before"
            )
    elif args.init_from:
        exceptions = ""
        if new_layers:
            exceptions = (
                f" but {' and '.join(new_layers)}, which were made for another teacher's width and"
                f" are new here, for {predictor.predictor_proj.out_features} channels"
            )
        print0(f"--init_from {args.init_from}: all tensors taken{exceptions}")

    # how far this run goes: the schedule's end, --max_steps, or three steps to try it
    last_step = min(total_steps, args.max_steps or total_steps)
    if args.dry_run:
        last_step = min(last_step, step + 3)
    next_command = (
        f"python train_ac.py --encoder {args.out_dir} --crop_size {args.crop_size} --fps"
        f" {args.fps:g} --data {' '.join(sum(data, []))}"
    )

    # a finished job that SLURM starts again must end well
    if step >= last_step:
        print0(f"nothing left to do: {step} steps are done; next: {next_command}")
        if world > 1:
            dist.destroy_process_group()
        sys.exit()

    # masks change their size in every step, so that only blocks are compiled
    if args.compile:
        for blk in [*encoder.blocks, *teacher.blocks, *predictor.predictor_blocks]:
            blk.compile(dynamic=True)

    # DDP averages gradients over the ranks; as views of its buckets they need no second copy
    ddp = model
    if world > 1 and not args.fsdp:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # columns of train.csv and val.csv; a resumed run drops rows after its checkpoint
    losses_of_a_row = ["masked_loss", "sigreg_loss", "variance_loss", "covariance_loss"]
    losses_of_a_row += ["inverse_loss"]
    train_columns = ["epoch", "itr", *losses_of_a_row, "total_loss", *SPREAD, "momentum", "lr"]
    train_columns += ["grad_norm", "clips_per_s", "data_wait", "memory_mib", "bytes_per_s"]
    # new columns come last: then the rows of an earlier run still fit
    losses_of_a_row.append("context_loss")
    train_columns += ["context_loss", "mfu"]
    val_columns = ["epoch", "masked_loss", *PROBE]
    headers = {
        "train": (train_columns, *divmod(step, args.ipe)),
        "val": (val_columns, *divmod(step, args.ipe)),
    }

    # rank 0 writes; the id in the checkpoint continues the same W&B run
    wandb_id = (state or {}).get("wandb_id") or os.urandom(4).hex()
    writes = rank == 0 and not args.dry_run
    writer = checkpoint.Writer(writes)
    log = None
    if writes:
        log = open_logs(
            args.out_dir, headers, vars(args), state is not None, args.wandb_project, wandb_id
        )

    # what a judge of the checkpoint must know, by names that stay when a flag is renamed
    settings = {
        "stage": "vjepa",
        "is_play": is_play,
        "data": data,
        "val_data": args.val_data,
        "recordings": only,
        "val_fraction": args.val_fraction,
        "val_clips": args.val_clips,
        "cache_dir": args.cache_dir,
        "cache_size": args.cache_size,
        "encode": args.encode,
        **clip_settings,
        "clips_of_data": clips_of_data,
        **size,
        "init_from": args.init_from,
        "gui": args.gui,
        "decoder": args.decoder,
        "mask_blocks": args.mask_blocks,
        "mask_scale": args.mask_scale,
        "mask_aspect": args.mask_aspect,
        "mask_steps": args.mask_steps,
        "ema": args.ema,
        "loss_exp": args.loss_exp,
        "context_loss": args.context_loss,
        "context_warmup": args.context_warmup,
        "masked": args.masked,
        "sigreg": args.sigreg,
        "variance": args.variance,
        "covariance": args.covariance,
        "idm": args.idm,
        "idm_hotbar": args.idm_hotbar,
        "dtype": args.dtype,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "grad_accum": args.grad_accum,
        "epochs": args.epochs,
    }

    def note_bad(clips):
        """Clips that could not be read go into bad_clips.jsonl."""
        if not args.dry_run:
            rows = [dict(zip(("file", "key", "reason"), clip)) for clip in clips]
            append_jsonl(f"{args.out_dir}/bad_clips.jsonl", rows)

    def save(epoch, itr):
        """Write a checkpoint and the curves (rank 0). With --fsdp all ranks take part."""
        state = weights.pretraining_state(
            encoder.state_dict(), teacher.state_dict(), predictor.state_dict()
        )
        state |= {
            "format": checkpoint.FORMAT,
            "settings": settings,
            "projector": projector.state_dict() if args.sigreg else None,
            "inverse": inverse.state_dict() if args.idm else None,
            "optimizer": optimizer.state_dict(),
            "scaler": loss_scaler.state_dict(),
            "epoch": epoch,
            "itr": itr,
            "lr": args.lr,
            "batch_size": args.batch_size,
            "world_size": world,
            "args": vars(args),
            "rng": torch.get_rng_state(),
            "first_rank": first_rank,
            "held_out": sorted(held_out_names),
            "wandb_id": wandb_id,
            **must_match,
        }

        # written in a thread while training continues. The write is atomic: a run that is killed
        # keeps its previous checkpoint
        path = writer.save(args.out_dir, state, epoch, itr, args.keep_last, args.save_every_freq)
        if writes:
            plot_curves(args.out_dir, args.ipe)
        return path

    def validate(epoch):
        """The masked loss and the probe on the held-out clips of all ranks: (a row of val.csv, a
        line about it)."""

        def loss_of(video, number):
            masks = masks_of(video, 0, number)  # step 0: no step of training has its masks
            return model(video, targets_of(video), masks, regularise=False)[0]

        options = {
            "batch_size": args.batch_size,
            "num_workers": args.num_workers,
            "autocast": autocast,
        }
        options["with_actions"] = probes
        loss = loss_of if args.masked else None
        test = read_windows(val_set, args.val_clips, teacher, device, loss_of=loss, **options)
        note_bad(test["bad"])
        row = {"epoch": epoch, "masked_loss": None} | dict.fromkeys(PROBE)
        texts = []
        if args.masked:
            row["masked_loss"] = test["loss"]
            texts.append(f"masked loss {test['loss']:.4f}")
        if probes:
            fit = read_windows(probe_set, args.probe_clips, teacher, device, **options)
            note_bad(fit["bad"])
            result = inverse_probe(fit, test, action_names)
            texts.append(probe_text(result))
            for name, value in result.items():
                row[name] = None if math.isnan(value) else value
        return row, "; ".join(texts)

    # --- train ---
    # SLURM's SIGTERM and Ctrl-C: the loop ends its step and saves
    stop = StopSignal()
    if not args.dry_run:
        stop.listen()

    # the loader starts where the checkpoint stopped: the order of clips depends on the seed alone
    loader = vpt_loader(
        train_set,
        args.batch_size,
        reader=readers[0],
        data_weights=args.data_weights,
        num_workers=args.num_workers,
        batches_per_epoch=args.ipe * args.grad_accum,
        epoch=step // args.ipe,
        itr=step % args.ipe * args.grad_accum,
        seed=args.seed,
        rank=rank,
        world=world,
        pin_memory=device.type == "cuda",
        pixels_cache=args.pixels_cache,
    )
    note_bad(bad if rank == 0 else [])

    # what the encoder knows before it has learned anything
    if validates and step == 0 and not args.dry_run:
        row, text = validate(0)
        if writes:
            log("val", row, step)
        print0(f"held out before training: {text}")

    # the next batch is copied to the GPU while this one is computed on
    batches = prefetch(loader, device)

    # how many clips were read, and which of them could not be
    clips_seen = 0
    bad_clips = []

    # what the next log line is about
    steps_to_log = []  # a StepRow for each step since the last log line
    recent_targets = []  # some of the teacher's features since the last log line
    data_seconds = 0.0
    flops_to_log = 0
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
        loss_weights = torch.tensor(loss_weights_at(step + 1), device=device)
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
                raise ValueError(
                    f"rank {rank} got no clip: there are fewer recordings than ranks x workers; use"
                    " fewer workers, or local shards"
                )

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

            # the teacher sees whole clips, the encoder what is not masked
            video = pixels_to_video(batch["video"].to(device, non_blocking=True))
            group = micro * world + rank
            if args.random_aspect != [1.0, 1.0]:
                video = random_aspect(video, args.random_aspect, [args.seed, step + 1, group])
            actions = None
            if args.idm:
                actions = batch["actions"].to(device, non_blocking=True)
            masks = []
            if args.masked:
                masks = masks_of(video, step + 1, group)
            targets = None
            if args.masked or not recent_targets:
                targets = targets_of(video)
                recent_targets.append(some_tokens(targets[..., -encoder.embed_dim :]))

            # DDP averages gradients once a step: on the last micro-batch
            last_micro = micro == args.grad_accum - 1
            waits = not last_micro and world > 1 and not args.fsdp
            with ddp.no_sync() if waits else contextlib.nullcontext():
                with autocast():
                    parts = ddp(video, targets, masks, actions, seed=args.seed + step)
                loss = (parts * loss_weights).sum() / args.grad_accum
                loss_scaler.scale(loss).backward()

            # once for each length of clips, for MFU: the teacher goes forward, the rest also
            # backward: twice as much
            if peak and video.shape not in flops_of_shape:
                flops = 3 * forward_flops(model, video, targets, masks, actions)
                if args.masked:
                    flops += forward_flops(targets_of, video)
                flops_of_shape[video.shape] = flops
            flops_to_log += flops_of_shape.get(video.shape, 0)

            # a mean over micro-batches, left on the GPU: reading it here would wait
            losses += parts.detach() / args.grad_accum

        # a signal that came while it waited for clips: what there is of this step is dropped
        if not halt:
            # clip the gradient; with inf its norm is only measured, for the log
            loss_scaler.unscale_(optimizer)
            max_norm = args.grad_clip or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            if args.fsdp:
                grad_norm = grad_norm.full_tensor()

            # step; in float16 a step with overflowed gradients is skipped
            loss_scaler.step(optimizer)
            loss_scaler.update()
            optimizer.zero_grad(set_to_none=True)

            # the teacher follows
            momentum = momentum_at(step + 1, total_steps, *args.ema)
            update_teacher(teacher, encoder, momentum)

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
        if steps_to_log and (must_save or step % args.log_every == 0):
            seconds = (time.perf_counter() - log_started) / len(steps_to_log)
            wait = data_seconds / len(steps_to_log)
            memory = checkpoint.peak_memory(device)
            mfu = flops_to_log / len(steps_to_log) / seconds / peak if peak else None
            spread = dict(zip(SPREAD, feature_spread(torch.cat(recent_targets))))
            recent_targets = []
            for row in mean_over_ranks(steps_to_log, world, torch.float64):
                number = row.epoch * args.ipe + row.itr + 1
                total = sum(w * x for w, x in zip(loss_weights_at(number), row.losses))
                place = f"epoch {row.epoch}, itr {row.itr}"
                check_finite(row, total, place, args.out_dir, args.dtype)
                columns = train_row(row, losses_of_a_row, seconds, wait, world, memory, mfu)
                columns["total_loss"] = total
                columns["momentum"] = momentum_at(number, total_steps, *args.ema)
                columns["bytes_per_s"] = row.bytes_read / seconds
                columns |= spread
                if writes:
                    log("train", columns, row.epoch * args.ipe + row.itr)
            place = f"epoch {epochs_done:3d} itr {inside:4d}"
            text = f"masked {columns['masked_loss']:.4f}" if args.masked else ""
            if args.context_loss:
                text += f"  context {columns['context_loss']:.4f}"
            if args.sigreg:
                text += f"  sigreg {columns['sigreg_loss']:.3f}"
            if args.variance or args.covariance:
                text += f"  var {columns['variance_loss']:.3f}"
                text += f"  cov {columns['covariance_loss']:.3f}"
            if args.idm:
                text += f"  idm {columns['inverse_loss']:.4f}"
            text += f"  rank {spread['effective_rank']:.1f} std {spread['smallest_std']:.3f}"
            print0(log_line(place, text, columns, (last_step - step) * seconds, device))

            # the loss falls when features collapse, so something else must tell
            first_rank = first_rank or spread["effective_rank"]
            warning = collapse_sentence(*spread.values(), first_rank)
            if warning:
                print0(f"WARNING: {warning}")
            steps_to_log = []
            data_seconds = 0.0
            flops_to_log = 0
            log_started = time.perf_counter()

        # once an epoch: validate (all ranks), save (rank 0)
        if must_save:
            due = epochs_done % args.val_every == 0 or step == last_step
            if validates and due and (inside == 0 or args.dry_run) and not halt:
                row, text = validate(epochs_done)
                if writes:
                    log("val", row, step)
                place = f"{step} steps" if inside else f"epoch {epochs_done}"
                print0(f"held out after {place}: {text}")
            if writes or (args.fsdp and not args.dry_run):
                path = save(epochs_done, inside)
            log_started = time.perf_counter()  # validating and saving are no training time
        if halt:
            break

    # the last checkpoint is on the disk, or an error says why not
    writer.wait()

    # what was done, and what to do next
    print0(f"peak memory {checkpoint.peak_memory(device):.0f} MiB")
    if args.dry_run:
        shapes = [f"{k} {tuple(v.shape)}" for k, v in batch.items() if isinstance(v, torch.Tensor)]
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
        if is_mixed:
            print0(
                "these steps may not have had the longest clips: try their --data alone to know"
                " what they take"
            )
        size_of_one = 12 * num_parameters + 4 * encoder_parameters  # with two moments; the teacher
        print0(checkpoint.disk_text(args.out_dir, checkpoints, size_of_one))
        print0("to train, run the same command without --dry_run")
    elif halt:
        print0(
            f"stopped at epoch {epochs_done}, itr {inside}; saved {path}; continue with --resume"
        )
    else:
        print0(f"{step} of {total_steps} steps done; saved {path}; next: {next_command}")

    # --- end --- (same in every train_*.py)
    # all ranks leave together; a process that just exits can hang the others
    if world > 1:
        del ddp  # its threads must end before Python does (pytorch/pytorch#190489)
        gc.collect()
        dist.destroy_process_group()
