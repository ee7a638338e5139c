"""Fine-tune an action-conditioned predictor (V-JEPA 2-AC) on robot episodes with LoRA, or train one
wholly, on a frozen V-JEPA encoder.

    python train_lora.py --data robot/b/*.tfrecord* --scaler robot/b.pkl --base robot/base.pt --encoder vit_tiny --crop_size 64  # laptop
    torchrun --nproc_per_node=8 train_lora.py --data 'gs://gresearch/robotics/droid/1.0.1/*.tfrecord*'   # 8 GPUs, Meta's AC file

Reads robot episodes (droid.py), or features of them (encode.py --dataset droid), and the scaler of
fit_scaler.py. Writes to --out_dir: adapter/ (PEFT's files), train.csv, val.csv, curves.png,
bad_clips.jsonl, args.json and checkpoints. Go on with --resume."""

import argparse
import contextlib
import datetime
import functools
import importlib
import itertools
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from data import ActionScaler, collate, prefetch, windows
from droid import POSE, DroidClips, DroidReader, compose_poses, droid_clips, open_droid
from evaluation.held_out import (
    beside,
    beside_columns,
    check_adapters,
    held_out,
    hold_state,
    leave_group,
)
from files.logs import append_jsonl, open_logs, plot_curves
from files.mirror import Mirror
from kernels import chosen
from model import (
    PREDICTS,
    TARGETS,
    ACModel,
    channel_stats,
    lora_layers,
    make_inputs,
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
    action="extend",
    required=True,
    help="TFRecords, trajectory.h5, NAME.npz, features (.tar), folders, globs, URLs; may be repeated",
)
flag(
    "--val_data",
    nargs="+",
    action="extend",
    help="held-out episodes (default: --val_fraction of --data); may be repeated",
)
flag("--val_fraction", type=float, default=0.1, help="share of the episodes held out")
flag(
    "--val_clips",
    type=int,
    default=256,
    help="held-out clips to validate on; 0 turns validation off",
)
flag(
    "--scaler",
    default="droid_action_scaler.pkl",
    help="action statistics from fit_scaler.py --dataset droid; folded into the base",
)
flag("--no_scale", action="store_true", help="leave actions unscaled (Meta's setting)")
flag("--frames_per_clip", type=int, default=8, help="sampled frames of a clip, one a step")
flag("--fps", type=float, default=4.0, help="sampled frames a second")
flag(
    "--stride",
    type=int,
    help="rows between sampled frames in place of --fps; 15 is Meta's on raw DROID",
)
flag("--crop_size", type=int, default=256, help="pixels of the square crop")
flag(
    "--crop",
    default="reference",
    choices=["reference", "square"],
    help="reference: centre of at most 1.35:1, squeezed, as Meta's",
)
flag(
    "--camera",
    nargs="+",
    action="extend",
    help="cameras, of which each clip draws one (default: exterior_1)",
)
flag(
    "--idle_filter",
    default="light",
    choices=["off", "openpi", "light"],
    help="leave out stretches without motion (droid.py)",
)
flag("--success", default="all", choices=["all", "only"], help="only leaves out failed episodes")
flag(
    "--state_keys",
    nargs="+",
    action="extend",
    help="fields of the state (default: the 7-D pose); other ones need --action_keys",
)
flag(
    "--action_keys",
    nargs="+",
    action="extend",
    help="fields of the action (default: differences of the pose)",
)
flag(
    "--verify",
    action=switch,
    help="check all checksums of TFRecords, which reads them once (default: files up to 50 GB)",
)
flag(
    "--max_bad_fraction",
    type=float,
    default=0.01,
    help="stop when more than this share of clips cannot be read (after 100 clips)",
)
flag("--num_workers", type=int, default=min(8, os.cpu_count()), help="loader processes a rank")
flag("--prefetch_factor", type=int, default=2, help="batches that each loader process has ready")
# model, loss
flag(
    "--base",
    default="vjepa2_ac_vitg",
    help="predictor to start from: Meta's file, a run, a checkpoint, an --export; none: random",
)
flag(
    "--encoder",
    help=(
        "weights of the frozen encoder: a path, URL or name (default: the one in --base), or"
        " vit_tiny (random)"
    ),
)
flag("--full", action=switch, default=False, help="train all of the predictor, without adapters")
flag("--init_from", help="start from this PEFT adapter, a folder; it decides --r --alpha --targets")
flag(
    "--targets",
    nargs="+",
    action="extend",
    help="layers to adapt: any of q_proj k_proj v_proj o_proj mlp.fc1 mlp.fc2 (default: all)",
)
flag("--r", type=int, default=16, help="rank of the adapters")
flag(
    "--alpha",
    type=float,
    default=32.0,
    help="scale of the adapters times sqrt(r), without --rslora times r",
)
flag("--dropout", type=float, default=0.05, help="dropout before the adapters")
flag("--rslora", action=switch, default=True, help="divide alpha by sqrt(r) rather than r")
flag(
    "--fused_qkv",
    action=switch,
    default=False,
    help="one adapter for q, k and v, PEFT's stock form, rather than one each",
)
flag(
    "--train_condition_encoders",
    action=switch,
    default=False,
    help="also train what encodes action and state (new dimensions: always)",
)
flag(
    "--feature_norm",
    default="layer",
    choices=["layer", "standardize"],
    help="with --base none; standardize: centre and scale channels",
)
flag(
    "--pred_dim",
    "--pred_embed_dim",
    type=int,
    default=1024,
    help="width of the predictor, with --base none",
)
flag("--pred_depth", type=int, default=24, help="blocks of the predictor, with --base none")
flag(
    "--predict",
    choices=PREDICTS,
    help=(
        "change: the output is added to the step's own features (default: what the base does,"
        " features with --base none)"
    ),
)
flag(
    "--pred_heads",
    "--pred_num_heads",
    type=int,
    help="attention heads (default: what the base has, 16 with --base none)",
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
# optim
flag("--batch_size", type=int, default=8, help="clips per rank and micro-batch")
flag(
    "--grad_accum",
    "--gradient_accumulation_steps",
    type=int,
    default=16,
    help="micro-batches per step",
)
flag("--max_steps", type=int, default=100_000, help="steps of the schedule")
flag(
    "--lr",
    "--learning_rate",
    type=float,
    default=2e-4,
    help="learning rate between warm-up and anneal",
)
flag("--warmup_steps", type=int, default=500, help="steps of linear warm-up")
flag(
    "--anneal_steps",
    type=int,
    help="steps of linear anneal at the end (default: a tenth of --max_steps)",
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
    "--optim",
    default="adamw",
    choices=["adamw", "adamw8bit"],
    help="adamw8bit: moments in 8 bits (pip install bitsandbytes)",
)
flag(
    "--dtype",
    choices=["bfloat16", "float16", "float32"],
    help="autocast precision (default bfloat16 on a GPU, float32 on a CPU)",
)
# run
flag("--out_dir", default="out/lora", help="folder of this run")
flag(
    "--resume",
    action=switch,
    default=False,
    help="go on from the newest good checkpoint in --out_dir (or --sync_to), if there is one",
)
flag("--save_every_n_steps", type=int, default=1000, help="steps between checkpoints")
flag("--keep_last", type=int, default=2, help="checkpoints to keep")
flag("--eval_every_n_steps", type=int, default=500, help="steps between validations")
flag("--log_every", "--log_every_n_steps", type=int, default=10, help="steps between log lines")
flag(
    "--export",
    help=(
        "at the end write the merged predictor, for unscaled actions, to this file in Meta's layout"
    ),
)
flag(
    "--sync_to",
    help="copy the run's folder to this fsspec URL in the background, and resume from there",
)
flag("--sync_minutes", type=float, default=30.0, help="minutes between copies")
flag("--seed", type=int, default=239, help="seed of weights and clip order")
flag("--wandb_project", help="also log to Weights & Biases (pip install wandb)")
flag(
    "--debug",
    action=switch,
    default=False,
    help="three steps on one clip with all checks, write nothing",
)
flag(
    "--memory_report",
    action=switch,
    default=False,
    help="estimate memory by part, measure it over three steps, write nothing",
)


def lr_at(k, total, args):
    """Learning rate of step k (from 1): linear warm-up, constant, linear anneal to nothing after
    step `total`."""
    anneal = total // 10 if args.anneal_steps is None else args.anneal_steps
    return args.lr * min(1, k / max(args.warmup_steps, 1), (total - k + 1) / max(anneal, 1))


if __name__ == "__main__":
    args = parser.parse_args()
    sys.excepthook = checkpoint.one_sentence
    if low := [
        k
        for k in (
            "batch_size",
            "grad_accum",
            "log_every",
            "save_every_n_steps",
            "eval_every_n_steps",
        )
        if getattr(args, k) < 1
    ]:
        parser.error(f"--{low[0]} {getattr(args, low[0])} is too small")
    args.camera = args.camera or ["exterior_1"]
    args.targets = args.targets or [*TARGETS]
    args.batch_size, args.grad_accum = (1, 1) if args.debug else (args.batch_size, args.grad_accum)

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
    fraction = args.val_fraction if args.val_clips and not args.val_data else 0.0
    train, val, bad = open_droid(
        args.data,
        args.val_data if args.val_clips else None,
        fraction,
        reader,
        idle_filter=args.idle_filter,
        success=args.success,
        max_bad_fraction=args.max_bad_fraction,
        verify=args.verify,
        log=say,
    )
    names, unscaled = reader.names, np.ones(len(reader.names))
    how = (
        f"--dataset droid --data {' '.join(args.data)} --fps {args.fps:g} --val_fraction"
        f" {fraction:g}"
    )
    scaler = (
        ActionScaler(0 * unscaled, unscaled, unscaled, 0, {})
        if args.no_scale
        else ActionScaler.load(args.scaler, how)
    )
    scaler.check(args.scaler, names, args.fps, 1, args.stride or 0)
    reader.scaler = scaler
    if bad:
        say(
            f"{len(bad)} episodes cannot be used, {' '.join(bad[0])} among them; all are listed in"
            " bad_clips.jsonl"
        )
    held, known_to_scaler = {r.name for r in val}, scaler.meta.get("recordings")
    if (
        held & set(known_to_scaler)
        if known_to_scaler
        else val and fraction and fraction != scaler.meta.get("val_fraction", fraction)
    ):
        say(
            "warning: the scaler was fitted on recordings held out here; fit it on the training"
            " shards only (fit_scaler.py --val_fraction)"
        )
    clips, val_set = DroidClips(train, reader, args.seed), DroidClips(val, reader, args.seed)
    if args.val_clips and sum(map(len, windows(val_set, 1, 2))) < 2:
        raise ValueError(
            "the held-out episodes hold fewer than two clips: hold out more, pass --val_data, or"
            " --val_clips 0"
        )
    std = (
        torch.cat([clips[i]["actions"] for items in windows(clips, 16, 16) for i in items])
        .std(0)
        .double()
        .numpy()
        * scaler.scale
    )

    # --- model ---
    base, features = (
        "none" if args.base == "none" else fetch(args.base),
        train[0].kind == "features",
    )
    if base == "none" and not (args.full and (args.encoder or features)):
        raise ValueError(
            "--base none has nothing to adapt: pass --full to train a predictor from random"
            " weights, and its --encoder"
        )
    source = {k: getattr(args, k) for k in ("fps", "crop_size", "frames_per_clip")} | {
        "encode": "frame",
        "frames_per_step": 1,
    }
    encoder, source = open_source(
        train + val if features else [], args.encoder or (None if features else str(base)), **source
    )
    encoder = (
        None
        if features
        else encoder.to(device, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)
    )
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    predictor, base_scaler, known, anew = open_base(
        base, source, len(names), reader.state_dim, size, args.predict
    )
    if features and not args.encoder and known and "encoder_hash" not in known:
        say(
            f"{base} does not say which encoder it belongs to: features are of"
            f" {source['encoder_hash']}; name --encoder to compare"
        )
    size, base_hash, plain = (
        size_of(predictor),
        encoder_hash(predictor),
        sum(p.numel() for p in predictor.parameters()),
    )
    [
        *map(
            say,
            scale_warnings(
                reader, std, bool(known), base_scaler, None if args.no_scale else scaler
            ),
        )
    ]
    options = (
        None
        if args.full
        else {
            k: getattr(args, k) for k in ("targets", "r", "alpha", "dropout", "rslora", "fused_qkv")
        }
    )
    also, file_scaler, same = adapt(
        predictor, base_scaler, anew, scaler, options, args.init_from, args.train_condition_encoders
    )
    encoder_for = functools.partial(
        fold_scaler, predictor.action_encoder, scaler
    )  # of actions scaled otherwise
    predictor.to(device).activation_checkpointing = args.activation_checkpointing
    trained = {n: p for n, p in predictor.named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in trained.values())
    kernels = chosen(
        device,
        getattr(torch, args.dtype),
        predictor.head_dim,
        S := source["grid"] ** 2 + 2,
        (args.frames_per_clip - 1) * S,
    )
    say(
        f"base {base}: {plain:,} parameters on {source['grid']}x{source['grid']} patches, encoder"
        f" {source['encoder_hash']}; {kernels}"
    )
    file = 4e-6 * sum(
        m.lora_A.numel() + m.out_features * len(m.lora_A) for m in lora_layers(predictor).values()
    )
    say(
        f"{count:,} of them trained"
        if args.full
        else f"adapters: {count:,} parameters, {count / plain:.2%}; their file {file:.1f} MB"
    )
    model, loss_scaler = (
        ACModel(predictor, args.auto_steps),
        torch.amp.GradScaler(device.type, enabled=args.dtype == "float16"),
    )
    stats = {
        k: v if v is None else v.to(device)
        for k, v in (known.get("feature_stats") or {"mean": None, "std": None}).items()
    }
    inputs = make_inputs(encoder, "frame", 1, stats, device, autocast)
    if base == "none" and args.feature_norm == "standardize":
        raw = (
            inputs(collate([clips[i] for i in b]), normalize=False)[0]
            for b in windows(clips, args.batch_size, 256, rank, world)
        )
        stats |= channel_stats(raw, source["embed_dim"], device)

    # --- optimizer, resume ---
    decays = [
        {
            "params": [p for p in trained.values() if (p.ndim > 1) == d],
            "weight_decay": args.weight_decay * d,
        }
        for d in (True, False)
    ]
    if args.optim == "adamw8bit" and not importlib.util.find_spec("bitsandbytes"):
        raise ValueError("--optim adamw8bit needs bitsandbytes: pip install bitsandbytes")
    adam = (
        importlib.import_module("bitsandbytes.optim").AdamW8bit
        if args.optim == "adamw8bit"
        else torch.optim.AdamW
    )
    optimizer = adam(
        decays,
        lr=args.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        **{"fused": True} if args.optim == "adamw" else {},
    )
    step, total, dry, pinned = (
        0,
        args.max_steps,
        args.debug or args.memory_report,
        device.type == "cuda",
    )
    ipe = max(
        int(clips.cumulative[-1])
        // (args.frames_per_clip * args.batch_size * args.grad_accum * world),
        1,
    )  # steps of an epoch
    belongs = {
        "action_names": names,
        "scaler_hash": scaler.hash,
        "predict": predictor.predict,
        "base_hash": base_hash,
        "trained_parameters": count,
        "ipe": ipe,
    }
    belongs |= (
        source
        | size
        | {
            k: getattr(args, k)
            for k in ("fps", "stride", "frames_per_clip", "crop", "targets", "alpha", "rslora")
        }
    )
    if rank == 0 and not dry:
        checkpoint.lock(args.out_dir)
    mirror = (
        Mirror.open(args.out_dir, args.sync_to, args.sync_minutes, args.resume)
        if args.sync_to and rank == 0 and not dry
        else None
    )
    if world > 1:
        dist.barrier()  # what --sync_to holds is in --out_dir now
    state, path = checkpoint.load_latest(args.out_dir) if args.resume else (None, None)
    if state is not None:
        state.setdefault("predict", "features")  # the only way before there was --predict
        for k, v in belongs.items():
            if state.get(k) != v:
                keep = " (ranks x --batch_size x --grad_accum must stay)" * (k == "ipe")
                raise ValueError(
                    f"{path} was trained with {k} {state.get(k)}, this run has {v}{keep}: resume"
                    " with the same, or start anew"
                )
        step = state["epoch"] * ipe + state["itr"]
    elif checkpoint.list_checkpoints(args.out_dir) and not dry:
        raise ValueError(
            f"{args.out_dir} holds checkpoints of an earlier run: pass --resume to go on, or"
            " another --out_dir"
        )
    compose = compose_poses if (names, reader.state_dim) == (POSE, 7) else hold_state

    def note_bad(found):
        """Clips that could not be read go into bad_clips.jsonl."""
        if not dry:
            append_jsonl(
                f"{args.out_dir}/bad_clips.jsonl",
                [dict(zip(("file", "key", "reason"), b)) for b in found],
            )

    def evaluate():
        """Errors of all held-out clips ({name: (n, K)}) and the episode of each."""
        *found, failed = held_out(
            predictor,
            val_set,
            inputs,
            args.batch_size,
            args.val_clips,
            args.num_workers,
            args.auto_steps,
            1.0,
            autocast,
            compose,
        )
        note_bad(failed)
        return found

    with without_lora(
        predictor
    ):  # the base on the same clips, once: before anything is learned or loaded
        unadapted = evaluate()[0] if val and same and step < total else None
    if state is not None:
        predictor.load_state_dict(
            predictor.state_dict() | state["predictor" if args.full else "adapter"]
        )
        optimizer.load_state_dict(state["optimizer"])
        loss_scaler.load_state_dict(state["scaler"])
        stats |= {k: v if v is None else v.to(device) for k, v in state["feature_stats"].items()}
        changed = [
            f"--{k} {v} (was {state['args'].get(k)})"
            for k, v in vars(args).items()
            if v != state["args"].get(k)
        ]
        say(f"resumed from {path} at step {step} of {total}; changed flags:", *changed)
    for module in (m for m in (model, encoder) if args.compile and m is not None):
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
    ]
    headers = {
        "train": (columns, *divmod(step, ipe)),
        "val": (
            ["epoch", "itr", *beside_columns(args.frames_per_clip - 1)],
            *divmod(step + 1, ipe),
        ),
    }
    writes = rank == 0 and not dry
    log = (
        open_logs(args.out_dir, headers, vars(args), state is not None, args.wandb_project)
        if writes
        else lambda *row: None
    )

    def save(epoch, itr):
        """Write a checkpoint, the adapter in PEFT's form (its encoders for the base's actions) and
        the curves (rank 0)."""
        state = {
            "predictor" if args.full else "adapter": (
                predictor.state_dict() if args.full else {k: p.detach() for k, p in trained.items()}
            ),
            "optimizer": optimizer.state_dict(),
            "scaler": loss_scaler.state_dict(),
            "epoch": epoch,
            "itr": itr,
            "args": vars(args),
            "action_scaler": {
                k: torch.tensor(v) if k in ("mean", "var", "scale") else v
                for k, v in scaler._asdict().items()
            },
        }
        path = checkpoint.save(
            args.out_dir,
            state
            | belongs
            | {"held_out": sorted(held), "feature_stats": stats, "world_size": world},
            epoch,
            itr,
            args.keep_last,
            0,
        )
        if not args.full:
            save_adapter(
                predictor,
                os.path.join(args.out_dir, "adapter"),
                str(base),
                also,
                encoder_for(file_scaler),
            )
        plot_curves(args.out_dir)
        return path

    # --- train ---
    last = min(total, step + 3) if dry else total
    stop = torch.zeros(1)  # on the CPU, so that looking at it costs the GPU nothing
    for name in () if dry else (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *a: stop.fill_(1))
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
        pin_memory=pinned,
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
    if args.debug:
        batches = itertools.repeat({k: v[:1] for k, v in next(batches).items() if k != "bytes"})
        checks = check_adapters(model, inputs(next(batches)), autocast, trained)
        next(checks)
    while step < last:
        epoch, itr = divmod(step, ipe)
        lr = args.lr if args.debug else lr_at(step + 1, total, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses, keys = torch.zeros(2, device=device), []
        for micro in range(args.grad_accum):
            wait = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - wait
            note_bad(batch["bad"])
            torch.manual_seed(
                hash((args.seed, step, micro, rank))
            )  # of dropout; so the generator's state need not be saved
            keys, failed, seen = (
                keys + batch["key"],
                failed + batch["bad"],
                seen + len(batch["key"]) + len(batch["bad"]),
            )
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
        pending.append((epoch, itr, losses, norm, lr, keys))
        step += 1

        halt = (
            stop.clone()
        )  # a signal may come at any line: all ranks must decide on the same value
        if world > 1:
            dist.all_reduce(halt, dist.ReduceOp.MAX)
        at_end = step == last or bool(halt)
        saves, evaluates = (
            at_end or step % args.save_every_n_steps == 0,
            step == last or step % args.eval_every_n_steps == 0,
        )
        if saves or evaluates or step % args.log_every == 0:
            values = torch.stack([torch.cat([p[2], p[3].reshape(1)]) for p in pending])
            if world > 1:
                dist.all_reduce(values := values.cpu() / world)
            seconds, wait = (time.perf_counter() - began) / len(pending), waited / len(pending)
            memory = checkpoint.peak_memory(device)
            for (e, i, _, _, rate, keys), (j, s, n) in zip(pending, values.tolist()):
                if not math.isfinite(
                    j + s + (n if args.dtype != "float16" else 0)
                ):  # float16 skips those steps
                    good = ["none", *checkpoint.list_checkpoints(args.out_dir)][-1]
                    where = (
                        f"step {e * ipe + i}, clips {', '.join(keys)}; last good checkpoint:"
                        f" {good}; lower --lr or set --grad_clip 1"
                    )
                    raise ValueError(
                        f"the loss ({j + s:.4g}) or its gradient ({n:.4g}) is not finite at {where}"
                    )
                speed = len(keys) * world / seconds
                row = e, i, j, s, j + s, rate, n, speed, wait / seconds, memory
                log("train", dict(zip(columns, row)), e * ipe + i)
            say(
                f"step {step:6d}  jloss {j:.4f}  sloss {s:.4f}  lr {rate:.2e}  {speed:6.1f} clips/s"
                f"  data wait {wait / seconds:4.0%}  ETA"
                f" {datetime.timedelta(seconds=round((last - step) * seconds))}",
                flush=True,
            )
            pending, waited, began = [], 0.0, time.perf_counter()
        if val and evaluates and not halt:
            row, text = beside(*evaluate(), unadapted)
            log("val", dict(zip(("epoch", "itr"), divmod(step, ipe))) | row, step)
            say(f"held out at step {step}: {text}")
        if saves:
            path = save(*divmod(step, ipe)) if writes else None
        began = time.perf_counter() if saves or evaluates else began
        if mirror:
            mirror.tick()
        if halt:
            say(f"stopped at step {step}; saved {path}; go on with --resume")
            break
    if args.debug:
        say(*checks, sep="\n")
    if args.memory_report and rank == 0:
        importlib.import_module("evaluation.memory").compare(
            encoder, model, optimizer, inputs(batch), options, args.dtype, autocast
        )
    if args.export and writes and step >= total:
        if predictor.predict == "change":
            say(f"{args.export} predicts changes: --base reads that, Meta's own code refuses it")
        export(predictor, args.export, encoder_for(None), known, belongs | {"feature_stats": stats})
    if mirror:
        mirror.close()
    say(f"peak memory {checkpoint.peak_memory(device):.0f} MiB")
    if world > 1:
        del ddp
        leave_group()
