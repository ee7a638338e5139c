"""Learn latent actions without labels: an encoder that names what happened between two steps of
video-VAE latents by three codes, and a decoder that predicts the next step from them (VQ-LAM).

On a laptop:

    python train_lam.py --data_dir latents --embed_dim 48 --encoder_depth 2 --decoder_depth 2 \\
        --num_heads 4 --patch_dim 64 --batch_size 8 --lr 2e-3 --epochs 3 --ipe 500

On 8 GPUs:

    torchrun --nproc_per_node=8 train_lam.py --data_dir latents

Reads the H5 files that prepare.manifest listed and split. Writes to --out_dir: train.csv, val.csv,
curves.png, args.json and checkpoints. You can stop it at any time and continue with --resume.
--test_mode overfits one batch and exits with 0 (PASS) or 1 (FAIL):

    python train_lam.py --data_dir latents --test_mode --num_epochs 1000 --batch_size 4 \\
        --learning_rate 1e-3
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
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
# what to train on: H5 files, and the list that splits them
flag("--data_dir", default="latents", help="folder of the H5 files")
flag("--manifest_path", help="split of prepare.manifest (default: manifest.json in --data_dir)")
# a window is what one sample sees
flag("--sequence_length", type=int, default=8, help="latent steps of a window")
flag("--val_clips", type=int, default=256, help="held-out windows to validate on; 0 turns validation off")  # fmt: skip
flag("--num_workers", type=int, default=min(8, cpus), help="loader processes of each rank; the default is the usable CPUs, at most 8")  # fmt: skip

flag = parser.add_argument_group("model and loss").add_argument
# size of encoder and decoder
flag("--embed_dim", type=int, default=512, help="width of encoder and decoder")
flag("--encoder_depth", type=int, default=3, help="blocks of the encoder")
flag("--decoder_depth", type=int, default=3, help="blocks of the decoder")
flag("--num_heads", type=int, default=8, help="attention heads")
flag("--patch_dim", type=int, default=256, help="channels of a patch of 4x4 latents")
# what moves, and how far: patches alone cannot carry a whole picture
flag("--warp", default="neighbours", choices=["neighbours", "flow", "none"], help="how the decoder moves the last step: each pixel is a mixture of its neighbours, or read at one place")  # fmt: skip
flag("--reach", type=int, default=4, help="latent pixels that a step may move things by; 0: the encoder does not look for them, the decoder cannot move them")  # fmt: skip
# an action is --num_codes codes with --num_embeddings values each: 12^3 = 1728 actions
flag("--num_codes", type=int, default=3, help="codes of an action")
flag("--num_embeddings", type=int, default=12, help="possible values of each code")
flag("--codebook_dim", type=int, default=128, help="dims of a code")
flag("--quantizer", default="vq", choices=["vq", "fsq", "none"], help="none: continuous actions, the upper bound")  # fmt: skip
flag("--codebook", default="ema", choices=["ema", "loss"], help="how the codes of vq follow the encoder: by moving averages or by a loss")  # fmt: skip
flag("--shared_codebook", action=switch, default=False, help="one table for all codes of an action")
# against dead codes and codes that mean something else than motion
flag("--vq_warmup_steps", type=int, help="steps before vq quantises (default: a twentieth of the run, or 500 if that is more, but at most a third)")  # fmt: skip
flag("--kmeans", action=switch, default=True, help="after that warm-up, start the tables of vq from clusters of encoder outputs")  # fmt: skip
flag("--revive", action=switch, default=True, help="replace dead codes, until the last tenth of the run")  # fmt: skip
flag("--encoder_shift", action=switch, default=True, help="move what the encoder sees at random: codes then cannot name places")  # fmt: skip
flag("--shift_kind", default="wrap", choices=["wrap", "reflect", "patches"], help="by latent pixels around the edges, mirrored at the edges, or by whole patches around the edges; the first two move half of the pairs by whole patches")  # fmt: skip
# the loss: the next step, further steps rolled out, and how close outputs are to codes
flag("--commitment_weight", type=float, default=0.25, help="weight of the commitment loss")
flag("--rollout_horizon", type=int, default=2, help="steps of the rollout loss; 1 turns it off")
# less memory, more speed
flag("--activation_checkpointing", "--use_activation_checkpointing", "--gradient_checkpointing", action=switch, default=False, help="recompute blocks in the backward pass to save memory")  # fmt: skip
flag("--compile", "--compile_model", action=switch, default=False, help="torch.compile the model")

flag = parser.add_argument_group("optimizer").add_argument
# a step takes --batch_size x --grad_accum x ranks windows
flag("--batch_size", "--per_device_batch_size", type=int, default=32, help="windows per rank and micro-batch")  # fmt: skip
flag("--grad_accum", "--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step")  # fmt: skip
# length of the run
flag("--epochs", "--num_epochs", type=int, help="epochs of --ipe steps (default: 100); steps with --test_mode (default: 3000)")  # fmt: skip
flag("--ipe", type=int, help="steps of an epoch (default: one pass over the windows that do not overlap)")  # fmt: skip
flag(
    "--max_steps",
    type=int,
    help="stop after this many steps; the learning rates stay those of the whole run",
)
# learning rate: linear warm-up, then half a cosine down to --final_lr
flag("--lr", "--learning_rate", type=float, default=1e-4, help="learning rate after the warm-up; then it falls as a cosine")  # fmt: skip
flag("--final_lr", type=float, default=0.0, help="learning rate of the last step")
flag("--warmup", type=int, help="epochs of linear warm-up (default: see --warmup_steps)")
flag("--warmup_steps", type=int, help="steps of linear warm-up (default: a twentieth of the run, at most 1000)")  # fmt: skip
# AdamW
flag("--weight_decay", type=float, default=0.01, help="AdamW decay of matrices")
flag("--grad_clip", "--gradient_clipping", type=float, default=1.0, help="largest gradient norm; 0 turns clipping off")  # fmt: skip
flag("--dtype", choices=["bfloat16", "float16", "float32"], help="autocast precision (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip

flag = parser.add_argument_group("run").add_argument
# can this model learn at all? A first check that takes minutes
flag("--test_mode", action=switch, default=False, help="overfit one batch, print PASS or FAIL, save nothing")  # fmt: skip
# checkpoints, and how to continue from them
flag("--out_dir", default="out/lam", help="folder of this run")
flag("--resume", action=switch, default=False, help="continue from the newest good checkpoint in --out_dir, if there is one")  # fmt: skip
flag("--save_every_freq", type=int, default=25, help="epochs between checkpoints that are kept for good")  # fmt: skip
flag("--keep_last", type=int, default=2, help="newest checkpoints to keep beside those (one is written each epoch)")  # fmt: skip
# what it reports, and how often
flag("--val_every", type=int, default=1, help="epochs between validations")
flag("--log_every", "--log_every_n_steps", type=int, default=10, help="steps between log lines")
# the same seed gives the same weights and the same order of windows
flag("--seed", type=int, default=239, help="seed of weights and order of windows")
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
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

# ours: model.py is the model and its losses, data.py makes batches of windows, checkpoint.py saves
# and finds this run's checkpoints, evaluation/codes.py asks what the codes mean
import checkpoint
from data import Latents, latent_sequences, prefetch
from evaluation.codes import (
    CODES,
    RATIOS,
    code_summary,
    complaints,
    held_out_codes,
    plot_curves,
    quantises,
    truth_notes,
)
from files.latents import open_manifest
from files.logs import (
    StepRow,
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
from kernels.flops import forward_flops, peak_to_assume
from model import LatentActionModel, VectorQuantizer


# --- helpers ---
def lr_at(step, total_steps, warmup, lr, final_lr):
    """Learning rate of a step (from 1): `warmup` steps of linear warm-up, then a cosine that ends
    at step `total_steps`."""
    # 1) warm-up: Adam's moments are still rough, so the first steps are smaller
    if step < warmup:
        return step / warmup * lr

    # 2) cosine: ever smaller steps average out the noise of single batches
    angle = math.pi * (step - warmup) / max(total_steps - warmup, 1)
    return final_lr + (lr - final_lr) * (1 + math.cos(angle)) / 2


def noise_floor(z):
    """(MSE, MAE) between steps of standardised latents z (B, T, C, H, W) where nothing happens: no
    code names what noise does. Measured on the tenth of the patches that change least, and at most
    a twentieth of the mean change: motion must not pass for noise."""
    # mean squared change of each patch of 4 x 4 latents
    change = z[:, 1:] - z[:, :-1]
    patches = F.avg_pool2d(change.square().mean(2).flatten(0, 1).unsqueeze(1), 4)

    # most of a picture often stands still: the quietest patches show what noise alone does
    quietest = patches.flatten().quantile(0.1).item()
    mse = min(quietest, 0.05 * change.square().mean().item())

    # the MAE that belongs to this MSE, if the noise is Gaussian
    return mse, math.sqrt(2 * mse / math.pi)


def overfit_verdict(losses, zeroed, noise=(0.0, 0.0), std=1.0):
    """(passed, what to print) of --test_mode.

    The guide's bar, MSE 0.01 and MAE 0.05, is of standardised latents and above their noise; codes
    that are ignored can meet it, but not the last two conditions. losses: {"mse", "mae", "nmse"};
    zeroed: MSE with zeroed codes; std: raw units are so many times larger."""
    mse = losses["mse"].item()
    mae = losses["mae"].item()
    nmse = losses["nmse"].item()

    # noise cannot be predicted: the bar is that much higher
    most_mse = 0.01 + noise[0]
    most_mae = 0.05 + noise[1]
    above = max(mse - noise[0], 0.0)

    # NMSE: also a batch with little motion must be learned, not only copied
    nmse_above = nmse * above / mse

    # without the codes the error must be ten times as large: the decoder uses them
    listens = zeroed - noise[0] >= 10 * above

    # all four count
    passed = mse < most_mse and mae < most_mae and nmse_above < 0.01 and listens
    text = (
        f"MSE {mse:.5f} (< {most_mse:.5f})  MAE {mae:.4f} (< {most_mae:.4f})  NMSE above the noise"
        f" {nmse_above:.5f} (< 0.01)  zeroed codes {zeroed / mse:.1f} times worse (>= 10 above the"
        f" noise); in raw units MSE {mse * std**2:.5f} (< {most_mse * std**2:.5f})  MAE"
        f" {mae * std:.4f} (< {most_mae * std:.4f})"
    )
    return passed, text


if __name__ == "__main__":
    # what the user can fix is printed as one line, everything else as a traceback
    sys.excepthook = checkpoint.short_excepthook

    # wrong flags end the run here, before anything is read or written
    for name in (
        "batch_size",
        "grad_accum",
        "epochs",
        "ipe",
        "num_codes",
        "rollout_horizon",
        "log_every",
        "val_every",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} is too small: use 1 or more")

    # without reach nothing can move
    if args.reach < 0:
        parser.error(f"--reach {args.reach} is below 0")
    if args.reach == 0:
        args.warp = "none"

    # a code with one value says nothing
    if args.num_embeddings < 2:
        parser.error(f"--num_embeddings {args.num_embeddings} is too small: use 2 or more")

    # two units for one thing: which of them counts would be a guess
    if args.warmup is not None and args.warmup_steps is not None:
        parser.error("--warmup counts epochs and --warmup_steps steps: give one of them")

    # the overfit test has one batch and writes nothing
    if args.test_mode and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--test_mode overfits one batch: run it in one process")
    if args.test_mode and args.dry_run:
        parser.error("--test_mode writes nothing anyway: drop --dry_run")

    # W&B is optional: say now that it is missing, not after minutes of reading
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
    dry = args.dry_run or args.test_mode
    if not args.resume and not dry:
        checkpoint.check_unused(args.out_dir)

    # the manifest says how files are split and what is in them; a file that has changed is an error
    manifest = args.manifest_path or os.path.join(args.data_dir, "manifest.json")
    meta, splits = open_manifest(manifest, args.data_dir)

    # one process at a time may write to the folder
    if rank == 0 and not dry:
        checkpoint.lock(args.out_dir)
    files = ", ".join(f"{count_text(len(v), 'file')} in {k}" for k, v in splits.items())
    print0(f"reading {manifest}: {files}")

    # windows to train on and to hold out: files are held out whole, so no window has a neighbour
    # on the other side
    train_set = Latents(splits["train"], args.sequence_length, args.seed)
    val_set = None
    if args.val_clips and splits["validation"]:
        val_set = Latents(splits["validation"], args.sequence_length, args.seed)

    # training goes ahead without validation, but then nothing shows what the codes mean
    if args.val_clips and val_set is None:
        print0("WARNING: nothing to validate on: the manifest has no validation files")

    # the first latent of a chunk may have seen the second: the next step is then no prediction
    if meta["steps_per_chunk"] == 2:
        print0(
            "warning: with 2 steps a chunk, a video VAE that encodes both at once lets the first"
            " know the second: 1 is safer"
        )

    # the checkpoint is opened here because it decides how long the warm-up of the codes is
    state = None
    path = None
    if args.resume and not args.test_mode:
        state, path = checkpoint.load_latest(args.out_dir)

    # an epoch is one pass over the windows that do not overlap; in the overfit test, one step
    if args.ipe is None:
        windows = sum(f.steps // args.sequence_length for f in train_set.files)
        windows_per_step = args.batch_size * args.grad_accum * world
        args.ipe = 1 if args.test_mode else max(windows // windows_per_step, 1)
    if args.epochs is None:
        args.epochs = 3000 if args.test_mode else 100
    step = 0
    total_steps = args.epochs * args.ipe

    # warm-up of the learning rate
    warmup = min(1000, total_steps // 20)
    if args.warmup is not None:
        warmup = args.warmup * args.ipe
    if args.warmup_steps is not None:
        warmup = args.warmup_steps

    # warm-up of the codes: first the encoder learns without them, then they start where its outputs
    # are. A resumed run keeps its own warm-up, even if the run has become longer
    vq_warmup = args.vq_warmup_steps
    if vq_warmup is None:
        if state is not None:
            vq_warmup = state["lam"]["vq_warmup_steps"]
        elif args.test_mode:
            vq_warmup = total_steps // 20
        else:
            vq_warmup = min(max(500, total_steps // 20), total_steps // 3)

    # without a step after the warm-up there would be no codes at all
    if args.quantizer == "vq" and vq_warmup >= total_steps:
        raise ValueError(
            f"the run has {total_steps} steps, and {vq_warmup} of them do not quantise: more"
            " --epochs, or fewer --vq_warmup_steps"
        )

    # --- model ---
    # everything that the model is made of; eval_lam.py builds it again from these
    size = {
        "embed_dim": args.embed_dim,
        "encoder_depth": args.encoder_depth,
        "decoder_depth": args.decoder_depth,
        "num_heads": args.num_heads,
        "patch_dim": args.patch_dim,
        "num_codes": args.num_codes,
        "num_embeddings": args.num_embeddings,
        "codebook_dim": args.codebook_dim,
        "quantizer": args.quantizer,
        "codebook": args.codebook,
        "shared_codebook": args.shared_codebook,
        "kmeans": args.kmeans,
        "revive": args.revive,
        "commitment_weight": args.commitment_weight,
        "rollout_horizon": args.rollout_horizon,
        "warp": args.warp,
        "reach": args.reach,
        "shift_kind": args.shift_kind,
        "channels": meta["channels"],
        "size": meta["size"],
        "vq_warmup_steps": vq_warmup,
        "mean": meta["mean"],
        "std": meta["std"],
    }

    # vq: the tables of codes, if there are any to update
    model = LatentActionModel(**size).to(device)
    model.activation_checkpointing = args.activation_checkpointing
    vq = model.quantizer if isinstance(model.quantizer, VectorQuantizer) else None

    # how large is it, and how many actions can it name?
    num_parameters = sum(p.numel() for p in model.parameters())
    actions = "continuous actions"
    if model.quantizer:
        actions = f"{args.num_embeddings}^{args.num_codes} actions"
    print0(
        f"latent action model {num_parameters:,} parameters, {actions}; steps of"
        f" {'x'.join(map(str, model.grid))} patches"
    )

    # MFU in the log is the share of this that training reaches; None: not known
    peak = peak_to_assume(device, args.dtype, args.peak_tflops, print0)
    step_flops = None

    # --- optimizer, resume ---
    # weight decay on matrices and patch embeddings only: biases and norms should not shrink
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim in (2, 4)]
    others = [p for p in params if p.ndim not in (2, 4)]
    param_groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]

    # beta2 0.95, as is usual for transformers: squared gradients of 20 steps count, not of 1000
    optimizer = torch.optim.AdamW(param_groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    # float16 would lose small gradients: the loss is scaled up for them; otherwise a no-op
    loss_scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

    # what a resumed run must have in common with its checkpoint: otherwise the weights load and
    # mean something else
    must_match = {
        "lam": size,
        "fingerprint": meta["fingerprint"],
        "sequence_length": args.sequence_length,
        "ipe": args.ipe,
    }

    # resume: every option of the model is compared by name, so the error can name it
    if state is not None:
        # what a run is that was begun before there were these options
        before = {"warp": "none", "reach": 0, "shift_kind": "patches"} | state | state["lam"]
        now = must_match | size
        for name, value in now.items():
            if name != "lam" and before.get(name) != value:
                raise ValueError(
                    f"{path} was trained with {name} {before.get(name)}, this run has {value}:"
                    " resume with the same, or start a new run in another --out_dir"
                )

        # the next step will be the one that would have come without the interruption
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loss_scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        step = state["epoch"] * args.ipe + state["itr"]
        print0(
            f"resumed from {path} at epoch {state['epoch']}, itr {state['itr']};",
            changed_flags(state["args"], vars(args)),
        )

    # how far this run goes: the schedule's end, --max_steps, or three steps to try it
    last_step = min(total_steps, args.max_steps or total_steps)
    if args.dry_run:
        last_step = min(last_step, step + 3)
    next_command = f"python eval_lam.py --checkpoint {args.out_dir}"

    # a finished job that SLURM starts again must end well
    if step >= last_step:
        print0(f"nothing left to do: {step} steps are done; judge them with: {next_command}")
        if world > 1:
            dist.destroy_process_group()
        sys.exit()

    # the shapes of training never change: compile for these alone
    if args.compile:
        model.compile(dynamic=False)

    # every rank makes the same update to its codebook: DDP has no buffers to broadcast
    ddp = model
    if world > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    # columns of train.csv and val.csv; a resumed run drops rows after its checkpoint
    losses_of_a_row = ["loss", "mse_loss", "mae_loss", "vq_loss", "codebook_loss"]
    losses_of_a_row += ["commitment_loss", "rollout_loss"]
    train_columns = ["epoch", "itr", *losses_of_a_row, "codebook_usage", "lr", "grad_norm"]
    train_columns += ["clips_per_s", "data_wait", "memory_mib", "mfu"]
    val_columns = ["epoch", *losses_of_a_row, *RATIOS, *CODES]
    headers = {
        "train": (train_columns, *divmod(step, args.ipe)),
        "val": (val_columns, *divmod(step, args.ipe)),
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
        "stage": "lam",
        "data_dir": os.path.abspath(args.data_dir),
        "manifest": os.path.abspath(manifest),
        "sequence_length": args.sequence_length,
        "val_clips": args.val_clips,
        "encoder_shift": args.encoder_shift,
        "dtype": args.dtype,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "grad_accum": args.grad_accum,
        "epochs": args.epochs,
    }

    def save(epoch, itr):
        """Write a checkpoint and the curves (rank 0)."""
        # all that --resume and eval_lam.py need
        state = {
            "format": checkpoint.FORMAT,
            "settings": settings,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": loss_scaler.state_dict(),
            "epoch": epoch,
            "itr": itr,
            "batch_size": args.batch_size,
            "world_size": world,
            "args": vars(args),
            "manifest": os.path.abspath(manifest),
            "data_dir": os.path.abspath(args.data_dir),
            "train_files": [os.path.relpath(f.path, args.data_dir) for f in splits["train"]],
            "rng": torch.get_rng_state(),
            "wandb_id": wandb_id,
            **must_match,
        }

        # written in a thread while training continues. The write is atomic: a run that is killed
        # keeps its previous checkpoint
        path = writer.save(args.out_dir, state, epoch, itr, args.keep_last, args.save_every_freq)
        plot_curves(args.out_dir, args.ipe)
        return path

    def loss_terms(out):
        """The losses of forward (dict of tensors) in the order of losses_of_a_row: (7,)."""
        # the fourth, vq_loss, is all that the codes add to the loss
        terms = [
            out["loss"],
            out["mse"],
            out["mae"],
            out["codebook"] + args.commitment_weight * out["commitment"],
            out["codebook"],
            out["commitment"],
            out["rollout"],
        ]
        return torch.stack([term.detach().float() for term in terms])

    def validate(epoch):
        """Losses, baselines and what the codes name on the held-out windows of all ranks: (a row
        of val.csv, what is missing of the truth)."""
        # each rank evaluates a share of the windows and gets the results of all
        model.eval()
        held_out = held_out_codes(
            model, val_set, args.batch_size, args.val_clips, args.num_workers, autocast
        )
        model.train()

        # means over windows
        means = {}
        for name in ("loss", "mse", "mae", "codebook", "commitment", "rollout"):
            means[name] = torch.tensor(held_out[name]).mean()

        # losses, errors beside the baselines, and what codes share with true actions, if known
        row = {"epoch": epoch} | dict(zip(losses_of_a_row, loss_terms(means).tolist()))
        row |= code_summary(held_out, args.num_embeddings if quantises(model) else None)
        return row, list(truth_notes(val_set, held_out, "validation"))

    def val_line(row):
        """A row of val.csv for a person."""
        # how many actions are in use; nobody can tell before the warm-up ends
        if quantises(model):
            alive = f"{row['joint_codes']:.0f} actions, perplexity {row['joint_perplexity']:.1f}"
        elif vq:
            alive = f"warm-up: no codes before step {vq_warmup}"
        else:
            alive = "continuous"

        # below 1 is better than copying, and than codes that know nothing of this clip
        text = (
            f"error {row['mse_over_copy']:.3f} of copying, {row['mse_over_zero']:.3f} of zeroed"
            f" codes, {row['mse_over_marginal']:.3f} of other clips' codes; {alive}"
        )

        # only with true actions: does a code mean the same in another clip?
        if not math.isnan(row["same_over_own"]):
            text += f"; same action {row['same_over_own']:.2f} x"
        if not math.isnan(row["ami"]):
            text += f", AMI {row['ami']:.3f}"
        if not math.isnan(row["purity"]):
            text += (
                f", purity {row['purity']:.3f} (each code named by its commonest action in the"
                f" other recordings; one code for all: {row['purity_one_code']:.3f})"
            )
        return text

    def overfit(z, losses, noise):
        """(passed, what to print) of --test_mode, on its batch z."""
        # in eval mode the codebook does not count this look at the batch
        model.eval()
        with torch.no_grad(), autocast():
            steps = model.normalize(z)
            target = steps[:, 1:]
            codes = model.encode(z)[2]
            zeroed = (model.predict(steps[:, :-1], 0 * codes) - target).square().mean().item()
        model.train()

        # NMSE: relative to the variance of what is predicted
        errors = {"mse": losses[1], "mae": losses[2], "nmse": losses[1] / target.var()}
        return overfit_verdict(errors, zeroed, noise, meta["std"])

    # --- train ---
    # SLURM's SIGTERM and Ctrl-C set this: the loop ends its step and saves. It is on the CPU, where
    # reading it never waits for the GPU
    stop = torch.zeros(1)
    if not dry:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.fill_(1))

    # the loader starts where the checkpoint stopped: the order depends on the seed alone
    loader = latent_sequences(
        train_set,
        args.batch_size,
        batches_per_epoch=args.ipe * args.grad_accum,
        num_workers=args.num_workers,
        epoch=step // args.ipe,
        itr=step % args.ipe * args.grad_accum,
        rank=rank,
        world=world,
        pin_memory=device.type == "cuda",
    )

    # the next batch is copied to the GPU while this one is computed on
    batches = prefetch(loader, device)
    batch = None

    # what the next log line is about
    steps_to_log = []  # a StepRow for each step since the last log line
    data_seconds = 0.0
    log_started = time.perf_counter()

    # shifts are drawn as a share of the picture
    size = torch.tensor(meta["size"], device=device)

    # codes chosen since the last log line
    used = torch.zeros(args.num_codes, args.num_embeddings, device=device)

    # for --test_mode: what noise alone does, and what came out
    noise = None
    passed = False
    verdict = "the run ended before the codes were in use"

    # notes about missing labels: the files do not change, so once is enough
    notes_printed = False

    while step < last_step and not passed:
        epoch, itr = divmod(step, args.ipe)

        # the rate depends on the step alone, so a resumed run follows the same curve
        lr = lr_at(step + 1, total_steps, warmup, args.lr, args.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward and backward, over --grad_accum micro-batches
        losses = torch.zeros(len(losses_of_a_row), device=device)
        keys = []
        for micro in range(args.grad_accum):
            # how long the GPU waits for data is a column of train.csv: data_wait. The overfit test
            # takes its one batch once
            asked = time.perf_counter()
            if batch is None or not args.test_mode:
                batch = next(batches)
            data_seconds += time.perf_counter() - asked
            keys += batch["key"]
            z = batch["z"].to(device, non_blocking=True)

            # what the encoder sees is moved, what the decoder sees is not: no code can name a place
            shift = None
            if args.encoder_shift and not args.test_mode:
                pixels = batch["shift"].to(device) * size
                shift = pixels.long()
                patches = shift // model.patch_size * model.patch_size

                # half of the pairs keep where their patches begin, as pictures that are not moved
                # do: all codes are read from those
                share = 1.0 if args.shift_kind == "patches" else 0.5
                is_whole = (pixels - shift)[..., :1] < share
                shift = torch.where(is_whole, patches, shift)

            # the bar of the overfit test depends on the noise of its batch
            if args.test_mode and noise is None:
                noise = noise_floor(model.normalize(z))
                print0(
                    f"overfit test: MSE < {0.01 + noise[0]:.5f} and MAE < {0.05 + noise[1]:.4f} of"
                    f" standardised latents, which is 0.01 and 0.05 above this batch's noise floor"
                    f" ({noise[0]:.5f} and {noise[1]:.4f}, what changes where nothing happens); the"
                    f" latents' std is {meta['std']:.4f}"
                )

            # DDP averages gradients once a step: on the last micro-batch
            last_micro = micro == args.grad_accum - 1
            with contextlib.nullcontext() if last_micro or world == 1 else ddp.no_sync():
                with autocast():
                    out = ddp(z, shift)
                loss_scaler.scale(out["loss"] / args.grad_accum).backward()

            # once, for MFU: backward takes twice as much as forward
            if peak and not step_flops:
                flops = 3 * forward_flops(model, z, shift)
                step_flops = args.grad_accum * flops

            # a mean over micro-batches, left on the GPU: reading it here would wait
            losses += loss_terms(out) / args.grad_accum
            if model.quantizer:
                used.scatter_(1, out["indices"].flatten(0, 1).T, 1.0)

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

        # save at the end of each epoch and wherever the run ends
        epochs_done, inside = divmod(step, args.ipe)
        must_save = inside == 0 or step == last_step or halt
        if args.test_mode:
            must_save = step == last_step

        # does the warm-up of the codes end with this step? k-means starts them. It takes no NaN, so
        # the losses are checked first
        clusters = vq is not None and vq.kmeans and int(vq.seen[0]) + 1 == max(vq.warmup, 1)

        # a checkpoint that could not be written ends the run
        writer.check()

        # once in a while: read the losses back, check them, log them
        # (a row for every step since the last time)
        if must_save or step % args.log_every == 0 or clusters:
            seconds = (time.perf_counter() - log_started) / len(steps_to_log)
            wait = data_seconds / len(steps_to_log)
            memory = checkpoint.peak_memory(device)
            mfu = step_flops / seconds / peak if peak else None

            # how many values of each code any rank has chosen: few means a collapsed codebook
            if world > 1:
                dist.all_reduce(used, dist.ReduceOp.MAX)
            usage = used.sum(1).mean().item()
            used.zero_()

            # a row of train.csv for each step
            for row in mean_over_ranks(steps_to_log, world):
                place = f"epoch {row.epoch}, itr {row.itr}"
                check_finite(row, row.losses[0], place, args.out_dir, args.dtype)
                columns = train_row(row, losses_of_a_row, seconds, wait, world, memory, mfu)
                columns["codebook_usage"] = usage
                if writes:
                    log("train", columns, row.epoch * args.ipe + row.itr)

            # the terminal shows the last of these steps
            place = f"epoch {epochs_done:3d} itr {inside:4d}"
            text = (
                f"mse {columns['mse_loss']:.4f}  rollout {columns['rollout_loss']:.4f}"
                f"  vq {columns['vq_loss']:.4f}  codes {usage:4.1f}"
            )
            print0(log_line(place, text, columns, (last_step - step) * seconds, device))

            # start the next stretch
            steps_to_log = []
            data_seconds = 0.0
            log_started = time.perf_counter()

        # k-means squares distances, which overflow long before the loss does
        if clusters:
            outputs = [vq.recent, *(rows for rows, _ in vq.pending)]
            largest = max(float(x.abs().max()) for x in outputs)
            if not largest < 1e15:
                raise ValueError(
                    f"the encoder's outputs ({largest:.4g}) are too large for k-means at epoch"
                    f" {epoch}, itr {itr}, where the warm-up ends: the run diverges; lower --lr"
                )

        # the codebook follows the encoder, once a step. Near the end dead codes stay dead:
        # a new one would have no time to settle
        if vq:
            vq.update(settle=step - 1 >= 0.9 * total_steps)

        # --test_mode: is the batch learned? It may end early, but not before codes are in use
        codes_are_used = vq is None or vq.active()
        if args.test_mode and codes_are_used and (step % 25 == 0 or step == last_step):
            passed, verdict = overfit(z, losses, noise)

        # once an epoch: validate (all ranks), save (rank 0)
        if must_save and not args.test_mode:
            # after a signal there is no time to validate: SLURM ends the job soon
            due = epochs_done % args.val_every == 0 or step == last_step
            if val_set and due and (inside == 0 or args.dry_run) and not halt:
                row, notes = validate(epochs_done)
                if writes:
                    log("val", row, step)
                place = f"{step} steps" if inside else f"epoch {epochs_done}"
                print0(f"held out after {place}: {val_line(row)}")

                # collapsed or ignored codes: the loss alone does not show it
                if codes_are_used:
                    for sentence in complaints(row, quantises(model)):
                        print0(f"WARNING: {sentence}")
                if not notes_printed:
                    for sentence in notes:
                        print0(f"note: {sentence}")
                notes_printed = True
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
        kept = args.keep_last
        if args.save_every_freq:
            kept += args.epochs // args.save_every_freq
        print0(
            f"dry run, nothing written; {files}; a batch: z {tuple(batch['z'].shape)};"
            f" {total_steps} steps, {vq_warmup} of them not quantised"
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
    elif args.test_mode:
        print0(f"{'PASS' if passed else 'FAIL'} after {step} steps: {verdict}")
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

    # --- verdict ---
    # for scripts: 0 is PASS, 1 is FAIL
    if args.test_mode:
        sys.exit(not passed)
