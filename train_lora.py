"""Fine-tune an action-conditioned predictor (V-JEPA 2-AC) on robot episodes with LoRA, or train all
of one, on a frozen V-JEPA encoder.

On a laptop, with a small base:

    python train_lora.py --data robot/b/*.tfrecord* --scaler robot/b.pkl --base robot/base.pt \\
        --encoder vit_tiny --crop_size 64

On 8 GPUs, from Meta's AC file:

    torchrun --nproc_per_node=8 train_lora.py \\
        --data 'gs://gresearch/robotics/droid/1.0.1/*.tfrecord*'

Reads robot episodes (droid.py), or features of them (encode.py --dataset droid), and the scaler of
fit_scaler.py. Writes to --out_dir: adapter/ (PEFT's files), train.csv, val.csv, curves.png,
bad_clips.jsonl, args.json and checkpoints. You can stop it at any time and continue with
--resume."""

import argparse
import contextlib
import functools
import gc
import importlib.util
import itertools
import math
import os
import re
import signal
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
flag("--data", "--data_path", nargs="+", action="extend", required=True, help="TFRecords, LeRobot data sets, trajectory.h5, NAME.npz, features (.tar), folders, globs, URLs; may be repeated")  # fmt: skip
flag("--val_data", nargs="+", action="extend", help="held-out episodes; may be repeated (default: --val_fraction of --data)")  # fmt: skip
flag("--val_fraction", type=float, default=0.1, help="share of the episodes held out")
flag("--val_clips", type=int, default=256, help="held-out clips to validate on; 0 turns validation off")  # fmt: skip
# actions are given to the predictor with mean 0 and std 1
flag("--scaler", default="droid_action_scaler.pkl", help="action statistics from fit_scaler.py --dataset droid; folded into the base")  # fmt: skip
flag("--no_scale", action="store_true", help="leave actions unscaled (Meta's setting)")
# a clip: by default 8 frames in 2 s, a step each
flag("--frames_per_clip", type=int, default=8, help="sampled frames of a clip, one a step")
flag("--fps", type=float, default=4.0, help="sampled frames a second")
flag("--stride", type=int, help="rows between sampled frames in place of --fps; 15 is Meta's on raw DROID")  # fmt: skip
flag("--crop_size", type=int, default=256, help="pixels of the square crop")
flag("--crop", default="reference", choices=["reference", "square"], help="reference: the centre, at most 1.35:1, squeezed to a square as Meta does")  # fmt: skip
# which parts of an episode are used, and seen by which camera
flag("--camera", "--camera_view", nargs="+", action="extend", help="cameras; each clip draws one of them (default: exterior_1)")  # fmt: skip
flag("--idle_filter", default="light", choices=["off", "openpi", "light"], help="leave out stretches without motion (droid.py)")  # fmt: skip
flag("--success", default="all", choices=["all", "only"], help="only: leave out failed episodes")
# a robot whose actions are no poses of a gripper
flag("--state_keys", nargs="+", action="extend", help="fields of the state (default: the 7-D pose); other ones need --action_keys")  # fmt: skip
flag("--action_keys", nargs="+", action="extend", help="fields of the action (default: differences of the pose)")  # fmt: skip
# augmentation, off by default; all but --action_noise need pixels, not stored features
flag("--random_resize_scale", type=float, default=1.0, help="smallest part of the crop that a clip shows, as a share of its sides")  # fmt: skip
flag("--color_jitter", type=float, default=0.0, help="change brightness, contrast and saturation of a clip by up to this share")  # fmt: skip
flag("--temporal_jitter", type=int, default=0, help="move each sampled frame by up to this many rows")  # fmt: skip
flag("--action_noise", type=float, default=0.0, help="std of noise on the scaled actions")  # fmt: skip
# reading
flag("--verify", action=switch, help="first read all TFRecords once to check their checksums (default: for files up to 50 GB)")  # fmt: skip
flag("--max_bad_fraction", type=float, default=0.01, help="stop if more than this share of clips cannot be read (after 100 clips)")  # fmt: skip
flag("--num_workers", type=int, default=min(8, cpus), help="loader processes of each rank; the default is the usable CPUs, at most 8")  # fmt: skip
flag("--prefetch_factor", type=int, default=2, help="batches that each loader process has ready")

flag = parser.add_argument_group("model and loss").add_argument
# what to start from; the encoder stays frozen
flag("--base", "--predictor_path", default="vjepa2_ac_vitg", help="predictor to start from: Meta's file, a run, a checkpoint or an --export; none: random weights")  # fmt: skip
flag("--encoder", "--encoder_path", "--pretrain_checkpoint", help="weights of the frozen encoder: a path, URL or name, or vit_tiny, random weights (default: the encoder in --base)")  # fmt: skip
flag("--model_name", help="refused: the encoder's size is read from its weights (--encoder)")
# what is trained: adapters, or all of the predictor
flag("--full", action=switch, default=False, help="train all of the predictor, without adapters")
flag("--init_from", help="start from these weights: the folder of a PEFT adapter, which decides --lora_r --alpha --targets; a predictor here is the same as --base")  # fmt: skip
# LoRA, as in PEFT: a layer W becomes W + scale * B A
flag("--targets", "--target_modules", nargs="+", action="extend", help="layers to adapt: any of q_proj k_proj v_proj o_proj mlp.fc1 mlp.fc2 (default: all)")  # fmt: skip
flag("--lora_r", "--r", dest="r", type=int, default=16, help="rank of the adapters; do not write --r under torchrun, which takes it for one of its own --rdzv flags")  # fmt: skip
flag("--alpha", "--lora_alpha", type=float, default=32.0, help="adapters are multiplied by alpha / sqrt(r), without --rslora by alpha / r")  # fmt: skip
flag("--dropout", "--lora_dropout", type=float, default=0.05, help="dropout before the adapters")
flag("--rslora", "--use_rslora", action=switch, default=True, help="divide alpha by sqrt(r) rather than r")  # fmt: skip
flag("--fused_qkv", action=switch, default=False, help="one adapter for q, k and v, as stock PEFT, rather than one each")  # fmt: skip
# layers that are trained whole, beside the adapters
flag("--train_condition_encoders", action=switch, default=False, help="also train what encodes action and state (new dimensions: always)")  # fmt: skip
# a predictor from random weights (--base none)
flag("--feature_norm", default="layer", choices=["layer", "standardize"], help="with --base none; standardize: also give every feature channel mean 0 and std 1, before the layer norm")  # fmt: skip
flag("--pred_dim", "--pred_embed_dim", type=int, default=1024, help="width of the predictor, with --base none")  # fmt: skip
flag("--pred_depth", type=int, default=24, help="blocks of the predictor, with --base none")
flag("--pred_heads", "--pred_num_heads", type=int, help="attention heads of the predictor (default: those of the base, 16 with --base none)")  # fmt: skip
flag("--predict", choices=["features", "change"], help="change: the output is added to the step's own features (default: as the base, features with --base none)")  # fmt: skip
# less memory, more speed
flag("--activation_checkpointing", "--use_activation_checkpointing", "--gradient_checkpointing", action=switch, default=False, help="recompute blocks in the backward pass to save memory")  # fmt: skip
flag("--compile", "--compile_model", action=switch, default=False, help="torch.compile the predictor and the encoder")  # fmt: skip
# the loss: one step ahead, and further ahead on its own predictions
flag("--auto_steps", type=int, default=2, help="steps of the rollout loss")

flag = parser.add_argument_group("optimizer").add_argument
# a step takes --batch_size x --grad_accum x ranks clips
flag("--batch_size", "--per_device_batch_size", type=int, default=8, help="clips per rank and micro-batch")  # fmt: skip
flag("--grad_accum", "--gradient_accumulation_steps", type=int, default=16, help="micro-batches per step")  # fmt: skip
# length of the run
flag("--max_steps", type=int, default=100_000, help="stop after this many steps; the schedule ends there too, unless --schedule_steps says otherwise")  # fmt: skip
flag("--schedule_steps", type=int, help="steps of the schedule (default: --max_steps)")
# learning rate: warm-up, constant --lr, anneal to 0
flag("--lr", "--learning_rate", type=float, default=2e-4, help="learning rate between warm-up and anneal")  # fmt: skip
flag("--warmup_steps", type=int, default=500, help="steps of linear warm-up")
flag("--anneal_steps", type=int, help="steps of linear anneal at the end (default: a tenth of the schedule)")  # fmt: skip
# AdamW
flag("--weight_decay", type=float, default=0.01, help="AdamW decay of matrices")
flag("--grad_clip", "--gradient_clipping", type=float, default=1.0, help="largest gradient norm; 0 turns clipping off")  # fmt: skip
flag("--optim", default="adamw", choices=["adamw", "adamw8bit"], help="adamw8bit: moments in 8 bits (pip install bitsandbytes)")  # fmt: skip
flag("--dtype", choices=["bfloat16", "float16", "float32"], help="autocast precision (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip

flag = parser.add_argument_group("run").add_argument
# checkpoints, and how to continue from them
flag("--out_dir", default="out/lora", help="folder of this run")
flag("--resume", action=switch, default=False, help="continue from the newest good checkpoint in --out_dir (or --sync_to), if there is one")  # fmt: skip
flag("--save_every_n_steps", type=int, default=1000, help="steps between checkpoints")
flag("--keep_last", type=int, default=2, help="checkpoints to keep")
# what it reports, and how often
flag("--eval_every_n_steps", type=int, default=500, help="steps between validations")
flag("--log_every", "--log_every_n_steps", type=int, default=10, help="steps between log lines")
# copies for others, and in another place
flag("--export", help="at the end write the merged predictor, for unscaled actions, to this file in Meta's layout")  # fmt: skip
flag("--sync_to", help="copy the run's folder to this fsspec URL in the background, and resume from there")  # fmt: skip
flag("--sync_minutes", type=float, default=30.0, help="minutes between copies")
# the same seed gives the same weights and the same order of clips
flag("--seed", type=int, default=239, help="seed of weights and clip order")
flag("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
flag("--peak_tflops", type=float, help="TFLOP/s that the device can reach in --dtype, for MFU in the log (default: from its data sheet, for A100, H100 and a few more)")  # fmt: skip
# extras
flag("--wandb_project", help="also log to Weights & Biases (pip install wandb)")
# trying it out
flag("--dry_run", action=switch, default=False, help="check everything, run three steps, write nothing")  # fmt: skip
flag("--debug", action=switch, default=False, help="three steps on one clip with all checks, write nothing")  # fmt: skip
flag("--memory_report", action=switch, default=False, help="estimate memory by part, measure it over three steps, write nothing")  # fmt: skip

if __name__ == "__main__":
    # tests and loader processes import this file without our flags
    args = parser.parse_args()

# heavy imports come after parsing: --help answers at once
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# ours: model.py has the predictor, the LoRA layers and the losses, droid.py makes batches of
# episodes, weights.py opens bases and writes adapters, checkpoint.py saves this run
import checkpoint
import weights
from data import ActionScaler, collate, prefetch, windows
from droid import (
    POSE,
    DroidClips,
    DroidReader,
    compose_poses,
    droid_clips,
    find_episodes,
    open_droid,
)
from evaluation.held_out import (
    base_columns,
    check_adapters,
    compare_with_base,
    held_out,
    hold_state,
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
from files.mirror import Mirror
from kernels import describe_kernels
from kernels.flops import forward_flops, peak_to_assume
from model import (
    TARGETS,
    ACModel,
    channel_stats,
    lora_layers,
    make_features_of,
    size_of,
    without_lora,
)
from weights import (
    adapt,
    encoder_hash,
    export,
    fetch,
    fold_scaler,
    open_base,
    open_source,
    save_adapter,
    scale_warnings,
)


# --- helpers ---
def lr_at(step, total_steps, warmup, anneal, lr):
    """Learning rate of a step (from 1): `warmup` steps of linear warm-up, constant, and a linear
    anneal over the last `anneal` steps, which would reach 0 after step `total_steps`."""
    # a trapezoid is the lowest of three lines: rising, flat, falling
    return lr * min(1, step / max(warmup, 1), (total_steps - step + 1) / max(anneal, 1))


def is_predictor(path):
    """Whether --init_from is a file of weights or the folder of a run, and no PEFT adapter."""
    # a run folder has a newest checkpoint; a PEFT folder has none
    if os.path.isdir(path):
        return os.path.exists(os.path.join(path, checkpoint.LATEST))
    return os.path.isfile(path) and not os.path.basename(path).startswith("adapter_")


if __name__ == "__main__":
    # what the user can fix is printed as one line, everything else as a traceback
    sys.excepthook = checkpoint.short_excepthook

    # wrong flags end the run here, before anything is read or written
    for name in (
        "batch_size",
        "grad_accum",
        "max_steps",
        "schedule_steps",
        "r",
        "log_every",
        "save_every_n_steps",
        "eval_every_n_steps",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            # the name that users give
            name = {"r": "lora_r"}.get(name, name)
            parser.error(f"--{name} {value} is too small: use 1 or more")

    # a schedule that ends early would leave a learning rate of 0 for the rest
    if args.schedule_steps and args.schedule_steps < args.max_steps:
        parser.error(
            f"--schedule_steps {args.schedule_steps} ends before --max_steps {args.max_steps}"
        )

    # a guide has this flag; to ignore it could give another encoder than the one asked for
    if args.model_name:
        parser.error(
            "--model_name is not used: the encoder's size is read from its weights (--encoder)"
        )

    # both are optional: say now what is missing, not after minutes of reading
    if args.wandb_project and not importlib.util.find_spec("wandb"):
        parser.error("--wandb_project needs the package wandb: pip install wandb")
    if args.optim == "adamw8bit" and not importlib.util.find_spec("bitsandbytes"):
        parser.error("--optim adamw8bit needs the package bitsandbytes: pip install bitsandbytes")

    # in train_ac.py --init_from names a predictor; here that is --base, and --init_from names
    # adapters
    if args.init_from and is_predictor(args.init_from):
        if args.base != parser.get_default("base"):
            parser.error(f"--init_from {args.init_from} is a predictor, as --base is: give one")
        args.base = args.init_from
        args.init_from = None

    # argparse would add what is given to a default list, so the defaults of lists are set here
    args.camera = args.camera or ["exterior_1"]
    args.targets = args.targets or [*TARGETS]

    # --debug learns one clip by heart
    if args.debug:
        args.batch_size = 1
        args.grad_accum = 1

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
    dry = args.dry_run or args.debug or args.memory_report
    if not args.resume and not dry:
        checkpoint.check_unused(args.out_dir)

    # --val_data takes the place of a split of --data; --val_clips 0 turns both off
    val_data = args.val_data if args.val_clips else None
    val_fraction = args.val_fraction if args.val_clips and not args.val_data else 0.0

    # a pattern or a path without a file is an error now, not after the base is loaded. URLs are
    # looked at later: asking a server takes time
    for pattern in [*args.data, *(val_data or [])]:
        if "://" not in pattern:
            find_episodes(pattern)
    known_names = ["none", *weights.RELEASED, *weights.ARCHITECTURES]
    is_path = args.encoder and "://" not in args.encoder
    if is_path and args.encoder not in known_names:
        weights.find_encoder(args.encoder, "")
    is_path = "://" not in args.base and args.base not in known_names
    if is_path and not os.path.exists(args.base):
        raise FileNotFoundError(
            f"--base {args.base}: no such file or run folder, and none of the names"
            f" {', '.join(weights.RELEASED)}"
        )
    if args.init_from and not os.path.exists(args.init_from):
        raise FileNotFoundError(
            f"--init_from {args.init_from}: no such folder, so no PEFT adapter and no predictor"
        )

    # if there is no scaler yet, the error shows the command that fits one
    suggested_flags = (
        f"--dataset droid --data {' '.join(args.data)} --fps {args.fps:g} --frames_per_clip"
        f" {args.frames_per_clip} --val_fraction {val_fraction:g}"
    )
    if args.stride:
        suggested_flags += f" --stride {args.stride}"
    for name in ("state_keys", "action_keys"):
        if getattr(args, name):
            suggested_flags += f" --{name} {' '.join(getattr(args, name))}"
    scaler = None if args.no_scale else ActionScaler.load(args.scaler, suggested_flags)

    # one process at a time may write to the folder. On a new machine it is filled from --sync_to
    # first, and the other ranks wait for that
    mirror = None
    if rank == 0 and not dry:
        checkpoint.lock(args.out_dir)
        if args.sync_to:
            mirror = Mirror.open(args.out_dir, args.sync_to, args.sync_minutes, args.resume)
    if world > 1:
        dist.barrier()
    print0(f"reading {' '.join(args.data)}")

    # episodes to train on and to hold out; they are held out whole, because clips of one episode
    # resemble each other
    reader = DroidReader(
        args.frames_per_clip,
        args.fps,
        args.crop_size,
        args.crop,
        args.camera,
        args.stride,
        args.state_keys,
        args.action_keys,
    )
    train, val, bad = open_droid(
        args.data,
        val_data,
        val_fraction,
        reader,
        idle_filter=args.idle_filter,
        success=args.success,
        max_bad_fraction=args.max_bad_fraction,
        verify=args.verify,
        log=print0,
    )

    # what the files call the dims of an action
    action_names = reader.names
    if bad:
        print0(
            f"{count_text(len(bad), 'episode')} cannot be used, {' '.join(bad[0])} among them; all"
            " are listed in bad_clips.jsonl"
        )

    # without a scaler nothing is scaled: mean 0 and std 1 for every dim
    if args.no_scale:
        ones = np.ones(len(action_names))
        scaler = ActionScaler(0 * ones, ones, ones, 0, {})

    # it must be of these actions and this frame rate
    scaler.check(args.scaler, action_names, args.fps, 1, args.stride or 0)
    reader.scaler = scaler

    # augmentation is for training; validation takes clips as they are
    augmentation = {
        "random_resize_scale": args.random_resize_scale,
        "color_jitter": args.color_jitter,
        "temporal_jitter": args.temporal_jitter,
        "action_noise": args.action_noise,
    }
    val_reader = reader
    reader = reader.augmented(**augmentation)

    # stored features are of unaugmented pixels: too late to cut, colour or move them
    if train[0].kind == "features":
        for name, value in augmentation.items():
            if value != parser.get_default(name) and name != "action_noise":
                raise ValueError(
                    f"--{name} needs pixels, and these files hold features: train on the episodes,"
                    " or drop the flag"
                )

    # the scaler must not have seen the held-out episodes. It lists its episodes if they are at
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
            " shards only (fit_scaler.py with the --val_fraction, --stride and --frames_per_clip of"
            " the training)"
        )

    # validation sees each clip once, in the same order whatever the number of ranks. Its action gap
    # gives a clip the actions of another one, so two clips are the least
    clips = DroidClips(train, reader, args.seed)
    val_set = DroidClips(val, val_reader, args.seed)
    if args.val_clips and sum(map(len, windows(val_set, 1, 2))) < 2:
        raise ValueError(
            "the held-out episodes contain fewer than two clips: hold out more, pass --val_data, or"
            " --val_clips 0"
        )

    # std of the unscaled actions, on 16 clips: scale_warnings compares it with that of the base
    plain = DroidClips(train, val_reader, args.seed)
    sample = [plain[i]["actions"] for items in windows(plain, 16, 16) for i in items]
    action_std = torch.cat(sample).std(0).double().numpy() * scaler.scale

    # --- model ---
    # the base is a path, a URL or a name; names and URLs are downloaded here
    has_features = train[0].kind == "features"
    base = "none" if args.base == "none" else fetch(args.base)
    if base == "none" and not (args.full and (args.encoder or has_features)):
        raise ValueError(
            "--base none has nothing to adapt: pass --full to train a predictor from random"
            " weights, and its --encoder"
        )

    # features must have been made with these settings
    clip_settings = {
        "encode": "frame",
        "fps": args.fps,
        "frames_per_step": 1,
        "crop_size": args.crop_size,
        "frames_per_clip": args.frames_per_clip,
    }

    # the frozen encoder: by default the one in the base's file. Features need none
    if has_features:
        encoder, feature_source = open_source(train + val, args.encoder, **clip_settings)
        encoder = None
    else:
        encoder, feature_source = open_source([], args.encoder or str(base), **clip_settings)
        encoder.to(device, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)
    grid = feature_source["grid"]

    # the predictor to start from. For a robot with other dims the layers of action and state are
    # initialised again
    wanted_size = {
        "pred_dim": args.pred_dim,
        "depth": args.pred_depth,
        "num_heads": args.pred_heads,
    }
    predictor, base_scaler, base_facts, reinitialised = open_base(
        base, feature_source, len(action_names), reader.state_dim, wanted_size, args.predict
    )

    # features of another encoder would give a bad start that looks like a bad base
    has_base = base != "none"
    if has_features and not args.encoder and has_base and "encoder_hash" not in base_facts:
        print0(
            f"{base} does not say which encoder it belongs to: features are of"
            f" {feature_source['encoder_hash']}; name --encoder to compare"
        )

    # the hash tells a resumed run that its base is still the same
    size = size_of(predictor)
    base_hash = encoder_hash(predictor)
    num_parameters = sum(p.numel() for p in predictor.parameters())

    # actions in other units than the base knows: the commonest mistake with a new robot
    new_scaler = None if args.no_scale else scaler
    for line in scale_warnings(reader, action_std, has_base, base_scaler, new_scaler):
        print0(line)

    # put adapters into it, or train all of it. The scaler is folded into the action encoder, so
    # training starts with the predictions of the base
    lora_options = None
    if not args.full:
        lora_options = {
            "targets": args.targets,
            "r": args.r,
            "alpha": args.alpha,
            "dropout": args.dropout,
            "rslora": args.rslora,
            "fused_qkv": args.fused_qkv,
        }

    # saved_modules: layers that adapter files contain whole; file_scaler: of the actions they take
    # (the base's own); starts_as_base: whether the first step predicts what the base predicts
    saved_modules, file_scaler, starts_as_base = adapt(
        predictor,
        base_scaler,
        reinitialised,
        scaler,
        lora_options,
        args.init_from,
        args.train_condition_encoders,
    )

    # adapter files and exports are for the actions of their base: this unfolds the scaler again
    action_encoder_for = functools.partial(fold_scaler, predictor.action_encoder, scaler)
    predictor.to(device).activation_checkpointing = args.activation_checkpointing

    # one forward gives both losses: DDP synchronises the gradients of a single forward
    model = ACModel(predictor, args.auto_steps)
    trained = {name: p for name, p in predictor.named_parameters() if p.requires_grad}
    num_trained = sum(p.numel() for p in trained.values())

    # which kernels will run depends on dtype, GPU and these sizes
    tokens_per_step = grid**2 + 2
    kernels = describe_kernels(
        device,
        getattr(torch, args.dtype),
        predictor.head_dim,
        tokens_per_step,
        (args.frames_per_clip - 1) * tokens_per_step,
    )
    print0(
        f"base {base}: {num_parameters:,} parameters on {grid}x{grid} patches, encoder"
        f" {feature_source['encoder_hash']}; {kernels}"
    )

    # how little is trained, and how small the file is that one shares
    if args.full:
        print0(f"{num_trained:,} of them trained")
    else:
        file_size = 0
        for layer in lora_layers(predictor).values():
            file_size += 4 * (layer.lora_A.numel() + layer.out_features * len(layer.lora_A))
        print0(
            f"adapters: {num_trained:,} parameters, {num_trained / num_parameters:.2%}; their file"
            f" {bytes_text(file_size)}"
        )

    # batch -> what the predictor takes, on the device. A base keeps the means and stds of the
    # feature channels that it was trained with
    feature_stats = {}
    for name, value in (base_facts.get("feature_stats") or {"mean": None, "std": None}).items():
        feature_stats[name] = None if value is None else value.to(device)
    features_of = make_features_of(encoder, "frame", 1, feature_stats, device, autocast)

    # a new predictor measures them on 256 clips, shared among the ranks
    if base == "none" and args.feature_norm == "standardize":
        raw = (
            features_of(collate([clips[i] for i in items]), normalize=False)[0]
            for items in windows(clips, args.batch_size, 256, rank, world)
        )
        feature_stats |= channel_stats(raw, feature_source["embed_dim"], device)

    # MFU in the log is the share of this that training reaches; None: not known
    peak = peak_to_assume(device, args.dtype, args.peak_tflops, print0)
    step_flops = None

    # --- optimizer, resume ---
    # weight decay on matrices only: biases and norms should not shrink
    matrices = [p for p in trained.values() if p.ndim > 1]
    vectors = [p for p in trained.values() if p.ndim <= 1]
    param_groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]

    # 8-bit moments save three quarters of their memory; with adapters there is little to save
    if args.optim == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(param_groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8)
    else:
        optimizer = torch.optim.AdamW(
            param_groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True
        )

    # float16 would lose small gradients: the loss is scaled up for them; otherwise a no-op
    loss_scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

    # steps done so far, those before a restart included
    step = 0
    total_steps = args.schedule_steps or args.max_steps
    anneal = total_steps // 10 if args.anneal_steps is None else args.anneal_steps

    # steps of an epoch: one pass over all frames. Only the order of clips depends on it
    frames_per_global_step = args.frames_per_clip * args.batch_size * args.grad_accum * world
    ipe = max(int(clips.cumulative[-1]) // frames_per_global_step, 1)

    # what a resumed run must have in common with its checkpoint: otherwise the weights load and
    # mean something else
    must_match = {
        "action_names": action_names,
        "scaler_hash": scaler.hash,
        "predict": predictor.predict,
        "base_hash": base_hash,
        "trained_parameters": num_trained,
        "ipe": ipe,
        **feature_source,
        **size,
        "fps": args.fps,
        "stride": args.stride,
        "frames_per_clip": args.frames_per_clip,
        "crop": args.crop,
        "targets": args.targets,
        "alpha": args.alpha,
        "rslora": args.rslora,
    }

    # resume from the newest checkpoint that is whole; without any, --resume starts a new run
    state = None
    path = None
    if args.resume:
        state, path = checkpoint.load_latest(args.out_dir)
    if state is not None:
        # files of older versions lack it
        state.setdefault("predict", "features")

        for name, value in must_match.items():
            if state.get(name) != value:
                hint = ""
                if name == "ipe":
                    hint = " (ranks x --batch_size x --grad_accum must stay)"
                raise ValueError(
                    f"{path} was trained with {name} {state.get(name)}, this run has {value}{hint}:"
                    " resume with the same, or start a new run in another --out_dir"
                )
        step = state["epoch"] * ipe + state["itr"]

    # how far this run goes: --max_steps, or three steps to try it
    last_step = args.max_steps
    if dry:
        last_step = min(last_step, step + 3)
    next_command = f"python eval.py --checkpoint {args.out_dir}"
    if dry and step >= last_step:
        raise ValueError(f"nothing left to try: {step} steps are done; raise --max_steps")

    # a rollout needs the state after each action. For poses it is computed; what the actions of
    # another robot do to its state is unknown, so the state stays
    is_pose = (action_names, reader.state_dim) == (POSE, 7)
    compose = compose_poses if is_pose else hold_state

    def note_bad(clips):
        """Clips that could not be read go into bad_clips.jsonl."""
        if not dry:
            rows = [dict(zip(("file", "key", "reason"), clip)) for clip in clips]
            append_jsonl(f"{args.out_dir}/bad_clips.jsonl", rows)

    def evaluate():
        """(errors {name: (n, K)} of all held-out clips, the episode of each)."""
        # each rank evaluates a share of the clips and gets the results of all
        errors, recordings, failed = held_out(
            predictor,
            val_set,
            features_of,
            args.batch_size,
            args.val_clips,
            args.num_workers,
            args.auto_steps,
            1.0,
            autocast,
            compose,
        )
        note_bad(failed)
        return errors, recordings

    # does fine-tuning help? The base is judged once on the same clips, before the checkpoint is
    # loaded
    base_errors = None
    if val and starts_as_base and step < last_step:
        with without_lora(predictor):
            base_errors, _ = evaluate()

    # the checkpoint contains what is trained; all other weights are the base's
    if state is not None:
        tensors = state["predictor" if args.full else "adapter"]
        predictor.load_state_dict(predictor.state_dict() | tensors)
        optimizer.load_state_dict(state["optimizer"])
        loss_scaler.load_state_dict(state["scaler"])
        for name, value in state["feature_stats"].items():
            feature_stats[name] = None if value is None else value.to(device)
        print0(
            f"resumed from {path} at step {step} of {total_steps};",
            changed_flags(state["args"], vars(args)),
        )

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
    train_columns += ["clips_per_s", "data_wait", "memory_mib", "mfu"]
    val_columns = ["epoch", "itr", *base_columns(args.frames_per_clip - 1)]
    headers = {
        "train": (train_columns, *divmod(step, ipe)),
        "val": (val_columns, *divmod(step + 1, ipe)),
    }

    # rank 0 writes; the id in the checkpoint continues the same W&B run
    wandb_id = (state or {}).get("wandb_id") or os.urandom(4).hex()
    writes = rank == 0 and not dry
    writer = checkpoint.Writer()
    log = None
    if writes:
        log = open_logs(
            args.out_dir, headers, vars(args), state is not None, args.wandb_project, wandb_id
        )

    # what a judge of the checkpoint must know, by names that stay when a flag is renamed
    settings = {
        "stage": "lora",
        "data": args.data,
        "val_data": args.val_data,
        "val_fraction": args.val_fraction,
        "val_clips": args.val_clips,
        **clip_settings,
        "stride": args.stride,
        "crop": args.crop,
        "cameras": args.camera,
        "state_keys": args.state_keys,
        "action_keys": args.action_keys,
        "idle_filter": args.idle_filter,
        "success": args.success,
        "encoder": args.encoder,
        "base": args.base,
        "full": args.full,
        "init_from": args.init_from,
        "lora": lora_options,
        "train_condition_encoders": args.train_condition_encoders,
        "feature_norm": args.feature_norm,
        "predict": predictor.predict,
        "auto_steps": args.auto_steps,
        "dtype": args.dtype,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "grad_accum": args.grad_accum,
    }

    def save(epoch, itr):
        """Write a checkpoint, the adapter in PEFT's form (its encoders are for the base's actions)
        and the curves (rank 0)."""
        # as tensors, because torch.load(weights_only=True) refuses numpy arrays
        arrays = ("mean", "var", "scale")
        action_scaler = scaler._asdict()
        for name in arrays:
            action_scaler[name] = torch.tensor(action_scaler[name])

        # a base of many GB need not be in every checkpoint: adapters are enough
        if args.full:
            tensors = {"predictor": predictor.state_dict()}
        else:
            tensors = {"adapter": {name: p.detach() for name, p in trained.items()}}

        # all that --resume and eval.py need
        state = {
            "format": checkpoint.FORMAT,
            "settings": settings,
            **tensors,
            "optimizer": optimizer.state_dict(),
            "scaler": loss_scaler.state_dict(),
            "epoch": epoch,
            "itr": itr,
            "world_size": world,
            "args": vars(args),
            "feature_stats": feature_stats,
            "action_scaler": action_scaler,
            "held_out": sorted(held_out_names),
            "wandb_id": wandb_id,
            **must_match,
        }

        # written in a thread while training continues. The write is atomic: a run that is killed
        # keeps its previous checkpoint
        path = writer.save(args.out_dir, state, epoch, itr, args.keep_last, keep_every=0)

        # PEFT's files, which other programs read too
        if not args.full:
            folder = os.path.join(args.out_dir, "adapter")
            file_encoder = action_encoder_for(file_scaler)
            save_adapter(predictor, folder, str(base), saved_modules, file_encoder)
        plot_curves(args.out_dir, ipe)
        return path

    # --- train ---
    # SLURM's SIGTERM and Ctrl-C set this: the loop ends its step and saves. It is on the CPU, where
    # reading it never waits for the GPU
    stop = torch.zeros(1)
    if not dry:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.fill_(1))

    # the loader starts where the checkpoint stopped: the order of clips depends on the seed alone
    loader = droid_clips(
        train,
        args.batch_size,
        reader=reader,
        batches_per_epoch=ipe * args.grad_accum,
        epoch=step // ipe,
        itr=step % ipe * args.grad_accum,
        seed=args.seed,
        rank=rank,
        world=world,
        num_workers=args.num_workers,
        prefetch_factor=args.prefetch_factor,
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

    # --debug trains on one clip again and again: its loss must fall, and only adapters may change
    if args.debug:
        one_clip = {k: v[:1] for k, v in next(batches).items() if k != "bytes"}
        batches = itertools.repeat(one_clip)
        checks = check_adapters(model, features_of(one_clip), autocast, trained)
        next(checks)

    # a run with nothing left to do says so at the end
    halt = False
    first_step = step
    while step < last_step:
        epoch, itr = divmod(step, ipe)

        # the rate depends on the step alone, so a resumed run follows the same curve. For the three
        # steps of --debug the warm-up would be too slow
        lr = lr_at(step + 1, total_steps, args.warmup_steps, anneal, args.lr)
        if args.debug:
            lr = args.lr
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward and backward, over --grad_accum micro-batches
        losses = torch.zeros(2, device=device)
        keys = []
        for micro in range(args.grad_accum):
            # how long the GPU waits for data is a column of train.csv: data_wait
            asked = time.perf_counter()
            batch = next(batches)
            data_seconds += time.perf_counter() - asked

            # a few clips may be bad, but not many
            note_bad(batch["bad"])
            keys += batch["key"]
            bad_clips += batch["bad"]
            clips_seen += len(batch["key"]) + len(batch["bad"])
            if clips_seen >= 100 and len(bad_clips) > args.max_bad_fraction * clips_seen:
                raise ValueError(
                    f"{len(bad_clips)} of {clips_seen} clips cannot be read, the last one is"
                    f" {' '.join(bad_clips[-1])}; see bad_clips.jsonl"
                )

            # dropout depends on the step alone: a resumed run needs no state of the generator
            torch.manual_seed(hash((args.seed, step, micro, rank)))

            # DDP averages gradients once a step: on the last micro-batch
            last_micro = micro == args.grad_accum - 1
            with contextlib.nullcontext() if last_micro or world == 1 else ddp.no_sync():
                z, actions, states = features_of(batch)
                with autocast():
                    jloss, sloss = ddp(z, actions, states)
                loss = (jloss + sloss) / args.grad_accum
                loss_scaler.scale(loss).backward()

            # once, for MFU: the encoder only goes forward. The predictor's backward pass takes as
            # much as its forward pass where weights are frozen, twice as much where they are trained
            if peak and not step_flops:
                flops = (3 if args.full else 2) * forward_flops(model, z, actions, states)
                flops += forward_flops(features_of, batch)
                step_flops = args.grad_accum * flops

            # a mean over micro-batches, left on the GPU: reading it here would wait
            losses += torch.stack([jloss.detach(), sloss.detach()]) / args.grad_accum

        # clip the gradient; with inf its norm is only measured, for the log
        loss_scaler.unscale_(optimizer)
        max_norm = args.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

        # step; in float16 a step with overflowed gradients is skipped
        loss_scaler.step(optimizer)
        loss_scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # tensors go into the row as they are; the next log line reads them
        steps_to_log.append(StepRow(epoch, itr, lr, losses, grad_norm, keys))
        step += 1

        # a signal may reach the ranks in different steps: they must agree where to stop
        halt = stop.clone()
        if world > 1:
            dist.all_reduce(halt, dist.ReduceOp.MAX)
        halt = bool(halt)

        # save every so many steps and wherever the run ends
        must_save = step % args.save_every_n_steps == 0 or step == last_step or halt
        must_evaluate = step % args.eval_every_n_steps == 0 or step == last_step

        # a checkpoint that could not be written ends the run
        writer.check()

        # once in a while: read the losses back, check them, log them
        # (a row for every step since the last time)
        if must_save or must_evaluate or step % args.log_every == 0:
            seconds = (time.perf_counter() - log_started) / len(steps_to_log)
            wait = data_seconds / len(steps_to_log)
            memory = checkpoint.peak_memory(device)
            mfu = step_flops / seconds / peak if peak else None
            for row in mean_over_ranks(steps_to_log, world):
                jloss, sloss = row.losses
                place = f"step {row.epoch * ipe + row.itr}"
                check_finite(row, jloss + sloss, place, args.out_dir, args.dtype)
                columns = train_row(row, losses_of_a_row, seconds, wait, world, memory, mfu)
                columns["total_loss"] = jloss + sloss
                if writes:
                    log("train", columns, row.epoch * ipe + row.itr)

            # the terminal shows the last of these steps
            text = f"jloss {jloss:.4f}  sloss {sloss:.4f}"
            print0(log_line(f"step {step:6d}", text, columns, (last_step - step) * seconds, device))

            # start the next stretch
            steps_to_log = []
            data_seconds = 0.0
            log_started = time.perf_counter()

        # every so many steps: validate (all ranks); after a signal there is no time for it
        if val and must_evaluate and not halt:
            row, text = compare_with_base(*evaluate(), base_errors)
            row["epoch"], row["itr"] = divmod(step, ipe)
            if writes:
                log("val", row, step)
            print0(f"held out at step {step}: {text}")

        # save (rank 0)
        if must_save and writes:
            path = save(*divmod(step, ipe))

        # validating and saving do not count as training time
        if must_save or must_evaluate:
            log_started = time.perf_counter()

        # a copy to --sync_to begins here when it is due, and runs in the background
        if mirror:
            mirror.tick()

        # stopped by a signal: all is saved
        if halt:
            break

    # the last checkpoint is on the disk, or an error says why not
    writer.wait()

    # the checks of --debug, and measured memory beside the estimate
    if args.debug:
        print0(*checks, sep="\n")
    if args.memory_report and rank == 0:
        from evaluation.memory import compare

        compare(
            encoder,
            model,
            optimizer,
            features_of(batch),
            lora_options,
            args.dtype,
            autocast,
            args.grad_accum,
        )

    # one file without adapters, for programs that know only Meta's layout
    if args.export and writes and step >= last_step:
        if predictor.predict == "change":
            print0(f"{args.export} predicts changes: our --base reads it, Meta's own code does not")
        facts = must_match | {"feature_stats": feature_stats}
        export(predictor, args.export, action_encoder_for(None), base, facts)

    # the run is complete when its last files are at --sync_to too
    if mirror:
        mirror.close()

    # what was done, and what to do next
    print0(f"peak memory {checkpoint.peak_memory(device):.0f} MiB")
    if dry:
        # what to know before renting GPUs: hours, memory, disk
        shapes = [f"{k} {tuple(v.shape)}" for k, v in batch.items() if isinstance(v, torch.Tensor)]
        print0(
            f"dry run, nothing written; {len(train)} stretches of episodes to train on,"
            f" {len(val)} held out, {len(bad)} unusable; a batch: {' '.join(shapes)}"
        )
        print0(
            f"{args.max_steps} steps x {seconds:.2f} s here make {eta(args.max_steps * seconds)};"
            f" {bytes_text(memory * 2**20)} of memory at the peak"
        )

        # bytes: weights and two moments of Adam, 4 each
        with_adam = 12 * num_trained
        print0(checkpoint.disk_text(args.out_dir, args.keep_last, with_adam))

        # the next command
        print0("to train, run the same command without --dry_run, --debug and --memory_report")
    elif halt:
        print0(f"stopped at step {step}; saved {path}; continue with --resume")
    elif step == first_step:
        print0(f"nothing left to do: {step} steps are done; judge them with: {next_command}")
    else:
        exported = f" and {args.export}" if args.export else ""
        print0(
            f"{step} of {total_steps} steps done; saved {path}{exported}; judge it with:"
            f" {next_command}"
        )

    # --- end --- (same in every train_*.py)
    # all ranks leave together; a process that just exits can hang the others
    if world > 1:
        del ddp  # its threads must end before Python does (pytorch/pytorch#190489)
        gc.collect()
        dist.destroy_process_group()
