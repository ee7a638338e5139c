"""The table and the figures of eval.py, and the page they stand on: one HTML file that opens
offline."""

import base64
import html
import io

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA

from evaluation.held_out import signed
from files.disk import write_atomically
from files.shards import Slice, expand, index_shards, read_ticks
from files.video import mp4_times
from files.vpt import step_size
from kernels import apply_rope
from model import rope_tables

CAPTIONS = {
    "Error by horizon": "Mean absolute error of a rollout from one known step, with 95 % intervals"
    " over recordings. Look for: true actions below shuffled and zero ones, all below the copy. The"
    " gap is what wrong actions cost. Skill below 1 is better than a still picture.",
    "Which actions it uses": "The same gap when one group of dimensions comes from another"
    " recording and the rest is true. Look for: bars at zero. The model ignores those actions, or"
    " they hardly ever change in these data.",
    "Rank of the true action": "The true last action of each clip is ranked among whole actions of"
    " other recordings, by the error one step ahead. Look for: a heap at the left. Flat is chance:"
    " the model cannot tell which action happened.",
    "Energy landscape": "Error one step ahead while two dimensions of the action are swept and the"
    " others stay (mouse and camera turn together), in the clips with the largest motion. Look for:"
    " a bowl with its minimum (circle) near the truth (star). Stripes mean that one dimension is"
    " ignored; colours that span less than 1 % mean that both are.",
    "Nearest step": "Is the true step the nearest to the rollout, among all evaluated steps of its"
    " recording? Look for: hits above copying and chance, offsets below copying. A copy is k steps"
    " off after k steps, unless nothing moves.",
    "Rollout as frames": "Above: what was recorded. Below: the recorded frame whose features are"
    " nearest to the prediction. Shown are clips in which much changes. Look for: the same turns"
    " above and below. One frame over and over means that the prediction stands still.",
    "Predicted as pictures": "What the decoder makes of features: recorded ones, those of a rollout"
    " from the first step under the recorded actions, and rollouts from the same step under other"
    " actions. Look for: the same scene in the first three rows, turns to the left and to the right"
    " that go apart, and a walk that comes closer. What is blurred in the second row is the"
    " decoder's fault, what is wrong in the third alone the predictor's.",
    "Error in pixels": "Against what was recorded. No predictor can be better than the decoder on"
    " true features, the ceiling. Look for: predictions near the ceiling and above the copy. PSNR"
    " likes blur: a grey mean of all that may come is not punished.",
    "Patch tokens as colours": "Patches in the colours of three principal components, fitted on"
    " recorded and predicted ones together. Look for: the same changes in both rows, and colours"
    " that do not fade.",
    "Attention": "From one patch of the last step (framed), the one that changed most, to the"
    " patches of each step (colour), its action and its state (numbers). A row with all its patches"
    " makes 100 %. Each row has its own colours, from its smallest to its largest value, which"
    " stand at its left. Look for: heads that look at the last action.",
}
NO_PIXELS = (
    "Left out: these data are features without pixels. Name the shards they were made from with"
    " --video."
)
COLORS = {"true": "C0", "shuffled": "C3", "zero": "C1", "copy": "0.4"}

# curves may lie on each other: each has a mark of its own
STYLES = {"true": "o-", "shuffled": "s--", "zero": "^:", "copy": "x-"}

# all colour bars
COLORBAR_FORMAT = "%.3g"

# an axis shows at least this span, or noise would fill it and look like an effect
GAP_SPAN = (-1, 5)  # %
SKILL_SPAN = (0.8, 1.1)
LANDSCAPE_SPAN = 1  # %


# --- table, frames ---


def table(errors, summary, seconds, gap):
    """What the action meter says, as lines for a person; `seconds` is the length of a step, `gap`
    the text of gap_text for one step ahead."""
    # one step ahead
    gap = gap.replace(" [", ", 95 % interval over recordings [")
    lines = ["one step ahead"]
    lines.append(f"  skill (error / copying the last step)  {summary['tf_skill']:.3f}")
    lines.append(f"  action gap (shuffled / true - 1)       {gap}")

    # rolled out, a column for each horizon
    K = errors["ro_true"].shape[1]
    header = "".join(f"{f'+{k * seconds:.3g} s':>9}" for k in range(1, K + 1))
    lines.append("rolled out: mean |error|" + header)

    # errors, then gap and skill, which compare them
    has_shuffled = not np.isnan(summary["ro_gap"])  # else there is only one recording
    means = {k: errors[f"ro_{k}"].mean(0) for k in ("true", "shuffled", "zero", "copy")}
    for name, mean in means.items():
        if name == "shuffled" and not has_shuffled:
            continue
        label = "copy first step" if name == "copy" else f"{name} actions"
        lines.append(f"  {label:22}" + "".join(f"{x:9.4f}" for x in mean.tolist()))
    if has_shuffled:
        gaps = means["shuffled"] / means["true"] - 1
        lines.append(f"  {'action gap':22}" + "".join(f"{signed(x):>9}" for x in gaps.tolist()))
    skill = means["true"] / means["copy"]
    lines.append(f"  {'skill':22}" + "".join(f"{x:9.3f}" for x in skill.tolist()))
    return "\n".join(lines)


def spread_over(order, recordings, count):
    """The first `count` clips of an order, each of another recording as long as there are any."""
    # the best of each recording, then what is left
    first = {}
    for i in order:
        first.setdefault(recordings[i], i)
    firsts = list(first.values())
    rest = [i for i in order if i not in firsts]
    return (firsts + rest)[:count]


def find_videos(patterns, records):
    """--video -> {key: Record with an mp4}; ValueError if it lacks a recording of the features."""
    if "safetensors" not in records[0].members:
        raise ValueError(
            "--video is for data that are features, these are pixels themselves: leave it out"
        )

    # recordings are found by name
    indexed, bad = index_shards(expand(patterns))
    videos = {r.key: r for r in indexed if "mp4" in r.members}
    missing = sorted({r.recording for r in records} - videos.keys())
    if missing:
        raise ValueError(
            f"--video holds no recording {missing[0]} ({len(videos)} others, {len(bad)}"
            " unreadable): name the shards encoded"
        )
    return videos


def look_up(clip, record, place, videos, reader):
    """The frames (T, H, W, 3) uint8 that the steps of a clip end with: its own, or those of the
    recording its features were made from, cut by a ClipReader; ValueError if that is another
    recording of the same name."""
    # clips of features have no frames of their own
    video = clip.get("video")
    if video is None:
        video = cut_video(clip, record, place, videos[record.recording], reader)

    # a step of --encode tubelet has seen its last frame, otherwise only its first
    each = reader.frames_per_step
    is_tubelet = getattr(reader, "encode", "frame") == "tubelet"
    last = each - 1 if is_tubelet else 0
    return video[last::each].permute(0, 2, 3, 1).numpy()


def cut_video(clip, record, place, source, reader):
    """The frames of a clip of features, from the recording `source` that they were made from."""
    with Slice(source.shard, *source.members["mp4"]) as f:
        # the key of features names the tick that they start from
        times = mp4_times(f)
        ticks = read_ticks(source)
        first = int(record.key.rpartition("@")[2])
        start = first + place * reader.frames * step_size(ticks.rate, reader.fps)
        cut = reader(f, times, ticks, start, None, source.key)

    # the same actions, or it is another recording of that name
    if not torch.allclose(cut["actions"], clip["actions"], atol=1e-4):
        raise ValueError(
            f"--video: {source.shard} {source.key} has other actions than the features of that"
            " name: it is not what they show"
        )
    return cut["video"]


# --- attention ---


@torch.no_grad()
def attention_of(attn, qkv, rope, block):
    """What model.Attention weighs values by: its qkv output (B, L, 3 D), RoPE tables, tokens a step
    -> softmax(Q K^T / sqrt(hd)) (B, nh, L, L) under the block-causal mask, and the values (B, nh,
    L, hd)."""
    # as in the layer: split, rotate, mask later steps, softmax
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = apply_rope((q.contiguous(), k.contiguous()), *rope)
    step = torch.arange(q.shape[2], device=q.device) // block
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(step[:, None] < step, -torch.inf)
    return scores.softmax(-1), v


def check_heads(predictor, heads):
    """["BLOCK:HEAD"] or None (those of the last block) -> [(block, head)]; ValueError for what the
    predictor does not have."""
    # all that there are, by name
    blocks = len(predictor.predictor_blocks)
    count = predictor.predictor_blocks[0].attn.num_heads
    every = {f"{b}:{h}": (b, h) for b in range(blocks) for h in range(count)}
    for name in heads or []:
        if name not in every:
            raise ValueError(
                f"--heads {name}: write BLOCK:HEAD, from 0:0 to {blocks - 1}:{count - 1}"
            )
    if heads:
        return [every[name] for name in heads]
    return list(every.values())[-count:]


@torch.no_grad()
def attention_maps(predictor, z, actions, states, heads):
    """What the tokens of the last step of one clip attend to: z (T, N, E), actions (T, A), states
    (T, S), heads [(block, head)] -> for each head (S, T, S): query, step, key; tokens are [action,
    state, N patches]. One pass of the predictor; hooks catch what its attention layers see."""
    # catch what the attention layers of these blocks compute
    T, N, _ = z.size()
    blocks = predictor.predictor_blocks
    caught = {}
    hooks = []
    for b in {b for b, _ in heads}:
        hook = blocks[b].attn.qkv.register_forward_hook(
            lambda module, inputs, out, b=b: caught.update({b: out})
        )
        hooks.append(hook)
    predictor(z.flatten(0, 1)[None], actions[None], states[None])
    for hook in hooks:
        hook.remove()

    # the weights follow from queries and keys; only those of the last step are shown
    C = 1 + (predictor.state_encoder is not None)
    rope = rope_tables(predictor.positions(T, C, z.device), predictor.head_dim)
    weights = {}
    for b, qkv in caught.items():
        of_all, _ = attention_of(blocks[b].attn, qkv, rope, C + N)
        of_last_step = of_all[0, :, -(C + N) :]
        weights[b] = of_last_step.unflatten(-1, (T, C + N)).cpu()
    return [weights[b][h] for b, h in heads]


def plot_attention(maps, heads, grid, patch, frames, seconds):
    """A row a head: the attention of one patch of the last step to the patches of every step
    (colours from the smallest to the largest of the row), that to action and state in numbers."""
    # a row for the frames, where there are any
    H, W = grid
    T = maps[0].shape[1]
    C = maps[0].shape[0] - H * W
    first = 0 if frames is None else 1  # row of the first head
    rows = first + len(maps)
    fig = Figure(figsize=(1.35 * T + 1.6, 1.75 * rows + 0.6), layout="constrained")
    axes = fig.subplots(rows, T, squeeze=False)
    if frames is not None:
        axes[0, 0].set_ylabel("frame", fontsize=11)
        for t, ax in enumerate(axes[0]):
            ax.imshow(frames[t], extent=(-0.5, W - 0.5, H - 0.5, -0.5))

    # a row for each head
    for row, weights, (b, h) in zip(axes[first:], maps, heads):
        percent = 100 * weights[C + patch].numpy()  # (T, S)
        low = percent[:, C:].min()
        high = percent[:, C:].max()
        for t, ax in enumerate(row):
            image = percent[t, C:].reshape(H, W)
            shown = ax.imshow(image, vmin=low, vmax=high, cmap="magma", interpolation="nearest")
            tokens = zip(("action", "state"), percent[t, :C])
            text = "\n".join(f"{name} {x:.0f} %" for name, x in tokens)
            ax.set_xlabel(text, fontsize=9, labelpad=2)
        row[0].set_ylabel(f"block {b}\nhead {h}\n{low:.2g} to {high:.2g} %", fontsize=11)
        fig.colorbar(shown, ax=row, shrink=0.8, format=COLORBAR_FORMAT, label="%")

    # time above, and the patch that looks in a frame
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for t, ax in enumerate(axes[0]):
        ax.set_title(f"{(t - T + 1) * seconds:+.3g} s" if t < T - 1 else "now", fontsize=11)
    corner = (patch % W - 0.5, patch // W - 0.5)
    for ax in axes[:, -1]:
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="cyan", lw=2.5))
    return fig


# --- colours of tokens ---


def pca_colors(*tokens):
    """Arrays (..., E) -> arrays (..., 3) in [0, 1]: three principal components, fitted on all of
    them, between their 1st and 99th percentiles."""
    # components of all tokens together: the same colour is the same feature
    arrays = [np.asarray(x, np.float64) for x in tokens]
    rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in arrays])
    components = PCA(3, random_state=0).fit_transform(rows)

    # a few outliers must not make all others grey
    low, high = np.quantile(components, [0.01, 0.99], axis=0)
    colors = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)

    # back into the shapes that came in
    ends = np.cumsum([x[..., 0].size for x in arrays])
    parts = np.split(colors, ends[:-1])
    return [p.reshape(*x.shape[:-1], 3) for p, x in zip(parts, arrays)]


def plot_rows(rows, titles, below=()):
    """rows: {label: [image, or None for a blank]}, frames or coloured patch tokens, a title above
    and a text below each column."""
    # a row of pictures for each label; a blank has no frame
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


def show_at_least(ax, low, high):
    """Widen the vertical axis of a plot to include [low, high]."""
    bottom, top = ax.get_ylim()
    ax.set_ylim(min(bottom, low), max(top, high))


def legend_below(fig, ax):
    """The legend of one plot below all of a figure, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=10, loc="outside lower left", ncols=len(labels))


def plot_horizons(means, intervals, seconds):
    """Error rolled out against seconds ahead, and skill and gap of the same rollouts. means: {name:
    (K,)} of true, shuffled, zero, copy; intervals: {name: (low, high)}, and of gap and skill."""
    # errors
    ahead = seconds * np.arange(1, len(means["true"]) + 1)
    fig = Figure(figsize=(13, 4.4), layout="constrained")
    error_ax, gap_ax, skill_ax = fig.subplots(1, 3)
    for name, color in COLORS.items():
        label = "copy of the first step" if name == "copy" else f"{name} actions"
        error_ax.plot(ahead, means[name], STYLES[name], color=color, label=label)
        error_ax.fill_between(ahead, *intervals[name], color=color, alpha=0.2, lw=0)
    error_ax.set(title="error", ylabel="mean |error|, layer-normed features")
    legend_below(fig, error_ax)

    # what wrong actions cost
    gap = 100 * (means["shuffled"] / means["true"] - 1)
    gap_ax.plot(ahead, gap, "o-", color="C3")
    gap_ax.fill_between(ahead, *(100 * np.array(intervals["gap"])), color="C3", alpha=0.2, lw=0)
    gap_ax.axhline(0, color="0.5", lw=1)
    gap_ax.set(title="action gap", ylabel="shuffled / true - 1, %")
    show_at_least(gap_ax, *GAP_SPAN)

    # is it better than a still picture?
    skill_ax.plot(ahead, means["true"] / means["copy"], "o-", color="C0")
    skill_ax.fill_between(ahead, *intervals["skill"], color="C0", alpha=0.2, lw=0)
    skill_ax.axhline(1, color="0.5", lw=1)
    skill_ax.set(title="skill", ylabel="error / copying")
    show_at_least(skill_ax, *SKILL_SPAN)

    for ax in (error_ax, gap_ax, skill_ax):
        ax.set_xlabel("seconds ahead")
    return fig


def plot_groups(gaps):
    """gaps: {group: {"tf": (gap, low, high), "ro": ...}}, as shares."""
    # two bars for each group, with their intervals
    fig = Figure(figsize=(2.2 + 1.8 * len(gaps), 3.8), layout="constrained")
    ax = fig.subplots()
    places = np.arange(len(gaps))
    for key, label, shift in (("tf", "one step ahead", -0.19), ("ro", "rolled out", 0.19)):
        percent = 100 * np.array([g[key] for g in gaps.values()])
        value = percent[:, 0]
        reach = np.abs([value - percent[:, 1], percent[:, 2] - value])
        ax.bar(places + shift, value, 0.36, yerr=reach, capsize=4, label=label)
    ax.axhline(0, color="0.3", lw=1)
    ax.set_xticks(places, gaps, fontsize=11)
    ax.set(title="action gap when only this is shuffled", ylabel="error / true - 1, %")
    show_at_least(ax, *GAP_SPAN)
    legend_below(fig, ax)
    return fig


def plot_ranks(ranks, samples, source):
    """A histogram of the ranks of true actions, 0 to 1, among `samples` others. source: where
    those are from, for the title."""
    # a model that cannot tell actions apart fills all bins alike
    fig = Figure(figsize=(6.5, 3.6), layout="constrained")
    ax = fig.subplots()
    ax.hist(ranks, np.linspace(0, 1, 21))
    ax.axhline(len(ranks) / 20, color="0.5", ls=":", label="chance: all bins alike")
    ax.axvline(np.mean(ranks), color="C3", label=f"mean {np.mean(ranks):.3f} (chance 0.5)")
    ax.set(
        title=f"rank of the true action among {samples} {source}",
        xlabel="share of them with a lower error",
        ylabel="clips",
    )
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(fig, ax)
    return fig


def plot_landscapes(panels, axes, labels):
    """panels: [(recording, energies (G, G) of the first dimension by the second, truth (2,))];
    labels: [(name, unit)] of both. Colours are energies above the least one, in percent."""
    fig = Figure(figsize=(4.2 * len(panels), 4), layout="constrained")

    # cells are centred on the points of the axes
    extent = []
    for points in axes:
        half = (points[1] - points[0]) / 2
        extent += [points[0] - half, points[-1] + half]

    style = {"ls": "", "markersize": 13, "markeredgecolor": "k", "clip_on": False}
    for ax, (recording, energy, truth) in zip(
        fig.subplots(1, len(panels), squeeze=False)[0], panels
    ):
        # in percent above the least error, because absolute errors differ from clip to clip
        above = 100 * (energy / max(energy.min(), 1e-12) - 1)
        image = ax.imshow(
            above.T,
            origin="lower",
            extent=extent,
            aspect="auto",
            cmap="viridis",
            interpolation="nearest",
            vmin=0,
            vmax=max(above.max(), LANDSCAPE_SPAN),
        )

        # where the least error is, and where it should be
        i, j = np.unravel_index(energy.argmin(), energy.shape)
        ax.plot(*truth, marker="*", color="red", label="truth", **style)
        ax.plot(axes[0][i], axes[1][j], marker="o", color="white", label="minimum", **style)

        # keys of DROID are long: the end of what comes before /recordings is enough
        name = recording.partition("/recordings")[0].rpartition("/")[2][-28:]
        ax.set_title(name, fontsize=11)
        ax.set(xlabel=f"{labels[0][0]}, {labels[0][1]}", ylabel=f"{labels[1][0]}, {labels[1][1]}")
        fig.colorbar(image, ax=ax, format=COLORBAR_FORMAT, label="error above the least, %")
    legend_below(fig, fig.axes[0])
    return fig


def plot_retrieval(rows, seconds):
    """rows: means over clips (K,) of hit, copy_hit, offset, copy_offset (medians) and chance."""
    # hits at the left, how far off in time at the right
    ahead = seconds * np.arange(1, len(rows["hit"]) + 1)
    fig = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2)
    for ax, name, factor in ((left, "hit", 100), (right, "offset", 1)):
        predicted = factor * np.array(rows[name])
        copied = factor * np.array(rows["copy_" + name])
        # a marker at 0 is shown whole
        ax.plot(ahead, predicted, "o-", color="C0", label="prediction", clip_on=False)
        ax.plot(ahead, copied, "x--", color="0.4", label="copy of the first step", clip_on=False)
        ax.set(xlabel="seconds ahead")
    left.axhline(100 * rows["chance"], color="0.5", ls=":", label="chance")
    left.set(title="nearest step of the recording is the true one", ylabel="share of clips, %")
    right.set(title="median offset of the nearest step", ylabel="steps off")
    left.set_ylim(bottom=0)
    legend_below(fig, left)
    return fig


# --- the page ---

STYLE = """
body { font: 16px/1.45 sans-serif; max-width: 72em; margin: 0 auto; padding: 1.5em 2em; }
img { max-width: 100%; }
p, li { max-width: 50em; overflow-wrap: anywhere; }
pre { overflow-x: auto; }
.verdict { font-size: 1.15em; }
.warning { border-left: 4px solid #c30; padding-left: 0.7em; }
.run { color: #555; }
"""


def write_page(path, title, verdict, warnings, run, facts, figures):
    """One HTML file with its pictures inside. verdict and warnings: [sentence], on top; run: which
    checkpoint, data and precision, in a line; facts: plain text; figures: {heading of CAPTIONS:
    [Figure]}."""
    # what it says comes first, then what it was computed on, then the numbers
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    parts += [f'<p class="verdict">{html.escape(sentence)}</p>' for sentence in verdict]
    parts += [f'<p class="warning">{html.escape(sentence)}</p>' for sentence in warnings]
    parts.append(f'<p class="run">{html.escape(run)}</p>')
    parts.append(f"<pre>{html.escape(facts)}</pre>")

    # a heading and what to look for, above each figure
    for heading, of_heading in figures.items():
        caption = CAPTIONS[heading] if of_heading else NO_PIXELS
        parts.append(f"<h2>{heading}</h2><p>{html.escape(caption)}</p>")
        parts += [picture_tag(figure, heading) for figure in of_heading]
    write_atomically(path, "\n".join(parts).encode())


def picture_tag(figure, heading):
    """A figure, or the bytes of a GIF, as an <img> that carries its data; its heading is what is
    read aloud."""
    if isinstance(figure, bytes):
        kind = "gif"
        raw = figure
    else:
        kind = "png"
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=80)
        raw = file.getvalue()
    data = base64.b64encode(raw).decode()
    return f'<img alt="{heading}" src="data:image/{kind};base64,{data}">'
