"""The table and the figures of eval.py, and the page they stand on: one HTML file that opens
offline."""

import base64
import html
import io

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.decomposition import PCA

from files.disk import write_atomically
from files.shards import Slice, expand, index_shards, read_ticks
from files.video import mp4_times
from files.vpt import step_size
from kernels import apply_rope
from model import rope_tables

CAPTIONS = {
    "Error by horizon": (
        """Mean absolute error of a rollout from one known step, with 95 % intervals over recordings. Look for: true
    actions below shuffled and zero ones, all below the copy. The gap is what wrong actions cost; skill below 1 beats a still picture."""
    ),
    "Which actions it uses": (
        """The same gap when one group of dimensions comes from another recording and the rest is true. Look for: bars at
    zero, whose actions the model ignores, or which hardly ever change in these data."""
    ),
    "Rank of the true action": (
        """The true last action of each clip among whole actions of other recordings, by the error one step ahead. Look
    for: a heap at the left. Flat is chance: the model cannot tell which action happened."""
    ),
    "Energy landscape": (
        """Error one step ahead as two dimensions of the action are swept and the others stay (mouse and camera turn
    together), where most moves. Look for: a bowl, its minimum (circle) near the truth (star). Stripes are a dimension that is ignored."""
    ),
    "Nearest step": (
        """Is the true step the nearest to the rollout, of all evaluated steps of its recording? Look for: hits above
    copying and chance, offsets below copying, which is k steps off after k steps unless nothing moves."""
    ),
    "Rollout as frames": (
        """Above what was recorded, below the recorded frame whose features are nearest to the prediction, where much
    changes. Look for: the same turns above and below. One frame over and over: the prediction stands still."""
    ),
    "Patch tokens as colours": (
        """Patches in the colours of three principal components, fitted on recorded and predicted ones together.
    Look for: the same changes in both rows, and colours that do not fade."""
    ),
    "Attention": (
        """From one patch of the last step (framed), the one that changed most, to the patches of each step (colour), its action
    and its state (numbers; a row with all its patches makes 100 %). Look for: heads that look at the last action."""
    ),
}
NO_PIXELS = (
    "Left out: these data are features without pixels. Name the shards they were made from with"
    " --video."
)
COLORS = {"true": "C0", "shuffled": "C3", "zero": "C1", "copy": "0.4"}

# --- table, frames ---


def table(errors, summary, seconds, gap):
    """What the action meter says, as lines for a person; `seconds` is the length of a step, `gap`
    what gap_text says of the one one step ahead."""
    lines = ["one step ahead"]
    lines.append(f"  skill (error / copying the last step)  {summary['tf_skill']:.3f}")
    gap = gap.replace(" [", ", 95 % interval over recordings [")
    lines.append(f"  action gap (shuffled / true - 1)       {gap}")
    lines.append(
        "rolled out: mean |error|"
        + "".join(f"{f'+{(k + 1) * seconds:.3g} s':>9}" for k in range(errors["ro_true"].shape[1]))
    )
    given = not np.isnan(summary["ro_gap"])  # else there is no other recording to take actions of
    for name in ("true", "shuffled", "zero", "copy"):
        if name == "shuffled" and not given:
            continue
        label = name + (" actions" if name != "copy" else " first step")
        lines.append(
            f"  {label:22}" + "".join(f"{x:9.4f}" for x in errors[f"ro_{name}"].mean(0).tolist())
        )
    gap = errors["ro_shuffled"].mean(0) / errors["ro_true"].mean(0) - 1
    skill = errors["ro_true"].mean(0) / errors["ro_copy"].mean(0)
    if given:
        lines.append(f"  {'action gap':22}" + "".join(f"{x:+9.2%}" for x in gap.tolist()))
    lines.append(f"  {'skill':22}" + "".join(f"{x:9.3f}" for x in skill.tolist()))
    return "\n".join(lines)


def spread_over(order, recordings, count):
    """The first `count` clips of an order, each of another recording as long as that goes."""
    first = {recordings[i]: i for i in reversed(order)}.values()
    return [*dict.fromkeys([i for i in order if i in first] + order)][:count]


def find_videos(patterns, records):
    """--video -> {key: Record with an mp4}; ValueError if it lacks a recording of the features."""
    if "safetensors" not in records[0].members:
        raise ValueError(
            "--video is for data that are features, these are pixels themselves: leave it out"
        )
    found, bad = index_shards(expand(patterns))
    videos = {r.key: r for r in found if "mp4" in r.members}
    if missing := sorted({r.recording for r in records} - videos.keys()):
        raise ValueError(
            f"--video holds no recording {missing[0]} ({len(videos)} others, {len(bad)}"
            " unreadable): name the shards encoded"
        )
    return videos


def look_up(clip, record, place, videos, reader):
    """The frames (T, H, W, 3) uint8 that the steps of a clip end with: its own, or those of the
    recording its features were made from, cut by a ClipReader; ValueError if that is another
    recording of the same name."""
    each, last = (
        reader.frames_per_step,
        (reader.frames_per_step - 1 if getattr(reader, "encode", "frame") == "tubelet" else 0),
    )
    video = clip.get("video")
    if video is None:
        r = videos[record.recording]
        with Slice(r.shard, *r.members["mp4"]) as f:
            times, ticks = mp4_times(f), read_ticks(r)
            start = int(record.key.rpartition("@")[2]) + place * reader.frames * step_size(
                ticks.rate, reader.fps
            )
            cut = reader(f, times, ticks, start, None, r.key)
        if not torch.allclose(cut["actions"], clip["actions"], atol=1e-4):
            raise ValueError(
                f"--video: {r.shard} {r.key} has other actions than the features of that name: it"
                " is not what they show"
            )
        video = cut["video"]
    return video[last::each].permute(0, 2, 3, 1).numpy()


# --- attention ---


@torch.no_grad()
def attention_of(attn, qkv, rope, block):
    """What model.Attention weighs values by: its qkv output (B, L, 3 D), RoPE tables, tokens a step
    -> softmax(Q K^T / sqrt(hd)) (B, nh, L, L) under the block-causal mask, and the values (B, nh,
    L, hd)."""
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = apply_rope((q.contiguous(), k.contiguous()), *rope)
    step = torch.arange(q.shape[2], device=q.device) // block
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(step[:, None] < step, -torch.inf)
    return scores.softmax(-1), v


def check_heads(predictor, heads):
    """["BLOCK:HEAD"] or None (those of the last block) -> [(block, head)]; ValueError for what the
    predictor does not have."""
    blocks, count = len(predictor.predictor_blocks), predictor.predictor_blocks[0].attn.num_heads
    every = {f"{b}:{h}": (b, h) for b in range(blocks) for h in range(count)}
    if wrong := [x for x in heads or [] if x not in every]:
        raise ValueError(
            f"--heads {wrong[0]}: write BLOCK:HEAD, from 0:0 to {blocks - 1}:{count - 1}"
        )
    return [every[x] for x in heads] if heads else [*every.values()][-count:]


@torch.no_grad()
def attention_maps(predictor, z, actions, states, heads):
    """What the tokens of the last step of one clip attend to: z (T, N, E), actions (T, A), states
    (T, S), heads [(block, head)] -> for each head (S, T, S): query, step, key; tokens are [action,
    state, N patches]. One pass of the predictor, looked at by hooks."""
    T, N, caught = len(z), z.shape[1], {}
    blocks = predictor.predictor_blocks
    hooks = [
        blocks[b].attn.qkv.register_forward_hook(lambda m, i, out, b=b: caught.update({b: out}))
        for b in {b for b, _ in heads}
    ]
    predictor(z.flatten(0, 1)[None], actions[None], states[None])
    for hook in hooks:
        hook.remove()
    C = 1 + (predictor.state_encoder is not None)
    rope = rope_tables(predictor.positions(T, C, z.device), predictor.head_dim)
    weights = {
        b: (
            attention_of(blocks[b].attn, qkv, rope, C + N)[0][0, :, -(C + N) :]
            .unflatten(-1, (T, C + N))
            .cpu()
        )
        for b, qkv in caught.items()
    }
    return [weights[b][h] for b, h in heads]


def plot_attention(maps, heads, grid, patch, frames, seconds):
    """A row a head: the attention of one patch of the last step to the patches of every step, that
    to action and state in numbers."""
    (H, W), T = grid, maps[0].shape[1]
    C, rows = maps[0].shape[0] - H * W, len(maps) + (frames is not None)
    fig = Figure(figsize=(1.35 * T + 1.6, 1.75 * rows + 0.6), layout="constrained")
    axes = fig.subplots(rows, T, squeeze=False)
    for t, ax in enumerate(axes[0] if frames is not None else []):
        ax.imshow(frames[t], extent=(-0.5, W - 0.5, H - 0.5, -0.5))
    for row, m in zip(axes[rows - len(maps) :], maps):
        image = 100 * m[C + patch].numpy()  # (T, S)
        for t, ax in enumerate(row):
            shown = ax.imshow(
                image[t, C:].reshape(H, W),
                vmin=0,
                vmax=image[:, C:].max(),
                cmap="magma",
                interpolation="nearest",
            )
            tokens = zip(("action", "state"), image[t, :C])
            ax.set_xlabel(
                "\n".join(f"{name} {x:.0f} %" for name, x in tokens), fontsize=9, labelpad=2
            )
        fig.colorbar(shown, ax=row, shrink=0.8, format="%.2g", label="%")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for t, ax in enumerate(axes[0]):
        ax.set_title(f"{(t - T + 1) * seconds:+.3g} s" if t < T - 1 else "now", fontsize=11)
    for ax in axes[:, -1]:
        ax.add_patch(
            Rectangle(
                (patch % W - 0.5, patch // W - 0.5), 1, 1, fill=False, edgecolor="cyan", lw=2.5
            )
        )
    for row, label in zip(
        axes, ["frame"] * (frames is not None) + [f"block {b}\nhead {h}" for b, h in heads]
    ):
        row[0].set_ylabel(label, fontsize=11)
    return fig


# --- colours of tokens ---


def pca_colors(*tokens):
    """Arrays (..., E) -> arrays (..., 3) in [0, 1]: three principal components, fitted on all of
    them, between their 1st and 99th percentiles."""
    rows = np.concatenate([np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in tokens])
    found = PCA(3, random_state=0).fit_transform(rows)
    low, high = np.quantile(found, [0.01, 0.99], axis=0)
    found = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    parts = np.split(
        found,
        np.cumsum([x[..., 0].numel() if torch.is_tensor(x) else x[..., 0].size for x in tokens])[
            :-1
        ],
    )
    return [p.reshape(*x.shape[:-1], 3) for p, x in zip(parts, tokens)]


def plot_rows(rows, titles, below=()):
    """rows: {label: [image, or None for a blank]}, frames or coloured patch tokens, a title above
    and a text below each column."""
    fig = Figure(figsize=(1.75 * len(titles) + 0.9, 1.8 * len(rows) + 0.5), layout="constrained")
    axes = fig.subplots(len(rows), len(titles), squeeze=False)
    for row, (label, images) in zip(axes, rows.items()):
        row[0].set_ylabel(label, fontsize=12)
        for ax, image in zip(row, images):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(image is not None)
            if image is not None:
                ax.imshow(image, interpolation="nearest")
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=12)
    for ax, text in zip(axes[-1], below):
        ax.set_xlabel(text, fontsize=12)
    return fig


# --- curves ---


def plot_horizons(means, intervals, seconds):
    """Error rolled out against seconds ahead, and skill and gap of the same rollouts. means: {name:
    (K,)} of true, shuffled, zero, copy; intervals: {name: (low, high)}, and of gap and skill."""
    at = seconds * np.arange(1, len(means["true"]) + 1)
    fig = Figure(figsize=(13, 4), layout="constrained")
    axes = fig.subplots(1, 3)
    for name, color in COLORS.items():
        label = name + (" actions" if name != "copy" else " of the first step")
        axes[0].plot(at, means[name], "o-", color=color, label=label)
        axes[0].fill_between(at, *intervals[name], color=color, alpha=0.2, lw=0)
    gap, skill = 100 * (means["shuffled"] / means["true"] - 1), means["true"] / means["copy"]
    percent = 100 * np.array(intervals["gap"])
    for ax, values, band, color, level in (
        (axes[1], gap, percent, "C3", 0),
        (axes[2], skill, intervals["skill"], "C0", 1),
    ):
        ax.plot(at, values, "o-", color=color)
        ax.fill_between(at, *band, color=color, alpha=0.2, lw=0)
        ax.axhline(level, color="0.5", lw=1)
    units = "mean |error|, layer-normed features", "shuffled / true - 1, %", "error / copying"
    for ax, title, unit in zip(axes, ("error", "action gap", "skill"), units):
        ax.set(title=title, xlabel="seconds ahead", ylabel=unit)
    axes[0].legend(fontsize=10)
    return fig


def plot_groups(gaps):
    """gaps: {group: {"tf": (gap, low, high), "ro": ...}}, as shares."""
    fig = Figure(figsize=(2.2 + 1.8 * len(gaps), 3.8), layout="constrained")
    ax = fig.subplots()
    for k, (which, label) in enumerate((("tf", "one step ahead"), ("ro", "rolled out"))):
        value, low, high = 100 * np.array([g[which] for g in gaps.values()]).T
        at = np.arange(len(gaps)) + 0.38 * (k - 0.5)
        ax.bar(at, value, 0.36, yerr=np.abs([value - low, high - value]), capsize=4, label=label)
    ax.axhline(0, color="0.3", lw=1)
    ax.set_xticks(range(len(gaps)), gaps, fontsize=11)
    ax.set(title="action gap when only this is shuffled", ylabel="error / true - 1, %")
    ax.legend(fontsize=10)
    return fig


def plot_ranks(ranks, samples):
    fig = Figure(figsize=(6.5, 3.6), layout="constrained")
    ax = fig.subplots()
    ax.hist(ranks, np.linspace(0, 1, 21))
    ax.axhline(len(ranks) / 20, color="0.5", ls=":", label="chance: all bins alike")
    ax.axvline(np.mean(ranks), color="C3", label=f"mean {np.mean(ranks):.3f} (chance 0.5)")
    ax.set(
        title=f"rank of the true action among {samples} of other recordings",
        xlabel="share of them with a lower error",
        ylabel="clips",
    )
    ax.legend(fontsize=10)
    return fig


def plot_landscapes(panels, axes, labels):
    """panels: [(recording, energies (G, G) of the first dimension by the second, truth (2,))];
    labels: [(name, unit)] of both."""
    fig = Figure(figsize=(4.2 * len(panels), 4), layout="constrained")
    extent = [x for a in axes for x in (a[0] - (a[1] - a[0]) / 2, a[-1] + (a[1] - a[0]) / 2)]
    for ax, (key, energy, truth) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        image = ax.imshow(
            energy.T,
            origin="lower",
            extent=extent,
            aspect="auto",
            cmap="viridis",
            interpolation="nearest",
        )
        i, j = np.unravel_index(energy.argmin(), energy.shape)
        style = {"ls": "", "markersize": 13, "markeredgecolor": "k", "clip_on": False}
        ax.plot(*truth, marker="*", color="red", label="truth", **style)
        ax.plot(axes[0][i], axes[1][j], marker="o", color="white", label="minimum", **style)
        ax.set_title(
            key.partition("/recordings")[0].rpartition("/")[2][-28:], fontsize=11
        )  # keys of DROID are long
        ax.set(xlabel=f"{labels[0][0]}, {labels[0][1]}", ylabel=f"{labels[1][0]}, {labels[1][1]}")
        fig.colorbar(image, ax=ax, label="mean |error|")
    fig.axes[0].legend(fontsize=10, loc="upper left")
    return fig


def plot_retrieval(rows, seconds):
    """rows: means over clips (K,) of hit, copy_hit, offset, copy_offset (medians) and chance."""
    at = seconds * np.arange(1, len(rows["hit"]) + 1)
    fig = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2)
    for ax, name, factor in ((left, "hit", 100), (right, "offset", 1)):
        ax.plot(at, factor * np.array(rows[name]), "o-", color="C0", label="prediction")
        ax.plot(
            at,
            factor * np.array(rows["copy_" + name]),
            "o-",
            color="0.4",
            label="copy of the first step",
        )
        ax.set(xlabel="seconds ahead")
    left.axhline(100 * rows["chance"], color="0.5", ls=":", label="chance")
    left.set(title="nearest step of the recording is the true one", ylabel="%", ylim=(-3, None))
    right.set(title="median offset of the nearest step", ylabel="steps")
    left.legend(fontsize=10)
    right.legend(fontsize=10)
    return fig


# --- the page ---


def write_page(path, title, facts, figures):
    """One HTML file with its pictures inside. facts: plain text; figures: {heading of CAPTIONS:
    [Figure]}."""

    def picture(figure):
        figure.savefig(f := io.BytesIO(), format="png", dpi=80)
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(f.getvalue()).decode()}">'

    style = (
        "body{font:16px/1.45 sans-serif;max-width:72em;margin:2em"
        " auto}img{max-width:100%}pre{overflow-x:auto}p{max-width:50em}"
    )
    parts = [
        '<!doctype html><html lang="en"><meta'
        f' charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    ]
    parts.append(f"<h1>{html.escape(title)}</h1><pre>{html.escape(facts)}</pre>")
    for heading, found in figures.items():
        parts.append(
            f"<h2>{heading}</h2><p>{html.escape(CAPTIONS[heading] if found else NO_PIXELS)}</p>"
        )
        parts += map(picture, found)
    write_atomically(path, "\n".join(parts).encode())
