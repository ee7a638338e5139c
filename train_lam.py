"""Learn latent actions without labels: an encoder that names what happened between two steps of
video-VAE latents by three codes, and a decoder that predicts the next step from them (VQ-LAM).

    python train_lam.py --data_dir latents --embed_dim 48 --encoder_depth 2 --decoder_depth 2 --num_heads 4 --patch_dim 64 --batch_size 8 \\
        --lr 2e-3 --epochs 3 --ipe 500                                                              # a laptop
    torchrun --nproc_per_node=8 train_lam.py --data_dir latents                                     # 8 GPUs

Reads the H5 files that prepare.manifest listed and split. Writes to --out_dir: train.csv, val.csv,
curves.png, args.json and checkpoints. Stop it whenever you like and go on with --resume.
--test_mode overfits one batch and exits with 0 (PASS) or 1 (FAIL):

    python train_lam.py --data_dir latents --test_mode --num_epochs 1000 --batch_size 4 \\
        --learning_rate 1e-3
"""

import argparse
import contextlib
import datetime
import functools
import math
import os
import pathlib
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

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
from evaluation.held_out import leave_group
from files.latents import open_manifest
from files.logs import open_logs
from model import LatentActionModel, VectorQuantizer

# --- flags ---
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
flag, switch = parser.add_argument, argparse.BooleanOptionalAction
# data
flag("--data_dir", default="latents", help="folder of the H5 files")
flag("--manifest_path", help="split of prepare.manifest (default: manifest.json in --data_dir)")
flag("--sequence_length", type=int, default=8, help="latent steps of a window")
flag(
    "--val_clips",
    type=int,
    default=256,
    help="held-out windows to validate on; 0 turns validation off",
)
flag("--num_workers", type=int, default=2, help="loader processes a rank")
# model, loss
flag("--embed_dim", type=int, default=512, help="width of encoder and decoder")
flag("--encoder_depth", type=int, default=3, help="blocks of the encoder")
flag("--decoder_depth", type=int, default=3, help="blocks of the decoder")
flag("--num_heads", type=int, default=8, help="attention heads")
flag("--patch_dim", type=int, default=256, help="channels of a patch of 4x4 latents")
flag("--num_codes", type=int, default=3, help="codes of an action")
flag("--num_embeddings", type=int, default=12, help="what each code is chosen from")
flag("--codebook_dim", type=int, default=128, help="dims of a code")
flag(
    "--quantizer",
    default="vq",
    choices=["vq", "fsq", "none"],
    help="none is continuous: the upper bound",
)
flag(
    "--codebook",
    default="ema",
    choices=["ema", "loss"],
    help="how the tables of vq follow the encoder",
)
flag("--shared_codebook", action=switch, default=False, help="one table for all codes of an action")
flag(
    "--vq_warmup_steps",
    type=int,
    help=(
        "steps before vq quantises (default: a twentieth of the run, at least 500 or a third of it)"
    ),
)
flag(
    "--kmeans",
    action=switch,
    default=True,
    help="start the tables of vq from clusters of encoder outputs, after the warm-up",
)
flag(
    "--revive",
    action=switch,
    default=True,
    help="replace dead codes, until the last tenth of the run",
)
flag(
    "--encoder_shift",
    action=switch,
    default=True,
    help="move what the encoder sees at random, so that codes cannot name places",
)
flag("--commitment_weight", type=float, default=0.25, help="weight of the commitment loss")
flag("--rollout_horizon", type=int, default=2, help="steps of the rollout loss; 1 is none")
flag(
    "--activation_checkpointing",
    "--use_activation_checkpointing",
    action=switch,
    default=False,
    help="recompute blocks, save memory",
)
flag("--compile", "--compile_model", action=switch, default=False, help="torch.compile the model")
# optim
flag("--batch_size", type=int, default=32, help="windows per rank and micro-batch")
flag(
    "--grad_accum",
    "--gradient_accumulation_steps",
    type=int,
    default=1,
    help="micro-batches per step",
)
flag(
    "--epochs",
    "--num_epochs",
    type=int,
    help="epochs of --ipe steps (default: 100); steps with --test_mode (default: 3000)",
)
flag(
    "--ipe",
    type=int,
    help="steps of an epoch (default: one pass over the windows that do not overlap)",
)
flag("--max_steps", type=int, help="stop after this many steps, whatever the schedule says")
flag(
    "--lr",
    "--learning_rate",
    type=float,
    default=1e-4,
    help="learning rate after the warm-up; then it falls as a cosine",
)
flag("--final_lr", type=float, default=0.0, help="learning rate of the last step")
flag(
    "--warmup_steps",
    type=int,
    help="steps of linear warm-up (default: a twentieth of the run, at most 1000)",
)
flag("--weight_decay", type=float, default=0.01, help="AdamW decay of matrices")
flag(
    "--grad_clip",
    "--gradient_clipping",
    type=float,
    default=1.0,
    help="largest gradient norm; 0 is off",
)
flag(
    "--dtype",
    choices=["bfloat16", "float16", "float32"],
    help="autocast precision (default bfloat16 on a GPU, float32 on a CPU)",
)
# run
flag(
    "--test_mode",
    action=switch,
    default=False,
    help="overfit one batch, print PASS or FAIL, save nothing",
)
flag("--out_dir", default="out/lam", help="folder of this run")
flag(
    "--resume",
    action=switch,
    default=False,
    help="go on from the newest good checkpoint in --out_dir, if there is one",
)
flag(
    "--save_every_freq",
    type=int,
    default=25,
    help="keep the checkpoint of every so many epochs for good",
)
flag(
    "--keep_last", type=int, default=2, help="other checkpoints to keep (one is written each epoch)"
)
flag("--val_every", type=int, default=1, help="epochs between validations")
flag("--log_every", type=int, default=10, help="steps between log lines")
flag("--seed", type=int, default=239, help="seed of weights and order of windows")
flag("--wandb_project", help="also log to Weights & Biases (pip install wandb)")
flag(
    "--dry_run",
    action=switch,
    default=False,
    help="check everything, run three steps, write nothing",
)


def lr_at(k, total, warmup, args):
    """Learning rate of step k (from 1): linear warm-up, then a cosine that ends at step `total`."""
    if k < warmup:
        return k / warmup * args.lr
    return (
        args.final_lr
        + (args.lr - args.final_lr)
        * (1 + math.cos(math.pi * (k - warmup) / max(total - warmup, 1)))
        / 2
    )


def noise_floor(z):
    """(MSE, MAE) between steps of standardised latents z (B, T, C, H, W) where nothing happens: no
    code says what noise does. Read from the tenth of the patches that change least; at most a
    twentieth of the mean change, so that motion does not pass for noise."""
    change = z[:, 1:] - z[:, :-1]
    patches = F.avg_pool2d(change.square().mean(2).flatten(0, 1).unsqueeze(1), 4)
    mse = min(patches.flatten().quantile(0.1).item(), 0.05 * change.square().mean().item())
    return mse, math.sqrt(2 * mse / math.pi)  # of Gaussian noise


def overfit_verdict(losses, zeroed, noise=(0.0, 0.0), std=1.0):
    """(passed, what to print) of --test_mode. The guide's bar, MSE 0.01 and MAE 0.05, is of
    standardised latents and above their noise; codes that are ignored can meet it, but not the
    last two conditions. std: raw units are so many times larger."""
    mse, mae, nmse = (losses[k].item() for k in ("mse", "mae", "nmse"))
    most_mse, most_mae = 0.01 + noise[0], 0.05 + noise[1]
    above = max(mse - noise[0], 0.0)
    nmse_above = nmse * above / mse
    listens = zeroed - noise[0] >= 10 * above
    passed = mse < most_mse and mae < most_mae and nmse_above < 0.01 and listens
    text = (
        f"MSE {mse:.5f} (< {most_mse:.5f})  MAE {mae:.4f} (< {most_mae:.4f})  NMSE above the noise"
        f" {nmse_above:.5f} (< 0.01)  zeroed codes {zeroed / mse:.1f} times worse (>= 10 above the"
        f" noise); in raw units MSE {mse * std**2:.5f} (< {most_mse * std**2:.5f})  MAE"
        f" {mae * std:.4f} (< {most_mae * std:.4f})"
    )
    return passed, text


if __name__ == "__main__":
    args = parser.parse_args()
    sys.excepthook = checkpoint.one_sentence
    counts = "batch_size", "grad_accum", "num_codes", "rollout_horizon", "log_every", "val_every"
    if low := [k for k in counts if getattr(args, k) < 1] + ["num_embeddings"] * (
        args.num_embeddings < 2
    ):
        parser.error(f"--{low[0]} {getattr(args, low[0])} is too small")
    if args.test_mode and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("--test_mode overfits one batch: run it in one process")

    # --- distributed --- (same in every train_*.py)
    rank, world, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else lambda *a, **k: None
    torch.manual_seed(args.seed)
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    autocast = functools.partial(
        torch.autocast, device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"
    )

    # --- data ---
    dry = args.dry_run or args.test_mode
    if rank == 0 and not dry:
        checkpoint.lock(args.out_dir)
    state, path = (
        checkpoint.load_latest(args.out_dir) if args.resume and not args.test_mode else (None, None)
    )
    manifest = args.manifest_path or os.path.join(args.data_dir, "manifest.json")
    meta, splits = open_manifest(manifest, args.data_dir)
    train_set = Latents(splits["train"], args.sequence_length, args.seed)
    val_set = (
        Latents(splits["validation"], args.sequence_length, args.seed)
        if args.val_clips and splits["validation"]
        else None
    )
    if args.val_clips and val_set is None:
        say("WARNING: nothing to validate on: the manifest has no validation files")
    if meta["steps_per_chunk"] == 2:
        say(
            "warning: with 2 steps a chunk, a video VAE that encodes both at once lets the first"
            " know the second: 1 is safer"
        )
    if args.ipe is None:
        windows = sum(f.steps // args.sequence_length for f in train_set.files)
        args.ipe = (
            1 if args.test_mode else max(windows // (args.batch_size * args.grad_accum * world), 1)
        )
    args.epochs = args.epochs or (3000 if args.test_mode else 100)
    step, total = 0, args.epochs * args.ipe
    warmup = min(1000, total // 20) if args.warmup_steps is None else args.warmup_steps
    vq_warmup = args.vq_warmup_steps
    if vq_warmup is None:  # a run that goes on keeps its own, however long it has become
        vq_warmup = (
            state["lam"]["vq_warmup_steps"]
            if state
            else total // 20
            if args.test_mode
            else min(max(500, total // 20), total // 3)
        )
    if args.quantizer == "vq" and vq_warmup >= total:
        raise ValueError(
            f"the run has {total} steps, and {vq_warmup} of them do not quantise: more --epochs, or"
            " fewer --vq_warmup_steps"
        )

    # --- model ---
    size = {
        k: getattr(args, k)
        for k in (
            "embed_dim",
            "encoder_depth",
            "decoder_depth",
            "num_heads",
            "patch_dim",
            "num_codes",
        )
    }
    size |= {
        k: getattr(args, k)
        for k in (
            "num_embeddings",
            "codebook_dim",
            "quantizer",
            "codebook",
            "shared_codebook",
            "kmeans",
            "revive",
        )
    }
    size |= {k: getattr(args, k) for k in ("commitment_weight", "rollout_horizon")} | {
        "channels": meta["channels"],
        "size": meta["size"],
    }
    size |= {"vq_warmup_steps": vq_warmup, "mean": meta["mean"], "std": meta["std"]}
    model = LatentActionModel(**size).to(device)
    model.activation_checkpointing = args.activation_checkpointing
    count = sum(p.numel() for p in model.parameters())
    vq = model.quantizer if isinstance(model.quantizer, VectorQuantizer) else None
    actions = (
        f"{args.num_embeddings}^{args.num_codes} actions"
        if model.quantizer
        else "continuous actions"
    )
    say(
        f"latent action model {count:,} parameters, {actions}; steps of"
        f" {'x'.join(map(str, model.grid))} patches"
    )

    # --- optimizer, resume ---
    params = [p for p in model.parameters() if p.requires_grad]
    decays = [
        {
            "params": [p for p in params if (p.ndim in (2, 4)) == big],
            "weight_decay": args.weight_decay * big,
        }
        for big in (True, False)
    ]
    optimizer = torch.optim.AdamW(decays, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    loss_scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    belongs = {
        "lam": size,
        "fingerprint": meta["fingerprint"],
        "sequence_length": args.sequence_length,
        "ipe": args.ipe,
    }
    if state is not None:
        old, new = (x | x.get("lam", {}) for x in (state, belongs))
        for k in (k for k in new if k != "lam" and old.get(k) != new[k]):
            raise ValueError(
                f"{path} was trained with {k} {old.get(k)}, this run has {new[k]}: resume with the"
                " same, or start anew"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loss_scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        step = state["epoch"] * args.ipe + state["itr"]
        changed = [
            f"--{k} {v} (was {state['args'].get(k)})"
            for k, v in vars(args).items()
            if v != state["args"].get(k)
        ]
        say(
            f"resumed from {path} at epoch {state['epoch']}, itr {state['itr']}; changed flags:",
            *changed,
        )
    elif checkpoint.list_checkpoints(args.out_dir) and not dry:
        raise ValueError(
            f"{args.out_dir} holds checkpoints of an earlier run: pass --resume to go on, or"
            " another --out_dir"
        )
    if args.compile:
        model.compile(dynamic=False)
    last = min(total, args.max_steps or total, step + 3 if args.dry_run else total)
    if step >= last:
        say(f"nothing left to do: {step} steps are done")
        sys.exit(leave_group() if world > 1 else None)
    ddp = (
        DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        if world > 1
        else model
    )

    terms = [
        "loss",
        "mse_loss",
        "mae_loss",
        "vq_loss",
        "codebook_loss",
        "commitment_loss",
        "rollout_loss",
    ]
    columns = [
        "epoch",
        "itr",
        *terms,
        "codebook_usage",
        "lr",
        "grad_norm",
        "clips_per_s",
        "data_wait",
        "memory_mib",
    ]
    headers = {
        "train": (columns, *divmod(step, args.ipe)),
        "val": (["epoch", *terms, *RATIOS, *CODES], *divmod(step, args.ipe)),
    }
    writes = rank == 0 and not dry
    log = (
        open_logs(args.out_dir, headers, vars(args), state is not None, args.wandb_project)
        if writes
        else lambda *row: None
    )

    def save(epoch, itr):
        """Write a checkpoint and the curves (rank 0)."""
        state = {
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
        }
        path = checkpoint.save(
            args.out_dir, state | belongs, epoch, itr, args.keep_last, args.save_every_freq
        )
        plot_curves(args.out_dir)
        return path

    def loss_terms(x):
        """The losses of forward (dict of tensors) in the order of `terms`."""
        parts = (
            x["loss"],
            x["mse"],
            x["mae"],
            x["codebook"] + args.commitment_weight * x["commitment"],
            x["codebook"],
            x["commitment"],
        )
        return torch.stack([p.detach().float() for p in (*parts, x["rollout"])])

    def validate(epoch):
        """(losses, baselines and what the codes say, what is missing of the truth) on the held-out
        windows, summed up over all ranks."""
        model.eval()
        found = held_out_codes(
            model, val_set, args.batch_size, args.val_clips, args.num_workers, autocast
        )
        model.train()
        means = loss_terms(
            {
                k: torch.tensor(found[k]).mean()
                for k in ("loss", "mse", "mae", "codebook", "commitment", "rollout")
            }
        )
        summary = code_summary(found, args.num_embeddings if quantises(model) else None)
        notes = list(truth_notes(val_set, found, "validation"))
        return {"epoch": epoch} | dict(zip(terms, means.tolist())) | summary, notes

    # --- train ---
    stop = torch.zeros(1)  # on the CPU, so that looking at it costs the GPU nothing
    for name in () if dry else (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *a: stop.fill_(1))
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
    batches, passed, verdict, pending, waited, began = (
        prefetch(loader, device),
        False,
        "",
        [],
        0.0,
        time.perf_counter(),
    )
    used = torch.zeros(
        args.num_codes, args.num_embeddings, device=device
    )  # codes chosen since the last log line
    batch, grid = None, torch.tensor(model.grid, device=device)
    noise = None  # floor of --test_mode
    noted = False  # what is missing of the truth is said once: files do not change
    while step < last and not passed:
        epoch, itr = divmod(step, args.ipe)
        lr = lr_at(step + 1, total, warmup, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses, keys = torch.zeros(len(terms), device=device), []
        for micro in range(args.grad_accum):
            wait = time.perf_counter()
            batch = batch if args.test_mode and batch else next(batches)
            waited += time.perf_counter() - wait
            keys = keys + batch["key"]
            z, shift = batch["z"].to(device, non_blocking=True), None
            if args.test_mode and noise is None:
                noise = noise_floor(model.normalize(z))
                say(
                    f"overfit test: MSE < {0.01 + noise[0]:.5f} and MAE < {0.05 + noise[1]:.4f} of"
                    f" standardised latents, which is 0.01 and 0.05 above this batch's noise floor"
                    f" ({noise[0]:.5f} and {noise[1]:.4f}, what changes where nothing happens); the"
                    f" latents' std is {meta['std']:.4f}"
                )
            if args.encoder_shift and not args.test_mode:
                shift = (batch["shift"].to(device) * grid).long()
            with (
                contextlib.nullcontext()
                if micro == args.grad_accum - 1 or world == 1
                else ddp.no_sync()
            ):
                with autocast():
                    out = ddp(z, shift)
                loss_scaler.scale(out["loss"] / args.grad_accum).backward()
            losses += loss_terms(out) / args.grad_accum
            if model.quantizer:
                used.scatter_(1, out["indices"].flatten(0, 1).T, 1.0)
        loss_scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        loss_scaler.step(optimizer)
        loss_scaler.update()
        optimizer.zero_grad(set_to_none=True)
        pending.append((epoch, itr, losses, norm, lr, keys))
        step += 1

        halt = (
            stop.clone()
        )  # a signal may come at any line: all ranks must decide on the same value
        if world > 1:
            dist.all_reduce(halt, dist.ReduceOp.MAX)
        at_end = (step % args.ipe == 0 and not args.test_mode) or step == last or bool(halt)
        # k-means takes no NaN: the losses are looked at before it, whatever --log_every says
        clusters = vq is not None and vq.kmeans and int(vq.seen[0]) + 1 == max(vq.warmup, 1)
        if at_end or step % args.log_every == 0 or clusters:
            values = torch.stack([torch.cat([p[2], p[3].reshape(1)]) for p in pending])
            if world > 1:
                values = values.cpu()
                dist.all_reduce(values)
                values /= world
                dist.all_reduce(used, dist.ReduceOp.MAX)
            seconds, wait = (time.perf_counter() - began) / len(pending), waited / len(pending)
            memory = checkpoint.peak_memory(device)
            usage = used.sum(1).mean().item()
            used.zero_()
            for (e, i, _, _, rate, clips), (*loss, n) in zip(pending, values.tolist()):
                if not math.isfinite(
                    loss[0] + (n if args.dtype != "float16" else 0)
                ):  # float16 skips those steps
                    good = ["none", *checkpoint.list_checkpoints(args.out_dir)][-1]
                    where = (
                        f"epoch {e}, itr {i}, windows {', '.join(clips)}; last good checkpoint:"
                        f" {good}; lower --lr"
                    )
                    raise ValueError(
                        f"the loss ({loss[0]:.4g}) or its gradient ({n:.4g}) is not finite at"
                        f" {where}"
                    )
                speed = len(clips) * world / seconds
                row = e, i, *loss, usage, rate, n, speed, wait / seconds, memory
                log("train", dict(zip(columns, row)), e * args.ipe + i)
            say(
                f"epoch {e:3d} itr {i:4d}  mse {loss[1]:.4f}  rollout {loss[6]:.4f}  vq"
                f" {loss[3]:.4f}  codes {usage:4.1f}  lr {rate:.2e}  {speed:6.1f} clips/s  ETA"
                f" {datetime.timedelta(seconds=round((last - step) * seconds))}",
                flush=True,
            )
            pending, waited, began = [], 0.0, time.perf_counter()
        if clusters:
            outputs = [vq.recent, *(rows for rows, _ in vq.pending)]
            largest = max(float(x.abs().max()) for x in outputs)
            if not largest < 1e15:  # squared distances overflow long before the loss does
                raise ValueError(
                    f"the encoder's outputs ({largest:.4g}) are too large for k-means at epoch"
                    f" {epoch}, itr {itr}, where the warm-up ends: the run diverges; lower --lr"
                )
        if vq:
            vq.update(settle=step - 1 >= 0.9 * total)
        if args.test_mode and (step % 25 == 0 or step == last) and (vq is None or vq.active()):
            model.eval()  # the codebook must not count this look at the batch
            with torch.no_grad(), autocast():
                target, codes = model.normalize(z)[:, 1:], model.encode(z)[2]
                zeroed = (
                    (model.predict(model.normalize(z)[:, :-1], 0 * codes) - target)
                    .square()
                    .mean()
                    .item()
                )
            model.train()
            passed, verdict = overfit_verdict(
                {"mse": losses[1], "mae": losses[2], "nmse": losses[1] / target.var()},
                zeroed,
                noise,
                meta["std"],
            )
        if at_end and not args.test_mode:
            done, inside = divmod(step, args.ipe)
            if (
                val_set
                and (args.dry_run or not inside)
                and (done % args.val_every == 0 or step == last)
                and not halt
            ):
                v, notes = validate(done)
                log("val", v, step)
                copy, zero, marginal = (v[f"mse_over_{k}"] for k in ("copy", "zero", "marginal"))
                known = ""
                if not math.isnan(v["same_over_own"]):
                    known += f"; same action {v['same_over_own']:.2f} x"
                if not math.isnan(v["ami"]):
                    known += f", AMI {v['ami']:.3f}"
                if not math.isnan(v["purity"]):
                    known += (
                        f", purity {v['purity']:.3f} (each code named by its commonest action in"
                        f" the other recordings; one code for all: {v['purity_one_code']:.3f})"
                    )
                alive = "continuous"
                if quantises(model):
                    alive = (
                        f"{v['joint_codes']:.0f} actions, perplexity {v['joint_perplexity']:.1f}"
                    )
                elif vq:
                    alive = f"warm-up: no codes before step {vq_warmup}"
                say(
                    f"held out after epoch {done}: error {copy:.3f} of copying, {zero:.3f} of"
                    f" zeroed codes, {marginal:.3f} of other clips' codes; {alive}{known}"
                )
                for sentence in (
                    complaints(v, quantises(model)) if vq is None or vq.active() else []
                ):
                    say(f"WARNING: {sentence}")
                for sentence in [] if noted else notes:
                    say(f"note: {sentence}")
                noted = True
            path = save(done, inside) if writes else None
            began = time.perf_counter()
            if halt:
                say(f"stopped after epoch {epoch}, itr {itr}; saved {path}; go on with --resume")
        if halt:
            break
    if args.dry_run:
        kept, saved = (
            args.keep_last + args.epochs // (args.save_every_freq or total + 1),
            12 * count / 2**30,
        )  # with Adam's moments
        out = pathlib.Path(args.out_dir).absolute()
        free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free / 2**30
        counts = ", ".join(f"{len(v)} files in {k}" for k, v in splits.items())
        say(
            f"dry run, nothing written; {counts}; a batch: z {tuple(batch['z'].shape)}; {total}"
            f" steps, {vq_warmup} of them not quantised"
        )
        say(
            f"{total} steps x {seconds:.2f} s here make {total * seconds / 3600:.1f} h;"
            f" {memory / 1024:.1f} GiB of memory at the peak"
        )
        say(
            f"{kept} checkpoints x {saved:.2f} GiB, {free:.1f} GiB of disk free:"
            f" {'enough' if kept * saved < free else 'NOT ENOUGH'}"
        )
    say(f"peak memory {checkpoint.peak_memory(device):.0f} MiB")
    if world > 1:
        del ddp
        leave_group()
    if args.test_mode:
        say(
            f"{'PASS' if passed else 'FAIL'} after {step} steps:"
            f" {verdict or 'the run ended before the codes were in use'}"
        )
        sys.exit(not passed)
