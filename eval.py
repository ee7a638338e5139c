"""Does the model use the action? A report on a run of train_ac.py or train_lora.py, on held-out
gameplay or robot episodes.

    python eval.py --checkpoint out/demo --data 'demo/features/val/*.tar' --video 'demo/val/*.tar'
    python eval.py --checkpoint out/robot/r16 --landscape x z

Reads a run folder or checkpoint and held-out data (VPT video or features of the run's encoder,
robot episodes; default: what the run held out). Prints a table and writes report.json and
report.html, one page with all figures in it, beside the checkpoint or to --out."""

import argparse
import functools
import math
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from data import windows
from evaluation import pictures
from evaluation.held_out import (
    bands_of,
    from_other_recordings,
    gap_of,
    gap_text,
    held_out,
    interval_text,
    meter_summary,
    precision_of,
    precision_text,
)
from evaluation.runs import open_held_out, open_run
from files.disk import write_atomically
from files.logs import to_json
from files.vpt import CONTINUOUS, DEGREES_PER_PIXEL, HOTBAR, SLOTS, ClipReader
from model import predict, predict_on

SAMPLED, GRID = (
    96,
    17,
    # clips whose actions are ranked and swept; points along an axis of a landscape, odd: no motion
    # is one of them
)


def action_groups(names):
    """{group: indices of its dimensions} of action names: camera, keys, hotbar, gui; position,
    rotation, gripper; else by field."""
    known = {"camera": CONTINUOUS, "hotbar": HOTBAR + SLOTS, "gui": ["gui_open"]}
    known |= {
        "position": ["x", "y", "z"],
        "rotation": ["roll", "pitch", "yaw"],
        "gripper": ["gripper"],
    }
    out = {}
    for i, name in enumerate(names):
        other = "keys" if name.startswith(("key.", "mouse.")) else name.rpartition(".")[0] or name
        out.setdefault(
            next((g for g, members in known.items() if name in members), other), []
        ).append(i)
    return out


@torch.no_grad()
def group_errors(predictor, z, actions, states, others, compose, groups):
    """Mean |error| (B, K) as in model.action_meter, {"tf_GROUP", "ro_GROUP"}, when only the
    dimensions of one group are those of `others` (B, K, A): of another recording."""
    out, target = {}, z[:, 1:]
    for name, columns in groups.items():
        a = actions.clone()
        a[..., columns] = others[..., columns]
        out[f"tf_{name}"] = (predict(predictor, z[:, :-1], a, states) - target).abs().mean((2, 3))
        out[f"ro_{name}"] = (
            (predictor.rollout(z[:, :1], a, compose(states[:, 0], a)) - target).abs().mean((2, 3))
        )
    return out


@torch.no_grad()
def energies(predictor, z, actions, states, candidates):
    """e(a) = mean |P_1(z_t, a) - z_t+1| (N,) of candidates (N, A) at the last transition of one
    clip: z (T, N, E), actions (T-1, A), states (T, S). What comes before is computed once, and its
    keys and values serve all candidates."""
    c = len(z) - 1
    past = (
        predict_on(predictor, z[None, : c - 1], actions[None], states[None])[1] if c > 1 else None
    )
    room = max(
        2**27 // (c * (z.shape[1] + 2) * predictor.predictor_embed.out_features), 1
    )  # a chunk's copies of keys take 0.5 GB at most
    out = []
    for part in candidates.split(room):
        a = torch.cat([actions[: c - 1].expand(len(part), -1, -1), part[:, None]], dim=1)
        step = predictor.rollout(
            z[None, :c].expand(len(part), -1, -1, -1),
            a,
            states[None, :c].expand(len(part), -1, -1),
            cache=past,
        )
        out.append((step[:, 0] - z[c]).abs().mean((1, 2)))
    return torch.cat(out)


def drawn_from_others(actions, i, recordings, count, generator):
    """Whole actions (count, A) drawn from all steps of all clips of other recordings than the i-th
    clip's; of all other clips where there is only one recording. actions (n, K, A)."""
    clips = [j for j, name in enumerate(recordings) if name != recordings[i]]
    if not clips:
        clips = [j for j in range(len(recordings)) if j != i]
    K = actions.shape[1]
    at = torch.randint(len(clips) * K, (count,), generator=generator)
    return actions[torch.tensor(clips)[at // K], at % K]


def rank_of(energy, others):
    """Share of the sampled actions (N,) that explain the step better than the true one; ties count
    half."""
    return ((others < energy).double() + 0.5 * (others == energy).double()).mean().item()


def to_units(actions, scaler):
    """Scaled actions (..., A) -> what was recorded, float64."""
    out = actions.double().clone().numpy()
    out[..., : len(scaler.mean)] = out[..., : len(scaler.mean)] * scaler.scale + scaler.mean
    return out


def swept(action, names, scaler, dims, axes):
    """The true scaled action (A,) with two dimensions (indices) taken through axes (in units) -> (G
    * G, A), the first one slowest. A mouse that moves also turns the camera, by
    vpt.DEGREES_PER_PIXEL, and the other way round."""
    out = np.repeat(to_units(action, scaler)[None], len(axes[0]) * len(axes[1]), axis=0)
    for i, values in zip(dims, np.meshgrid(*axes, indexing="ij")):
        out[:, i] = values.ravel()
        other = {0: 2, 1: 3, 2: 0, 3: 1}.get(i) if names[:4] == CONTINUOUS else None
        if other is not None and other not in dims:
            out[:, other] = values.ravel() * np.radians(DEGREES_PER_PIXEL) ** (1 if i < 2 else -1)
    return torch.from_numpy(scaler.transform(out)).float()


@torch.no_grad()
def retrieve(predictions, pool):
    """Index of the nearest pool step (P, N, E) for each prediction (..., N, E), by mean
    |difference|, and that distance."""
    distance = (
        torch.cdist(predictions.flatten(0, -3).flatten(1), pool.flatten(1), p=1) / pool[0].numel()
    )
    least, index = distance.min(1)
    return index.view(predictions.shape[:-2]), least.view(predictions.shape[:-2])


@torch.no_grad()
def retrieval(predictor, places, T, batch_size, compose, load):
    """The nearest step to each of a rollout, of all evaluated ones of its recording. places: clip
    -> (record, window); load: clips -> (z, actions, states). -> {clip: K (clip, step) found}; share
    of hits, median steps off by horizon [K], also of copying; chance of a hit."""
    groups, found, rows = (
        {},
        {},
        {k: [] for k in ("hit", "offset", "copy_hit", "copy_offset", "chance")},
    )
    for i, (number, _) in places.items():
        groups.setdefault(number, []).append(i)
    for group in tqdm(groups.values(), "retrieval", delay=10, unit=" recordings"):
        parts = [load(group[k : k + batch_size]) for k in range(0, len(group), batch_size)]
        ahead = torch.cat(
            [predictor.rollout(h[:, :1], a, compose(s[:, 0], a)) for h, a, s in parts]
        )
        z, time = (
            torch.cat([h for h, _, _ in parts]),
            torch.tensor([places[i][1] * T + t for i in group for t in range(T)]),
        )
        true = torch.arange(len(time)).view(-1, T)[:, 1:]
        copied, index = (
            retrieve(x, z.flatten(0, 1))[0].cpu() for x in (z[:, :1].expand_as(ahead), ahead)
        )
        found |= {i: [(group[j // T], j % T) for j in row] for i, row in zip(group, index.tolist())}
        for name, at in (("", index), ("copy_", copied)):
            rows[name + "hit"].append((at == true).double())
            rows[name + "offset"].append((time[at] - time[true]).abs())
        rows["chance"].append(torch.full((len(group),), 1 / len(time)))
    rows = {k: torch.cat(v) for k, v in rows.items()}
    return found, {
        k: (v.median(0).values if "offset" in k else v.mean(0)).tolist() for k, v in rows.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="run folder of train_ac.py or train_lora.py, or one of its checkpoints",
    )
    parser.add_argument(
        "--data",
        "--data_path",
        nargs="+",
        action="append",
        help="held-out shards or episodes (default: the run's)",
    )
    parser.add_argument(
        "--encoder", help="weights of the encoder, for pixels (default: what the run used)"
    )
    parser.add_argument(
        "--video", nargs="+", help="shards that features were made from, to show their frames"
    )
    parser.add_argument(
        "--out", help="folder for report.json and report.html (default: beside the checkpoint)"
    )
    parser.add_argument(
        "--val_clips", type=int, default=512, help="clips to evaluate; they stay in memory"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=256,
        help="actions of other recordings that the true one is ranked among",
    )
    parser.add_argument(
        "--landscape",
        nargs=2,
        metavar="NAME",
        help="two action dimensions to sweep (mouse_dx mouse_dy; robots: x z)",
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        metavar="BLOCK:HEAD",
        help="attention heads to show (default: those of the last block)",
    )
    parser.add_argument(
        "--decoder", choices=["pyav", "decord"], help="video decoder (default: the run's)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="clips at once")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="autocast precision (default: what the run was trained in)",
    )
    parser.add_argument("--num_workers", type=int, default=2, help="loader processes")
    args = parser.parse_args()
    sys.excepthook = checkpoint.one_sentence
    if (
        min(args.samples, args.val_clips - 1, args.batch_size) < 1
        or args.landscape
        and len({*args.landscape}) < 2
    ):
        parser.error(
            "one --samples, one of --batch_size, two --val_clips and two different --landscape"
            " dimensions are the least"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor, state, scaler, path = open_run(args.checkpoint)
    dtype, autocast = precision_of(args.dtype, state, device)
    run, names, seconds = (
        state["args"],
        state["action_names"],
        state["frames_per_step"] / state["fps"],
    )
    if unknown := [d for d in args.landscape or [] if d not in names]:
        raise ValueError(
            f"--landscape {unknown[0]}: no such action; the run has {', '.join(names)}"
        )
    heads = pictures.check_heads(predictor, args.heads)

    # --- data, action meter ---
    dataset, inputs, compose, bad = open_held_out(
        state, scaler, args.data, args.encoder, device, dtype, args.decoder
    )
    features = "safetensors" in dataset.records[0].members
    videos = pictures.find_videos(args.video, dataset.records) if args.video else None
    predictor.to(device)
    mean, scale = (torch.tensor(x, device=device).float() for x in (scaler.mean, scaler.scale))
    states_of, clips, sizes = functools.partial(compose, mean=mean, scale=scale), [], []

    def keep(batch):
        """Every clip stays, as it was read, for what comes after the meter: a copy, since loader
        processes lend theirs."""
        sizes.append(len(batch["key"]))
        kept = {k: v for k, v in batch.items() if k not in ("bad", "bytes")}
        clips.extend(
            {k: v[i].clone() if torch.is_tensor(v) else v[i] for k, v in kept.items()}
            for i in range(sizes[-1])
        )
        return inputs(batch)

    def load(numbers):
        """(z, actions, states) of kept clips, on the device."""
        return inputs(
            {
                k: torch.stack([clips[i][k] for i in numbers])
                for k in clips[0]
                if torch.is_tensor(clips[0][k])
            }
        )

    meter = (
        args.batch_size,
        args.val_clips,
        args.num_workers,
        run["auto_steps"],
        run.get("loss_exp", 1.0),
        autocast,
    )
    errors, recordings, more = held_out(predictor, dataset, keep, *meter, compose=compose)
    errors = {k: v for k, v in errors.items() if k[2:3] == "_"}
    summary = meter_summary(errors, recordings)
    for file, key, reason in bad + more:
        print(f"left out: {file} {key}: {reason}")
    T, K = state["frames_per_clip"] // state["frames_per_step"], errors["ro_true"].shape[1]
    gap = gap_text(summary["tf_gap"], summary["tf_gap_low"], summary["tf_gap_high"], recordings)
    facts = [
        f"{path}: {len(recordings)} clips of {len(set(recordings))} recordings;"
        f" {precision_text(dtype, device, predictor, K)}",
        pictures.table(errors, summary, seconds, gap),
    ]
    print(*facts, sep="\n")
    bands = bands_of(errors, recordings)
    report = {
        "checkpoint": path,
        "dtype": dtype,
        "clips": len(recordings),
        "recordings": len(set(recordings)),
    } | summary
    report |= {
        "by_horizon": {k: v.mean(0).tolist() for k, v in errors.items() if k.startswith("ro_")},
        "intervals": bands,
    }
    # --- groups of actions ---
    groups, rows, actions = action_groups(names), [], torch.stack([c["actions"] for c in clips])
    items = sum(windows(dataset, max(args.batch_size, 2), args.val_clips), [])
    others_of = from_other_recordings(dataset, items)
    for first, size in tqdm(
        [*zip(np.cumsum([0, *sizes]), sizes)], "groups of actions", delay=10, unit=" batches"
    ):
        z, a, s = load(range(first, first + size))
        others = others_of(recordings[first : first + size], a)  # those of held_out
        with autocast():
            found = group_errors(predictor, z, a, s, others, states_of, groups)
        rows.append({k: v.cpu() for k, v in found.items()})
    found = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    gaps = {
        g: {p: gap_of(found[f"{p}_{g}"], errors[f"{p}_true"], recordings) for p in ("tf", "ro")}
        for g in groups
    }
    facts.append("gap of one group of actions: one step ahead, rolled out")
    if math.isnan(summary["tf_gap"]):
        facts[-1] += f": {gap}"
    for g, gap in gaps.items() if not math.isnan(summary["tf_gap"]) else ():
        facts.append(
            f"  {g:22}"
            + "".join(
                f"{x:+9.2%} {interval_text(low, high, recordings)}" for x, low, high in gap.values()
            )
        )

    # --- rank, energy landscape ---
    spans = dict(zip(names, np.quantile(np.abs(to_units(actions, scaler)), 0.99, axis=(0, 1))))
    dims = (
        args.landscape
        or [d for d in dict.fromkeys(["mouse_dx", "mouse_dy", "x", "z", *names]) if spans.get(d)][
            :2
        ]
    )
    if len(dims) < 2 or not all(spans[d] for d in dims):
        raise ValueError(
            f"--landscape {' '.join(dims)}: one of two never differs from 0 in these data, choose"
            " others"
        )
    index, units = [names.index(d) for d in dims], dict(zip(names, scaler.meta.get("units", [])))
    plain, axes = (
        to_units(actions, scaler)[..., index],
        [np.linspace(-spans[d], spans[d], GRID) for d in dims],
    )  # (n, K, 2)
    generator, ranks, lands, misses = torch.Generator().manual_seed(0), [], [], []
    for i in tqdm(range(min(len(clips), SAMPLED)), "rank, landscape", delay=10, unit=" clips"):
        z, a, s = (x[0] for x in load([i]))
        others = drawn_from_others(actions, i, recordings, args.samples, generator)
        tried = torch.cat(
            [actions[i, -1:], others, swept(actions[i, -1], names, scaler, index, axes)]
        )
        with autocast():
            e = energies(predictor, z, a, s, tried.to(device)).float().cpu()
        ranks.append(rank_of(e[0], e[1 : len(others) + 1]))
        lands.append(e[len(others) + 1 :].view(GRID, GRID).numpy())
        best = [ax[k] for ax, k in zip(axes, np.unravel_index(lands[-1].argmin(), (GRID, GRID)))]
        misses.append(
            [
                np.abs(x - plain[i, -1]).mean(0)
                for x in (np.array([best]), to_units(others, scaler)[:, index])
            ]
        )
    best, chance = np.mean(misses, axis=0)
    report |= {"groups": gaps, "rank": float(np.mean(ranks)), "ranked_clips": len(ranks)}
    report["landscape"] = {
        d: {"unit": units.get(d, ""), "argmin": x, "random": y}
        for d, x, y in zip(dims, best.tolist(), chance.tolist())
    }
    source = "other recordings" if len(set(recordings)) > 1 else "the same recording"
    facts.append(
        f"rank of the true action among {args.samples} of {source}: {np.mean(ranks):.3f} (0 best,"
        f" 0.5 chance; {len(ranks)} clips)"
    )
    for d, x, y in zip(dims, best, chance):
        facts.append(
            f"  {d:22} minimum of the error is {x:.3g} {units.get(d, '')} off the truth, a random"
            f" action {y:.3g}"
        )

    # --- retrieval, frames ---
    places = {
        i: item[2:]
        for i, item in enumerate(items)
        if clips[i]["key"] == dataset.records[item[2]].key
    }  # else another was drawn
    with autocast():
        nearest, rows = retrieval(predictor, places, T, args.batch_size, states_of, load)
    report["retrieval"] = rows
    facts.append(
        "retrieval: nearest step " + "".join(f"{f'+{k * seconds:.3g} s':>9}" for k in range(1, T))
    )
    labels = {
        "hit": "is the true one",
        "copy_hit": "same, copying",
        "offset": "median steps off",
        "copy_offset": "same, copying",
    }
    for name, label in labels.items():
        facts.append(
            f"  {label:22}"
            + "".join(f"{x:9.0f}" if "offset" in name else f"{x:9.1%}" for x in rows[name])
        )
    print(*facts[2:], sep="\n")
    r = dataset.reader
    reader = (
        ClipReader(r.frames, r.fps, r.frames_per_step, 128, r.action_space, scaler, r.encode)
        if videos
        else r
    )

    @functools.cache
    def frames(i):
        """The pictures that the steps of a clip end with (T, H, W, 3)."""
        return pictures.look_up(
            clips[i], dataset.records[places[i][0]], places[i][1], videos, reader
        )

    # --- the page ---
    order = [i for i in errors["ro_copy"][:, -1].argsort(descending=True).tolist() if i in places]
    chosen_clips, pixels = (
        pictures.spread_over(order, recordings, 3),
        not features or videos is not None,
    )
    z, a, s = (x[0] for x in load(chosen_clips[:1]))
    with autocast(), torch.no_grad():
        ahead = predictor.rollout(z[None, :1], a[None], states_of(s[None, 0], a[None]))[0]
    steps = sorted({1, (K + 2) // 3, (2 * K + 2) // 3, K})
    colors = [
        c.reshape(-1, state["grid"], state["grid"], 3)
        for c in pictures.pca_colors(z[1:].cpu(), ahead.cpu())
    ]
    tokens = {"frame": [frames(chosen_clips[0])[k] for k in steps]} if pixels else {}
    tokens |= {
        name: [c[k - 1] for k in steps] for name, c in zip(("recorded", "predicted"), colors)
    }
    patch = int((z[-2] - z[-3]).abs().mean(1).argmax()) if T > 2 else 0
    maps = pictures.attention_maps(predictor, z[:-1], a, s[:-1], heads)  # in float32
    moved = np.linalg.norm((plain[: len(lands), -1] / [x[-1] for x in axes]), axis=1)
    largest = pictures.spread_over((-moved).argsort().tolist(), recordings, 4)
    strips, titles = [], ["start", *(f"+{k * seconds:.3g} s" for k in range(1, T))]
    for i in chosen_clips if pixels else []:
        off = [(places[j][1] - places[i][1]) * T + t - k for k, (j, t) in enumerate(nearest[i], 1)]
        both = {
            "recorded": frames(i),
            "nearest to\nprediction": [None, *(frames(j)[t] for j, t in nearest[i])],
        }
        strips.append(
            pictures.plot_rows(
                both, titles, ["", *(f"{x:+d} steps" if x else "the same" for x in off)]
            )
        )
    now = frames(chosen_clips[0])[:-1] if pixels else None
    figures = {
        "Error by horizon": [
            pictures.plot_horizons(
                {k: errors[f"ro_{k}"].mean(0).numpy() for k in pictures.COLORS}, bands, seconds
            )
        ],
        "Which actions it uses": [pictures.plot_groups(gaps)],
        "Rank of the true action": [pictures.plot_ranks(ranks, args.samples)],
        "Energy landscape": [
            pictures.plot_landscapes(
                [(recordings[i], lands[i], plain[i, -1]) for i in largest],
                axes,
                [(d, units.get(d, "")) for d in dims],
            )
        ],
        "Nearest step": [pictures.plot_retrieval(rows, seconds)],
        "Rollout as frames": strips,
        "Patch tokens as colours": [pictures.plot_rows(tokens, [titles[k] for k in steps])],
        "Attention": [pictures.plot_attention(maps, heads, predictor.grid, patch, now, seconds)],
    }
    out = args.out or os.path.dirname(path) or "."
    write_atomically(os.path.join(out, "report.json"), to_json(report).encode())
    pictures.write_page(
        os.path.join(out, "report.html"),
        f"{path}: does it use the action?",
        "\n".join(facts),
        figures,
    )
    print(
        f"written to {out}: report.json, report.html; peak memory"
        f" {checkpoint.peak_memory(device):.0f} MiB"
    )
