"""Train a frame-causal, action-conditioned predictor on the features of a frozen V-JEPA encoder
(V-JEPA 2-AC, on gameplay).

On a laptop, on the play of make demo, with a small trained encoder:

    python train_ac.py --data demo/train/*.tar --val_data demo/val/*.tar --fps 10 \\
        --scaler demo/scaler.pkl --encoder doom_tiny --crop_size 48 --epochs 4 --ipe 100 \\
        --warmup 1 --anneal 1 --batch_size 16 --pred_dim 128 --pred_depth 4 --pred_heads 4

On 8 GPUs, with the released ViT-L:

    torchrun --nproc_per_node=8 --max_restarts=3 train_ac.py --data VPT/*.tar --resume

Reads VPT shards (or feature shards of encode.py) and the scaler of fit_scaler.py. Writes to
--out_dir: train.csv, val.csv, curves.png, bad_clips.jsonl, args.json and checkpoints. You can stop
it at any time and continue with --resume."""

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
flag("--data", "--data_path", nargs="+", action="append", help="training shards: paths, globs, {a..b} ranges, URLs; may be repeated (default: VPT/*.tar)")  # fmt: skip
flag("--data_weights", type=float, nargs="+", help="share of the clips from each --data (default: by length)")  # fmt: skip
flag("--val_data", nargs="+", action="append", help="held-out shards; may be repeated (default: --val_fraction of --data)")  # fmt: skip
flag("--val_fraction", type=float, default=0.1, help="share of the shards held out (below ten shards: of the recordings)")  # fmt: skip
flag("--val_clips", type=int, default=256, help="held-out clips to validate on; 0 turns validation off")  # fmt: skip
flag("--recordings", metavar="FILE", help="take only these recordings of --data: a file of names, one a line")  # fmt: skip
# shards at URLs
flag("--cache_dir", help="copy shards at URLs into this folder (of each node) when first needed; without it they are streamed")  # fmt: skip
flag("--cache_size", type=float, default=100.0, help="size limit of --cache_dir in GB; the least recently used shards are deleted first")  # fmt: skip
# actions are given to the predictor with mean 0 and std 1
flag("--scaler", default="vpt_action_scaler.pkl", help="action statistics from fit_scaler.py")
# a clip: by default 16 frames in 3.2 s, which are 8 steps of two frames
flag("--frames_per_clip", type=int, default=16, help="sampled frames of a clip")
flag("--fps", type=float, default=5.0, help="sampled frames a second")
flag("--frames_per_step", type=int, default=2, help="sampled frames a step")
flag("--tubelet_size", type=int, help="frames that the patch embedding merges; checked (default: the encoder's)")  # fmt: skip
flag("--crop_size", type=int, default=256, help="pixels of the square crop")
# an action is one vector a step: mouse motion is summed over it, a key counts if pressed at all
flag("--action_space", type=int, default=13, help="13: camera and hotbar keys, 18: camera, moves and buttons, 36: all of VPT's, 38: the guides' table")  # fmt: skip
# which clips are used, and how they are read
flag("--gui", default="keep", choices=["keep", "drop"], help="drop: leave out clips with an open inventory")  # fmt: skip
flag("--decoder", default="pyav", choices=["pyav", "decord"], help="video decoder")
flag("--num_workers", type=int, default=min(8, cpus), help="loader processes of each rank; the default is the usable CPUs, at most 8")  # fmt: skip
flag("--max_bad_fraction", type=float, default=0.01, help="stop if more than this share of clips cannot be read (after 100 clips)")  # fmt: skip
# augmentation, off by default; all but --action_noise need pixels, not stored features
flag("--horizontal_flip", action=switch, default=False, help="mirror half of the clips and their actions")  # fmt: skip
flag("--random_resize_scale", type=float, default=1.0, help="smallest random crop as a share of the short side")  # fmt: skip
flag("--motion_shift", type=float, default=0.0, help="let the crop drift during a clip, by up to this share of its size")  # fmt: skip
flag("--temporal_jitter", type=int, default=0, help="move each sampled frame by up to this many ticks (1/20 s)")  # fmt: skip
flag("--action_noise", type=float, default=0.0, help="std of noise on the scaled continuous actions")  # fmt: skip

flag = parser.add_argument_group("model and loss").add_argument
# the encoder is frozen; these say what it is and what it sees
flag("--encoder", "--encoder_path", "--pretrain_checkpoint", help="weights of the frozen encoder: a path, URL or name, or vit_tiny, random weights (default: vjepa2_vitl)")  # fmt: skip
flag("--model_name", help="refused: the encoder's size is read from its weights (--encoder)")
flag("--encode", default="tubelet", choices=["tubelet", "frame", "clip"], help="what the encoder sees at once: the frames of a step, one frame, or the whole clip")  # fmt: skip
flag("--feature_norm", default="layer", choices=["layer", "standardize"], help="standardize: also give every feature channel mean 0 and std 1, before the layer norm")  # fmt: skip
# the predictor is what trains; by default it has the size of V-JEPA 2-AC's
flag("--pred_dim", "--pred_embed_dim", type=int, default=1024, help="width of the predictor")
flag("--pred_depth", type=int, default=24, help="blocks of the predictor")
flag("--pred_heads", "--pred_num_heads", type=int, default=16, help="attention heads of the predictor")  # fmt: skip
flag("--predict", default="features", choices=["features", "change"], help="change: the output is added to the step's own features (not Meta's layout)")  # fmt: skip
flag("--init_from", help="start from these weights: another run's or Meta's AC predictor; tensors that do not fit are listed and initialised again")  # fmt: skip
# less memory, more speed
flag("--activation_checkpointing", "--use_activation_checkpointing", "--gradient_checkpointing", action=switch, default=False, help="recompute blocks in the backward pass to save memory")  # fmt: skip
flag("--compile", "--compile_model", action=switch, default=False, help="torch.compile the predictor and the encoder")  # fmt: skip
# the loss: one step ahead, and further ahead on its own predictions
flag("--auto_steps", type=int, default=2, help="steps of the rollout loss")
flag("--loss_exp", type=float, default=1.0, help="1: L1, 2: half squared error")

flag = parser.add_argument_group("optimizer").add_argument
# a step takes --batch_size x --grad_accum x ranks clips
flag("--batch_size", "--per_device_batch_size", type=int, default=8, help="clips per rank and micro-batch")  # fmt: skip
flag("--grad_accum", "--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step")  # fmt: skip
# length of the run; an epoch is --ipe steps, however much data there is
flag("--epochs", "--num_epochs", type=int, default=315, help="epochs of --ipe steps")
flag("--ipe", type=int, default=300, help="steps of an epoch")
flag(
    "--max_steps",
    type=int,
    help="stop after this many steps; the learning rates stay those of the whole run",
)
# learning rate: warm-up from --start_lr, constant --lr, anneal to --final_lr
flag("--lr", "--learning_rate", type=float, default=4.25e-4, help="learning rate between warm-up and anneal")  # fmt: skip
flag("--start_lr", type=float, default=7.5e-5, help="learning rate at the start of the warm-up")
flag("--final_lr", type=float, default=0.0, help="learning rate of the last step")
flag("--warmup", type=int, default=15, help="epochs of linear warm-up")
flag("--anneal", type=int, default=15, help="epochs of linear anneal at the end")
# AdamW
flag("--weight_decay", type=float, default=0.04, help="AdamW decay of matrices")
flag("--grad_clip", "--gradient_clipping", type=float, default=0.0, help="largest gradient norm; 0 turns clipping off")  # fmt: skip
flag("--dtype", choices=["bfloat16", "float16", "float32"], help="autocast precision (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip

flag = parser.add_argument_group("run").add_argument
# checkpoints, and how to continue from them
flag("--out_dir", default="out/ac", help="folder of this run")
flag("--resume", action=switch, default=False, help="continue from the newest good checkpoint in --out_dir, if there is one")  # fmt: skip
flag("--save_every_freq", type=int, default=25, help="epochs between checkpoints that are kept for good")  # fmt: skip
flag("--keep_last", type=int, default=2, help="newest checkpoints to keep beside those (one is written each epoch)")  # fmt: skip
flag("--save_encoder", action=switch, default=False, help="put the frozen encoder into checkpoints, in Meta's layout")  # fmt: skip
# what it reports, and how often
flag("--val_every", type=int, default=1, help="epochs between validations")
flag("--log_every", "--log_every_n_steps", type=int, default=10, help="steps between log lines")
# the same seed gives the same weights and the same order of clips
flag("--seed", type=int, default=239, help="seed of weights and clip order")
flag("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
flag("--peak_tflops", type=float, help="TFLOP/s that the device can reach in --dtype, for MFU in the log (default: from its data sheet, for A100, H100 and a few more)")  # fmt: skip
# extras
flag("--wandb_project", help="also log to Weights & Biases (pip install wandb)")
flag("--dry_run", action=switch, default=False, help="check everything, run three steps, write nothing")  # fmt: skip

if __name__ == "__main__":
    # tests and loader processes import this file without our flags
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
    ActionScaler,
    Clips,
    StopSignal,
    collate,
    open_split,
    prefetch,
    read_names,
    vpt_loader,
    windows,
)
from evaluation.held_out import (
    METERS,
    MOVES_GAP,
    blank,
    gap_text,
    held_out,
    meter_summary,
    moves_gap,
)
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
    plot_curves,
    train_row,
)
from files.remote import cached
from files.shards import expand, line_warnings
from files.vpt import ACTION_SPACES, CONTINUOUS, ClipReader, hotbar_columns
from kernels import describe_kernels
from kernels.flops import forward_flops, peak_to_assume
from model import ACModel, Encoder, Predictor, channel_stats, copy_fitting, make_features_of
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

    # the schedule must fit into the run
    if args.warmup + args.anneal > args.epochs:
        parser.error(
            f"--warmup {args.warmup} and --anneal {args.anneal} do not fit into --epochs"
            f" {args.epochs}"
        )

    # action spaces are tables in files/vpt.py
    if args.action_space not in ACTION_SPACES:
        sizes = ", ".join(map(str, ACTION_SPACES))
        parser.error(f"--action_space {args.action_space} is none of {sizes}")

    # a guide has this flag; to ignore it could give another encoder than the one asked for
    if args.model_name:
        parser.error(
            "--model_name is not used: the encoder's size is read from its weights (--encoder)"
        )

    # Meta's code would take a predicted change for features
    if args.save_encoder and args.predict == "change":
        parser.error(
            "--save_encoder writes Meta's layout, in which predictors give features: drop"
            " --save_encoder, or --predict change"
        )

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
    shards = [expand(group) for group in [*data, *(val_data or [])]]
    is_path = args.encoder and "://" not in args.encoder
    if is_path and args.encoder not in [*weights.RELEASED, *weights.ARCHITECTURES]:
        weights.find_encoder(args.encoder, "")
    if args.init_from and not os.path.exists(args.init_from):
        raise FileNotFoundError(f"--init_from {args.init_from}: no such file or run folder")

    only = None if args.recordings is None else read_names(args.recordings)

    # the scaler must be of the same actions and the same step; if the file is missing, the error
    # shows the command that fits one
    suggested_flags = (
        f"--data {' '.join(sum(data, []))} --fps {args.fps:g} --frames_per_step"
        f" {args.frames_per_step} --val_fraction {val_fraction:g}"
    )
    if args.recordings:
        suggested_flags += f" --recordings {args.recordings}"
    scaler = ActionScaler.load(args.scaler, suggested_flags)
    scaler.check(args.scaler, CONTINUOUS, args.fps, args.frames_per_step)

    # one process at a time may write to the folder
    if rank == 0 and not args.dry_run:
        checkpoint.lock(args.out_dir)
    print0(f"reading {count_text(len(sum(shards, [])), 'shard')}")

    # a clip: how it is cut and seen; shards of features must have been made in the same way
    action_names = ACTION_SPACES[args.action_space]
    hotbar = hotbar_columns(action_names)
    clip_settings = {
        "encode": args.encode,
        "fps": args.fps,
        "frames_per_step": args.frames_per_step,
        "crop_size": args.crop_size,
        "frames_per_clip": args.frames_per_clip,
    }

    # how actions and frames are read
    reader_options = {
        "action_space": args.action_space,
        "scaler": scaler,
        "decoder": args.decoder,
        "gui": args.gui,
    }

    # augmentation is for training; validation takes clips as they are
    augmentation = {
        "horizontal_flip": args.horizontal_flip,
        "random_resize_scale": args.random_resize_scale,
        "motion_shift": args.motion_shift,
        "temporal_jitter": args.temporal_jitter,
        "action_noise": args.action_noise,
    }
    reader = ClipReader(**clip_settings, **reader_options, **augmentation)
    val_reader = ClipReader(**clip_settings, **reader_options)

    # shards at URLs are copied to a local disk when they are first needed
    groups = data
    if args.cache_dir:
        local = cached(shards, args.cache_dir, args.cache_size, print0)
        groups = local[: len(data)]
        val_data = local[len(data) :] or None

    # recordings are held out whole: clips of one recording resemble each other
    train, shares, val, bad = open_split(
        groups, args.data_weights, val_data, val_fraction, args.max_bad_fraction, only
    )
    if bad:
        print0(
            f"{count_text(len(bad), 'recording')} cannot be used, {' '.join(bad[0])} among them;"
            " all are listed in bad_clips.jsonl"
        )

    # recordings that can be read may still be odd: no key is ever held, or its name is unknown
    for line in line_warnings(train + val) if rank == 0 else []:
        print0(f"WARNING: {line}")

    # training goes ahead without validation, but then nothing shows whether the action is used
    if args.val_clips and not val:
        print0(
            "WARNING: nothing to validate on: streams and single recordings cannot be split; pass"
            " --val_data"
        )

    # the scaler must not have seen the held-out recordings. It lists its recordings if they are at
    # most 1000; otherwise it only knows which share was held out when it was fitted
    held_out_names = {record.name for record in val}
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

    # validation sees each clip once, in the same order whatever the number of ranks. Its action gap
    # gives a clip the actions of another one, so two clips are the least
    val_set = Clips(val, [1.0] * len(val), val_reader, args.seed)
    if val and sum(map(len, windows(val_set, 1, 2))) < 2:
        raise ValueError(
            "the held-out recordings contain fewer than two clips: hold out more, or pass"
            " --val_clips 0"
        )

    # stored features are of unaugmented pixels: too late to flip or move them
    if train and "safetensors" in train[0].members:
        for name, value in augmentation.items():
            if value != parser.get_default(name) and name != "action_noise":
                raise ValueError(
                    f"--{name} needs pixels, and these shards hold features: train on the video"
                    " shards, or drop the flag"
                )

    # --- model ---
    # the frozen encoder; shards of features need none
    encoder, feature_source = open_source(
        train + val if train else [], args.encoder, **clip_settings
    )
    grid = feature_source["grid"]

    # in bfloat16 the encoder takes half the memory; a copy of it in checkpoints must stay exact
    if encoder is not None:
        if args.tubelet_size not in (None, encoder.tubelet_size):
            raise ValueError(
                f"--tubelet_size {args.tubelet_size}, but this encoder merges"
                f" {encoder.tubelet_size} frames"
            )
        if args.save_encoder and not isinstance(encoder, Encoder):
            raise ValueError(
                f"--save_encoder writes Meta's layout, and --encoder {args.encoder} is no V-JEPA"
                " encoder: drop the flag, and keep its files"
            )
        encoder_in_bf16 = args.dtype == "bfloat16" and not args.save_encoder
        encoder.to(device, torch.bfloat16 if encoder_in_bf16 else torch.float32)
    elif args.save_encoder:
        raise ValueError(
            "--save_encoder: these shards contain features: name the --encoder that made them"
        )

    # the predictor: the features, actions and states so far -> the features of the next step
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    predictor = Predictor(
        feature_source["embed_dim"],
        len(action_names),
        2,  # dims of the state
        (grid, grid),
        predict=args.predict,
        **size,
    ).to(device)
    predictor.activation_checkpointing = args.activation_checkpointing

    # one forward gives both losses: DDP synchronises the gradients of a single forward
    model = ACModel(predictor, args.auto_steps, args.loss_exp)

    # which kernels will run depends on dtype, GPU and these sizes
    num_parameters = sum(p.numel() for p in predictor.parameters())
    tokens_per_step = grid**2 + 2
    predicted_steps = args.frames_per_clip // args.frames_per_step - 1
    kernels = describe_kernels(
        device,
        getattr(torch, args.dtype),
        predictor.head_dim,
        tokens_per_step,
        tokens_per_step * predicted_steps,
    )
    print0(
        f"predictor {num_parameters:,} parameters; {grid}x{grid} patches x"
        f" {feature_source['embed_dim']}, encoder {feature_source['encoder_hash']}; {kernels}"
    )

    # batch -> what the predictor takes, on the device. The means and stds of the feature channels
    # are filled in below, from the checkpoint or by measuring, for --feature_norm standardize
    feature_stats = {"mean": None, "std": None}
    features_of = make_features_of(
        encoder, args.encode, args.frames_per_step, feature_stats, device, autocast
    )

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
        "action_names": action_names,
        "scaler_hash": scaler.hash,
        **feature_source,
        **size,
        "decoder": decoder_of(train + val, args.decoder),
        "predict": args.predict,
        "encode": args.encode,
        "fps": args.fps,
        "frames_per_step": args.frames_per_step,
        "frames_per_clip": args.frames_per_clip,
        "feature_norm": args.feature_norm,
        "ipe": args.ipe,
    }

    # resume from the newest checkpoint that is whole; without any, --resume starts a new run
    state = None
    path = None
    if args.resume:
        state, path = checkpoint.load_latest(args.out_dir)
    if state is not None:
        # files of older versions lack these two
        state.setdefault("decoder", state["args"].get("decoder", "pyav"))
        state.setdefault("predict", "features")

        for name, value in must_match.items():
            if state.get(name) != value:
                raise ValueError(
                    f"{path} was trained with {name} {state.get(name)}, this run has {value}:"
                    " resume with the same, or start a new run in another --out_dir"
                )

        # the next step will be the one that would have come without the interruption
        predictor.load_state_dict(weights.predictor_weights(state))
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

    # or start from other weights
    elif args.init_from:
        # tensors are matched by name and shape. What was not taken is printed: a silent
        # mismatch would look like bad weights
        file = args.init_from
        if os.path.isdir(file):
            file = os.path.join(file, checkpoint.LATEST)
        tensors = weights.part_of(file, "predictor", "predictor_embed.weight")
        taken, reinitialised, left_over = copy_fitting(predictor, tensors)
        print0(
            f"--init_from: {len(taken)} tensors taken; initialised again:"
            f" {weights.shorten_list(reinitialised)}; left over: {weights.shorten_list(left_over)}"
        )

    # a new run measures the channels on 256 clips, shared among the ranks; a resumed one has them
    if state is None and args.feature_norm == "standardize":
        if not train:
            raise ValueError(
                "--feature_norm standardize measures the features first, which needs local shards"
            )
        sample = Clips(train, shares, val_reader, args.seed)
        raw = (
            features_of(collate([sample[i] for i in items]), normalize=False)[0]
            for items in windows(sample, args.batch_size, 256, rank, world)
        )
        feature_stats |= channel_stats(raw, feature_source["embed_dim"], device)

    # how far this run goes: the schedule's end, --max_steps, or three steps to try it
    last_step = min(total_steps, args.max_steps or total_steps)
    if args.dry_run:
        last_step = min(last_step, step + 3)
    next_command = f"python eval.py --checkpoint {args.out_dir}"

    # a finished job that SLURM starts again must end well
    if step >= last_step:
        print0(f"nothing left to do: {step} steps are done; judge them with: {next_command}")
        if world > 1:
            dist.destroy_process_group()
        sys.exit()

    # the shapes of training never change: compile for these alone
    if args.compile:
        model.compile(dynamic=False)
        if encoder is not None:
            encoder.compile(dynamic=False)

    # DDP averages gradients over the ranks; as views of its buckets they need no second copy
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model

    # columns of train.csv and val.csv; a resumed run drops rows after its checkpoint
    losses_of_a_row = ["jloss", "sloss"]
    train_columns = ["epoch", "itr", *losses_of_a_row, "total_loss", "lr", "grad_norm"]
    train_columns += ["clips_per_s", "data_wait", "memory_mib", "bytes_per_s", "mfu"]
    val_columns = ["epoch", *losses_of_a_row, *METERS, *MOVES_GAP]
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
        "stage": "ac",
        "data": data,
        "val_data": args.val_data,
        "recordings": only,
        "val_fraction": args.val_fraction,
        "val_clips": args.val_clips,
        "cache_dir": args.cache_dir,
        "cache_size": args.cache_size,
        **clip_settings,
        "action_space": args.action_space,
        "gui": args.gui,
        "decoder": args.decoder,
        "encoder": args.encoder,
        "save_encoder": args.save_encoder,
        "feature_norm": args.feature_norm,
        "predict": args.predict,
        "auto_steps": args.auto_steps,
        "loss_exp": args.loss_exp,
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
        # as tensors, because torch.load(weights_only=True) refuses numpy arrays
        arrays = ("mean", "var", "scale")
        action_scaler = scaler._asdict()
        for name in arrays:
            action_scaler[name] = torch.tensor(action_scaler[name])

        # all that --resume, eval.py and plan.py need
        state = {
            "format": checkpoint.FORMAT,
            "settings": settings,
            "predictor": predictor.state_dict(),
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
            "action_scaler": action_scaler,
            "held_out": sorted(held_out_names),
            "wandb_id": wandb_id,
            **must_match,
        }

        # with these keys Meta's own code loads the file
        if args.save_encoder:
            state |= weights.meta_state(encoder, predictor)

        # written in a thread while training continues. The write is atomic: a run that is killed
        # keeps its previous checkpoint
        path = writer.save(args.out_dir, state, epoch, itr, args.keep_last, args.save_every_freq)
        plot_curves(args.out_dir, args.ipe)
        return path

    def validate(epoch):
        """Losses and the action meter on the held-out clips of all ranks: (a row of val.csv, a
        line about it)."""
        # each rank evaluates a share of the clips and gets the results of all
        errors, recordings, failed = held_out(
            predictor,
            val_set,
            features_of,
            args.batch_size,
            args.val_clips,
            args.num_workers,
            args.auto_steps,
            args.loss_exp,
            autocast,
            hotbar=hotbar,
        )
        note_bad(failed)

        # means over clips, and over recordings for the intervals
        row = {"epoch": epoch}
        for name in losses_of_a_row:
            row[name] = errors.pop(name).mean().item()
        row |= meter_summary(errors, recordings)
        row |= moves_gap(errors, recordings)

        # the line for the terminal: is it better than copying, and does it use the action?
        gap = gap_text(row["tf_gap"], row["tf_gap_low"], row["tf_gap_high"], recordings)
        if not math.isnan(row["ro_gap"]):
            gap += f"; rolled out {row['ro_gap']:+.2%}"
        if hotbar:
            gap += f"; without the hotbar {row['moves_gap']:+.2%}"
        return row, f"skill {row['tf_skill']:.3f} (error / copying), action gap {gap}"

    # --- train ---
    # SLURM's SIGTERM and Ctrl-C: the loop ends its step and saves
    stop = StopSignal()
    if not args.dry_run:
        stop.listen()

    # the loader starts where the checkpoint stopped: the order of clips depends on the seed alone
    loader = vpt_loader(
        (train, shares) if train else groups,
        args.batch_size,
        reader=reader,
        data_weights=args.data_weights,
        num_workers=args.num_workers,
        batches_per_epoch=args.ipe * args.grad_accum,
        epoch=step // args.ipe,
        itr=step % args.ipe * args.grad_accum,
        seed=args.seed,
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
        losses = torch.zeros(2, device=device)
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

            # DDP averages gradients once a step: on the last micro-batch
            last_micro = micro == args.grad_accum - 1
            with contextlib.nullcontext() if last_micro or world == 1 else ddp.no_sync():
                z, actions, states = features_of(batch)
                with autocast():
                    jloss, sloss = ddp(z, actions, states)
                loss = (jloss + sloss) / args.grad_accum
                loss_scaler.scale(loss).backward()

            # once, for MFU: the encoder only goes forward; the predictor's backward pass takes twice
            # as much as its forward pass
            if peak and not step_flops:
                flops = 3 * forward_flops(model, z, actions, states)
                flops += forward_flops(features_of, batch)
                step_flops = args.grad_accum * flops

            # a mean over micro-batches, left on the GPU: reading it here would wait
            losses += torch.stack([jloss.detach(), sloss.detach()]) / args.grad_accum

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
                jloss, sloss = row.losses
                place = f"epoch {row.epoch}, itr {row.itr}"
                check_finite(row, jloss + sloss, place, args.out_dir, args.dtype)
                columns = train_row(row, losses_of_a_row, seconds, wait, world, memory, mfu)
                columns["total_loss"] = jloss + sloss
                columns["bytes_per_s"] = row.bytes_read / seconds
                if writes:
                    log("train", columns, row.epoch * args.ipe + row.itr)

            # the terminal shows the last of these steps
            place = f"epoch {epochs_done:3d} itr {inside:4d}"
            text = f"jloss {jloss:.4f}  sloss {sloss:.4f}"
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
                    log("val", blank(row), step)
                place = f"{step} steps" if inside else f"epoch {epochs_done}"
                print0(f"held out after {place}: {text}")

                # the usual failure: the loss falls, and the action is ignored. The hotbar does not
                # count
                if row["moves_gap"] < 0.02 and epochs_done > args.warmup:
                    print0(
                        "WARNING: shuffled actions cost less than 2 %: the predictor hardly uses"
                        " the action (yet)"
                    )
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
        kept = args.keep_last
        if args.save_every_freq:
            kept += args.epochs // args.save_every_freq
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
        print0(checkpoint.disk_text(args.out_dir, kept, with_adam))

        # the next command
        print0("to train, run the same command without --dry_run")
    elif halt:
        print0(
            f"stopped at epoch {epochs_done}, itr {inside}; saved {path}; continue with --resume"
        )
    else:
        print0(f"{step} of {total_steps} steps done; saved {path}; judge it with: {next_command}")

    # --- end --- (same in every train_*.py)
    # all ranks leave together; a process that just exits can hang the others
    if world > 1:
        del ddp  # its threads must end before Python does (pytorch/pytorch#190489)
        gc.collect()
        dist.destroy_process_group()
