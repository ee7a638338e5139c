"""Train a frame-causal, action-conditioned predictor on the features of a frozen V-JEPA encoder
(V-JEPA 2-AC, on gameplay).

    python train_ac.py --data demo/train/*.tar --val_data demo/val/*.tar --encoder vit_tiny --crop_size 64 --epochs 4 --ipe 100 \\
        --warmup 1 --anneal 1 --batch_size 16 --pred_dim 128 --pred_depth 4 --pred_heads 4       # a laptop
    torchrun --nproc_per_node=8 --max_restarts=3 train_ac.py --data VPT/*.tar --resume            # 8 GPUs, released ViT-L

Reads VPT shards (or feature shards of encode.py) and the scaler of fit_scaler.py. Writes to
--out_dir: train.csv, val.csv, curves.png, bad_clips.jsonl, args.json and checkpoints. Stop it
whenever you like and go on with --resume. """

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
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import weights
from data import ActionScaler, Clips, collate, open_split, prefetch, vpt_loader, windows
from evaluation.held_out import METERS, blank, gap_text, held_out, leave_group, meter_summary
from evaluation.runs import own_predictor
from files.logs import append_jsonl, open_logs, plot_curves
from files.remote import cached
from files.shards import expand, line_warnings
from files.vpt import ACTION_SPACES, CONTINUOUS, ClipReader
from kernels import chosen
from model import PREDICTS, ACModel, Predictor, channel_stats, copy_fitting, make_inputs
from weights import decoder_of, open_source

# --- flags ---
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
flag, switch = parser.add_argument, argparse.BooleanOptionalAction
# data
flag(
    "--data",
    "--data_path",
    nargs="+",
    action="append",
    help="training shards: paths, globs, {a..b} ranges, URLs; may be repeated",
)
flag(
    "--data_weights",
    type=float,
    nargs="+",
    help="share of the clips that each --data gives (default: by length)",
)
flag(
    "--val_data",
    nargs="+",
    action="append",
    help="held-out shards (default: --val_fraction of --data)",
)
flag(
    "--val_fraction",
    type=float,
    default=0.1,
    help="share of the shards (of the recordings, below ten shards) held out",
)
flag(
    "--val_clips",
    type=int,
    default=256,
    help="held-out clips to validate on; 0 turns validation off",
)
flag(
    "--cache_dir",
    help=(
        "copy shards at URLs into this folder (of each node) when first needed; without it they are"
        " streamed"
    ),
)
flag(
    "--cache_size",
    type=float,
    default=100.0,
    help="GB that --cache_dir may hold; what was used longest ago goes first",
)
flag("--scaler", default="vpt_action_scaler.pkl", help="action statistics from fit_scaler.py")
flag("--frames_per_clip", type=int, default=16, help="sampled frames of a clip")
flag("--fps", type=float, default=5.0, help="sampled frames a second")
flag("--frames_per_step", type=int, default=2, help="sampled frames a step")
flag(
    "--tubelet_size",
    type=int,
    default=2,
    help="frames merged in time by the patch embedding; must be the encoder's",
)
flag("--crop_size", type=int, default=256, help="pixels of the square crop")
flag(
    "--action_space",
    type=int,
    default=13,
    choices=ACTION_SPACES,
    help="13 camera and hotbar keys, 36 all of VPT's, 38 the guides' table",
)
flag(
    "--gui",
    default="keep",
    choices=["keep", "drop"],
    help="drop leaves out clips with an open inventory",
)
flag("--decoder", default="pyav", choices=["pyav", "decord"], help="video decoder")
flag("--num_workers", type=int, default=min(8, os.cpu_count()), help="loader processes a rank")
flag(
    "--max_bad_fraction",
    type=float,
    default=0.01,
    help="stop when more than this share of clips cannot be read (after 100 clips)",
)
flag(
    "--horizontal_flip",
    action=switch,
    default=False,
    help="mirror half of the clips, their actions too",
)
flag(
    "--random_resize_scale",
    type=float,
    default=1.0,
    help="smallest random crop as a share of the short side",
)
flag(
    "--motion_shift",
    type=float,
    default=0.0,
    help="move the crop over the clip by up to this share of it",
)
flag(
    "--temporal_jitter",
    type=int,
    default=0,
    help="move each sampled frame by up to this many ticks",
)
flag(
    "--action_noise", type=float, default=0.0, help="std of noise on the scaled continuous actions"
)
# model, loss
flag(
    "--encoder",
    help=(
        "weights of the frozen encoder: a path, URL or name (default vjepa2_vitl), or vit_tiny"
        " (random)"
    ),
)
flag(
    "--encode",
    default="tubelet",
    choices=["tubelet", "frame", "clip"],
    help="what the encoder sees at once (README)",
)
flag(
    "--feature_norm",
    default="layer",
    choices=["layer", "standardize"],
    help="standardize: centre and scale channels before it",
)
flag("--pred_dim", "--pred_embed_dim", type=int, default=1024, help="width of the predictor")
flag("--pred_depth", type=int, default=24, help="blocks of the predictor")
flag(
    "--pred_heads",
    "--pred_num_heads",
    type=int,
    default=16,
    help="attention heads of the predictor",
)
flag(
    "--predict",
    default="features",
    choices=PREDICTS,
    help="change: the output is added to the step's own features (not Meta's layout)",
)
flag(
    "--init_from",
    help=(
        "start from another run's or Meta's AC predictor; what does not fit is listed and made anew"
    ),
)
flag(
    "--activation_checkpointing",
    "--use_activation_checkpointing",
    action=switch,
    default=False,
    help="recompute blocks, save memory",
)
flag(
    "--compile",
    "--compile_model",
    action=switch,
    default=False,
    help="torch.compile the predictor and the encoder",
)
flag("--auto_steps", type=int, default=2, help="steps of the rollout loss")
flag("--loss_exp", type=float, default=1.0, help="1: L1, 2: half squared error")
# optim
flag("--batch_size", type=int, default=8, help="clips per rank and micro-batch")
flag(
    "--grad_accum",
    "--gradient_accumulation_steps",
    type=int,
    default=1,
    help="micro-batches per step",
)
flag("--epochs", "--num_epochs", type=int, default=315, help="epochs of --ipe steps")
flag("--ipe", type=int, default=300, help="steps of an epoch")
flag("--max_steps", type=int, help="stop after this many steps, whatever the schedule says")
flag(
    "--lr",
    "--learning_rate",
    type=float,
    default=4.25e-4,
    help="learning rate between warm-up and anneal",
)
flag("--start_lr", type=float, default=7.5e-5, help="learning rate at the start of the warm-up")
flag("--final_lr", type=float, default=0.0, help="learning rate of the last step")
flag("--warmup", type=int, default=15, help="epochs of linear warm-up")
flag("--anneal", type=int, default=15, help="epochs of linear anneal at the end")
flag("--weight_decay", type=float, default=0.04, help="AdamW decay of matrices")
flag(
    "--grad_clip",
    "--gradient_clipping",
    type=float,
    default=0.0,
    help="largest gradient norm; 0 is off",
)
flag(
    "--dtype",
    choices=["bfloat16", "float16", "float32"],
    help="autocast precision (default bfloat16 on a GPU, float32 on a CPU)",
)
# run
flag("--out_dir", default="out/ac", help="folder of this run")
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
flag(
    "--save_encoder",
    action=switch,
    default=False,
    help="put the frozen encoder into checkpoints, in Meta's layout",
)
flag("--val_every", type=int, default=1, help="epochs between validations")
flag("--log_every", type=int, default=10, help="steps between log lines")
flag("--seed", type=int, default=239, help="seed of weights and clip order")
flag("--wandb_project", help="also log to Weights & Biases (pip install wandb)")
flag(
    "--dry_run",
    action=switch,
    default=False,
    help="check everything, run three steps, write nothing",
)


def lr_at(k, total, ipe, args):
    """Learning rate of step k (from 1): linear warm-up, constant, linear anneal that ends at step
    `total` (vjepa2 schedulers.py)."""
    warmup, anneal = args.warmup * ipe, args.anneal * ipe
    if k < warmup:
        return args.start_lr + k / warmup * (args.lr - args.start_lr)
    if k < total - anneal:
        return args.lr
    return args.lr + (k - (total - anneal)) / max(anneal, 1) * (args.final_lr - args.lr)


if __name__ == "__main__":
    args = parser.parse_args()
    sys.excepthook = checkpoint.one_sentence
    if (
        args.warmup + args.anneal > args.epochs
        or min(args.batch_size, args.grad_accum, args.ipe, args.log_every) < 1
    ):
        parser.error(
            f"--warmup {args.warmup} and --anneal {args.anneal} do not fit into --epochs"
            f" {args.epochs}, or a size is below 1"
        )

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
    names, groups = ACTION_SPACES[args.action_space], args.data or [["VPT/*.tar"]]
    fraction = args.val_fraction if args.val_clips and not args.val_data else 0.0
    how = (
        f"--data {' '.join(sum(groups, []))} --fps {args.fps:g} --frames_per_step"
        f" {args.frames_per_step} --val_fraction {fraction:g}"
    )
    scaler = ActionScaler.load(args.scaler, how)
    scaler.check(args.scaler, CONTINUOUS, args.fps, args.frames_per_step)
    source = {
        k: getattr(args, k)
        for k in ("encode", "fps", "frames_per_step", "crop_size", "frames_per_clip")
    }
    options = {
        "action_space": args.action_space,
        "scaler": scaler,
        "decoder": args.decoder,
        "gui": args.gui,
    }
    augment = {
        k: getattr(args, k)
        for k in (
            "horizontal_flip",
            "random_resize_scale",
            "motion_shift",
            "temporal_jitter",
            "action_noise",
        )
    }
    reader, val_reader = ClipReader(**source, **options, **augment), ClipReader(**source, **options)
    val_data = args.val_data if args.val_clips else None
    if args.cache_dir:
        shards = cached(
            [expand(g) for g in [*groups, *(val_data or [])]], args.cache_dir, args.cache_size, say
        )
        groups, val_data = shards[: len(groups)], shards[len(groups) :] or None
    train, shares, val, bad = open_split(
        groups, args.data_weights, val_data, fraction, args.max_bad_fraction
    )
    if bad:
        say(
            f"{len(bad)} recordings cannot be used, {' '.join(bad[0])} among them; all are listed"
            " in bad_clips.jsonl"
        )
    for line in line_warnings(train + val) if rank == 0 else []:
        say(f"WARNING: {line}")
    if args.val_clips and not val:
        say(
            "WARNING: nothing to validate on: streams and single recordings cannot be split; pass"
            " --val_data"
        )
    held, known = {r.name for r in val}, scaler.meta.get("recordings")
    if (
        held & set(known)
        if known
        else val and fraction and fraction != scaler.meta.get("val_fraction", fraction)
    ):
        say(
            "warning: the scaler was fitted on recordings held out here; fit it on the training"
            " shards only (fit_scaler.py --val_fraction)"
        )
    val_set = Clips(val, [1.0] * len(val), val_reader, args.seed)
    if val and sum(map(len, windows(val_set, 1, 2))) < 2:
        raise ValueError(
            "the held-out recordings hold fewer than two clips: hold out more, or pass"
            " --val_clips 0"
        )
    pixels = [k for k, v in augment.items() if v != parser.get_default(k) and k != "action_noise"]
    if pixels and train and "safetensors" in train[0].members:
        raise ValueError(
            f"--{pixels[0]} needs pixels, and these shards hold features: train on the video"
            " shards, or drop the flag"
        )

    # --- model ---
    if args.save_encoder and args.predict == "change":
        raise ValueError(
            "--save_encoder writes Meta's layout, whose predictors give features: drop it, or"
            " --predict change"
        )
    encoder, source = open_source(train + val if train else [], args.encoder, **source)
    if encoder is not None:
        if encoder.tubelet_size != args.tubelet_size:
            raise ValueError(
                f"--tubelet_size {args.tubelet_size}, but this encoder merges"
                f" {encoder.tubelet_size} frames"
            )
        encoder.to(
            device,
            torch.bfloat16 if args.dtype == "bfloat16" and not args.save_encoder else torch.float32,
        )
    elif args.save_encoder:
        raise ValueError(
            "--save_encoder: these shards hold features, so name the --encoder that made them"
        )
    grid, size = (
        source["grid"],
        {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads},
    )
    predictor = Predictor(
        source["embed_dim"], len(names), 2, (grid, grid), predict=args.predict, **size
    ).to(device)
    predictor.activation_checkpointing = args.activation_checkpointing
    count, S = sum(p.numel() for p in predictor.parameters()), grid**2 + 2  # tokens a step
    kernels = chosen(
        device,
        getattr(torch, args.dtype),
        predictor.head_dim,
        S,
        S * (args.frames_per_clip // args.frames_per_step - 1),
    )
    say(
        f"predictor {count:,} parameters; {grid}x{grid} patches x {source['embed_dim']}, encoder"
        f" {source['encoder_hash']}; {kernels}"
    )
    model = ACModel(predictor, args.auto_steps, args.loss_exp)
    stats = {"mean": None, "std": None}  # of the features' channels, for --feature_norm standardize
    inputs = make_inputs(encoder, args.encode, args.frames_per_step, stats, device, autocast)

    # --- optimizer, resume ---
    params = [p for p in model.parameters() if p.requires_grad]
    decays = [
        {
            "params": [p for p in params if (p.ndim > 1) == big],
            "weight_decay": args.weight_decay * big,
        }
        for big in (True, False)
    ]
    optimizer = torch.optim.AdamW(decays, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    loss_scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    step, total = 0, args.epochs * args.ipe
    belongs = {"action_names": names, "scaler_hash": scaler.hash} | source | size
    belongs["decoder"] = decoder_of(train + val, args.decoder)
    belongs["predict"] = args.predict
    belongs |= {
        k: getattr(args, k)
        for k in ("encode", "fps", "frames_per_step", "frames_per_clip", "feature_norm", "ipe")
    }
    if rank == 0 and not args.dry_run:
        checkpoint.lock(args.out_dir)
    state, path = checkpoint.load_latest(args.out_dir) if args.resume else (None, None)
    if state is not None:
        state.setdefault("decoder", state["args"].get("decoder", "pyav"))  # before it was stored
        state.setdefault("predict", "features")  # the only way before there was --predict
        for k, v in belongs.items():
            if state.get(k) != v:
                raise ValueError(
                    f"{path} was trained with {k} {state.get(k)}, this run has {v}: resume with the"
                    " same, or start anew"
                )
        predictor.load_state_dict(own_predictor(state))
        optimizer.load_state_dict(state["optimizer"])
        loss_scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        stats |= {k: v if v is None else v.to(device) for k, v in state["feature_stats"].items()}
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
        now, was = (
            args.batch_size * world * args.grad_accum,
            state["batch_size"] * state["world_size"] * state["args"]["grad_accum"],
        )
        if now != was:
            inside = (
                f"; of epoch {state['epoch']}, some clips come twice and others not at all"
                if state["itr"]
                else ""
            )
            say(
                f"a step now takes {now} clips, not {was}: other clips from here on{inside};"
                " --grad_accum or --batch_size can keep them"
            )
        elif world != state["world_size"]:
            say(
                f"{world} ranks, not {state['world_size']}: the same {now} clips in each step as"
                " before"
            )
    elif checkpoint.list_checkpoints(args.out_dir) and not args.dry_run:
        raise ValueError(
            f"{args.out_dir} holds checkpoints of an earlier run: pass --resume to go on, or"
            " another --out_dir"
        )
    elif args.init_from:
        start = (
            os.path.join(args.init_from, checkpoint.LATEST)
            if os.path.isdir(args.init_from)
            else args.init_from
        )
        taken, anew, left = copy_fitting(
            predictor, weights.part_of(start, "predictor", "predictor_embed.weight")
        )
        say(
            f"--init_from: {len(taken)} tensors taken; made anew: {weights.some(anew)}; left over:"
            f" {weights.some(left)}"
        )
    if state is None and args.feature_norm == "standardize":
        if not train:
            raise ValueError(
                "--feature_norm standardize measures the features first, which needs local shards"
            )
        sample = Clips(train, shares, val_reader, args.seed)
        raw = (
            collate([sample[i] for i in items])
            for items in windows(sample, args.batch_size, 256, rank, world)
        )
        stats |= channel_stats(
            (inputs(batch, normalize=False)[0] for batch in raw), source["embed_dim"], device
        )
    last = min(total, args.max_steps or total, step + 3 if args.dry_run else total)
    if step >= last:
        say(f"nothing left to do: {step} steps are done")
        sys.exit(leave_group() if world > 1 else None)
    for module in filter(None, (model, encoder) if args.compile else ()):
        module.compile(dynamic=False)  # the shapes of training never change
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model

    columns = [
        "epoch",
        "itr",
        "jloss",
        "sloss",
        "total_loss",
        "lr",
        "grad_norm",
        "clips_per_s",
        "data_wait",
        "memory_mib",
        "bytes_per_s",
    ]
    headers = {
        "train": (columns, *divmod(step, args.ipe)),
        "val": (["epoch", "jloss", "sloss", *METERS], *divmod(step, args.ipe)),
    }
    writes = rank == 0 and not args.dry_run
    log = (
        open_logs(args.out_dir, headers, vars(args), state is not None, args.wandb_project)
        if writes
        else lambda *row: None
    )

    def note_bad(found):
        """Clips that could not be read go into bad_clips.jsonl."""
        if not args.dry_run:
            append_jsonl(
                f"{args.out_dir}/bad_clips.jsonl",
                [dict(zip(("file", "key", "reason"), b)) for b in found],
            )

    def save(epoch, itr):
        """Write a checkpoint and the curves (rank 0)."""
        state = {
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
            "feature_stats": stats,
            "action_scaler": {
                k: torch.tensor(v) if k in ("mean", "var", "scale") else v
                for k, v in scaler._asdict().items()
            },
        }
        state |= (
            belongs
            | {"held_out": sorted(held)}
            | (weights.meta_state(encoder, predictor) if args.save_encoder else {})
        )
        path = checkpoint.save(
            args.out_dir, state, epoch, itr, args.keep_last, args.save_every_freq
        )
        plot_curves(args.out_dir)
        return path

    def validate(epoch):
        """Losses and the action meter on the held-out clips of all ranks: a row of val.csv, and
        what it says of the gap."""
        errors, recordings, failed = held_out(
            predictor,
            val_set,
            inputs,
            args.batch_size,
            args.val_clips,
            args.num_workers,
            args.auto_steps,
            args.loss_exp,
            autocast,
        )
        note_bad(failed)
        losses = {k: errors.pop(k).mean().item() for k in ("jloss", "sloss")}
        meter = meter_summary(errors, recordings)
        gap = gap_text(meter["tf_gap"], meter["tf_gap_low"], meter["tf_gap_high"], recordings)
        if not math.isnan(meter["ro_gap"]):
            gap += f"; rolled out {meter['ro_gap']:+.2%}"
        return {"epoch": epoch} | losses | meter, gap

    # --- train ---
    stop = torch.zeros(1)  # on the CPU, so that looking at it costs the GPU nothing
    for name in () if args.dry_run else (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *a: stop.fill_(1))
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
    batches, seen, failed, pending, waited, began = (
        prefetch(loader, device),
        0,
        [],
        [],
        0.0,
        time.perf_counter(),
    )
    while step < last:
        epoch, itr = divmod(step, args.ipe)
        lr = lr_at(step + 1, total, args.ipe, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses, keys, fetched = torch.zeros(2, device=device), [], 0
        for micro in range(args.grad_accum):
            wait = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - wait
            if batch is None:
                raise ValueError(
                    f"rank {rank} got no clip: there are fewer recordings than ranks x workers; use"
                    " fewer, or local shards"
                )
            note_bad(batch["bad"])
            keys, failed, seen = (
                keys + batch["key"],
                failed + batch["bad"],
                seen + len(batch["key"]) + len(batch["bad"]),
            )
            fetched += batch["bytes"]
            if seen >= 100 and len(failed) > args.max_bad_fraction * seen:
                raise ValueError(
                    f"{len(failed)} of {seen} clips cannot be read, {' '.join(failed[-1])} the"
                    " last; see bad_clips.jsonl"
                )
            with (
                contextlib.nullcontext()
                if micro == args.grad_accum - 1 or world == 1
                else ddp.no_sync()
            ):
                z, actions, states = inputs(batch)
                with autocast():
                    jloss, sloss = ddp(z, actions, states)
                loss_scaler.scale((jloss + sloss) / args.grad_accum).backward()
            losses += torch.stack([jloss.detach(), sloss.detach()]) / args.grad_accum
        loss_scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        loss_scaler.step(optimizer)
        loss_scaler.update()
        optimizer.zero_grad(set_to_none=True)
        pending.append((epoch, itr, losses, norm, lr, keys, fetched))
        step += 1

        halt = (
            stop.clone()
        )  # a signal may come at any line: all ranks must decide on the same value
        if world > 1:
            dist.all_reduce(halt, dist.ReduceOp.MAX)
        at_end = step % args.ipe == 0 or step == last or bool(halt)
        if at_end or step % args.log_every == 0:
            values = (
                torch.stack([torch.cat([p[2], p[3].reshape(1)]) for p in pending]).cpu().double()
            )
            values = (
                torch.cat([values, torch.tensor([[world * p[6]] for p in pending])], dim=1) / world
            )
            if world > 1:
                dist.all_reduce(values)
            seconds, wait = (time.perf_counter() - began) / len(pending), waited / len(pending)
            memory = checkpoint.peak_memory(device)
            for (e, i, _, _, rate, clips, _), (j, s, n, read) in zip(pending, values.tolist()):
                if not math.isfinite(
                    j + s + (n if args.dtype != "float16" else 0)
                ):  # float16 skips those steps
                    good = ["none", *checkpoint.list_checkpoints(args.out_dir)][-1]
                    where = (
                        f"epoch {e}, itr {i}, clips {', '.join(clips)}; last good checkpoint:"
                        f" {good}; lower --lr or set --grad_clip 1"
                    )
                    raise ValueError(
                        f"the loss ({j + s:.4g}) or its gradient ({n:.4g}) is not finite at {where}"
                    )
                speed = len(clips) * world / seconds
                row = e, i, j, s, j + s, rate, n, speed, wait / seconds, memory, read / seconds
                log("train", dict(zip(columns, row)), e * args.ipe + i)
            say(
                f"epoch {e:3d} itr {i:4d}  jloss {j:.4f}  sloss {s:.4f}  lr {rate:.2e} "
                f" {speed:6.1f} clips/s  data wait {wait / seconds:4.0%}  ETA"
                f" {datetime.timedelta(seconds=round((last - step) * seconds))}",
                flush=True,
            )
            pending, waited, began = [], 0.0, time.perf_counter()
        if at_end:
            done, inside = divmod(step, args.ipe)
            if (
                val
                and (args.dry_run or not inside)
                and (done % args.val_every == 0 or step == last)
                and not halt
            ):
                v, gap = validate(done)
                log("val", blank(v), step)
                say(
                    f"held out after epoch {done}: skill {v['tf_skill']:.3f} (error / copying),"
                    f" action gap {gap}"
                )
                if v["tf_gap"] < 0.02 and done > args.warmup:
                    say(
                        "WARNING: shuffled actions cost less than 2 %: the predictor hardly uses"
                        " the action (yet)"
                    )
            path = save(done, inside) if writes else None
            began = time.perf_counter()
            if halt:
                say(f"stopped after epoch {epoch}, itr {itr}; saved {path}; go on with --resume")
                break
    if args.dry_run:
        kept, saved = (
            args.keep_last + args.epochs // (args.save_every_freq or total + 1),
            12 * count / 2**30,
        )  # with Adam's moments
        out = pathlib.Path(args.out_dir).absolute()
        free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free / 2**30
        shapes = [f"{k} {tuple(v.shape)}" for k, v in batch.items() if isinstance(v, torch.Tensor)]
        say(
            f"dry run, nothing written; {len(train)} recordings to train on, {len(val)} held out,"
            f" {len(bad)} unusable; a batch:",
            *shapes,
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
