"""Every nn.Module and the losses: the frozen video encoder (V-JEPA 1 and 2) and the
action-conditioned predictor (V-JEPA 2-AC).

Shapes, one alphabet for the whole project:
    B clips · T steps · H, W patch grid · N = H*W patches a step · C condition tokens a step · S = C + N · L = T*S
    D width (E: the encoder's, where both are meant) · nh heads · hd head dim · A action dim · K codebook size, or steps predicted
Submodule names are Meta's, so that released weights load by key.
"""

import functools
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import (
    apply_rope,
    block_causal_attention,
    linear,
    merge_moments,
    merge_over_ranks,
    moments,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# --- positions ---


def grid_positions(T, H, W, device=None):
    """Integer (t, row, col) of every patch, t-major, as floats: (T, N, 3)."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (T, H, W)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(T, H * W, 3)


def rope_tables(pos, head_dim):
    """cos and sin factors (..., hd) of 3-D RoPE for positions (..., 3): k dims for time, k for
    rows, k for columns, the rest not rotated.

    Built anew in fp32 by each forward, once for all its layers: a buffer would be rounded by
    `.bfloat16()`, a cached tensor made under inference_mode could not be used in training. The sign
    of `apply_rope`'s swapped term is folded into sin."""
    if head_dim % 2:
        raise ValueError(
            f"RoPE rotates pairs of dims, a head dim of {head_dim} is odd: choose another number of"
            " heads"
        )
    half = head_dim // 3 // 2
    omega = (
        10000.0 ** (-torch.arange(half, dtype=torch.float32, device=pos.device) / half)
        if half
        else pos.new_zeros(0)
    )
    angle = pos.unsqueeze(-1) * omega
    # Meta's quirk: frequencies are tiled [w0 w1 .. w0 w1 ..] although adjacent dims are paired. No
    # true rotation, but the weights need it.
    angle = F.pad(torch.cat([angle, angle], dim=-1).flatten(-2), (0, head_dim - 6 * half))
    sign = torch.ones_like(angle)
    sign[..., ::2] = -1
    return angle.cos(), angle.sin() * sign


def sincos_table(dim, T, H, W):
    """V-JEPA 1's fixed table (1, T*H*W, D), `uniform_power`: [sin | cos] for time, rows, columns,
    each ceil(D/6) wide, cut to D."""
    half = math.ceil(dim / 6)
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = grid_positions(T, H, W).view(-1, 3, 1).double() * omega
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)[None, :, :dim].float()


# --- transformer ---


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x, rope=None, block=None, past=None):
        """(B, L, D) -> (B, L, D) and (k, v) (B, nh, L, hd). `past` is the (k, v) of earlier steps,
        all of which one further step sees; that of one clip serves a whole batch."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (
            t.transpose(1, 2) for t in qkv.unbind(2)
        )  # (B, nh, L, hd); not slices: the gradient of one is a full tensor of zeros
        if rope is not None:
            q, k = apply_rope((q, k), *rope)
        if past is not None:
            k, v = (
                torch.cat([x.expand(len(new), -1, -1, -1), new], dim=2)
                for x, new in zip(past, (k, v))
            )
        if block is None or past is not None:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = block_causal_attention(q, k, v, block)
        return self.proj(x.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, the same in encoder and predictor; `block` tokens a step make its
    attention block-causal."""

    def __init__(self, dim, num_heads, mlp_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_dim)

    def forward(self, x, rope=None, block=None, past=None):
        h, present = self.attn(self.norm1(x), rope, block, past)
        x = x + h
        return x + self.mlp(self.norm2(x)), present


def init_weights(model, blocks):
    """Meta's initialisation: normal std 0.02, zero biases, then both residual outputs of block i
    (from 1) divided by sqrt(2i)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        for i, blk in enumerate(blocks, start=1):
            blk.attn.proj.weight.div_(math.sqrt(2 * i))
            blk.mlp.fc2.weight.div_(math.sqrt(2 * i))


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch_size, tubelet_size):
        super().__init__()
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, dim, kernel_size=kernel, stride=kernel)

    def forward(self, video):
        return self.proj(video)


class Encoder(nn.Module):
    """V-JEPA video transformer. `pos="rope"` is V-JEPA 2 (any size and length); `pos="sincos"` is
    V-JEPA 1, whose table is made for square `img_size` and `num_frames` and interpolated to any
    other size, time too (a lone step gets the mean of the middle rows)."""

    activation_checkpointing = False

    def __init__(
        self,
        embed_dim,
        depth,
        num_heads,
        *,
        mlp_dim=None,
        patch_size=16,
        tubelet_size=2,
        pos="rope",
        img_size=224,
        num_frames=16,
    ):
        super().__init__()
        self.embed_dim, self.num_heads, self.patch_size, self.tubelet_size = (
            embed_dim,
            num_heads,
            patch_size,
            tubelet_size,
        )
        self.patch_embed = PatchEmbed(embed_dim, patch_size, tubelet_size)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_dim or 4 * embed_dim) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        if pos not in ("rope", "sincos"):
            raise ValueError(f"pos={pos!r}: choose rope (V-JEPA 2) or sincos (V-JEPA 1)")
        self.table_size = (
            (num_frames // tubelet_size, img_size // patch_size, img_size // patch_size)
            if pos == "sincos"
            else None
        )
        if self.table_size:
            self.register_buffer("pos_embed", sincos_table(embed_dim, *self.table_size))
        init_weights(self, self.blocks)

    def position_table(self, T, H, W):
        """The sincos table for a T x H x W grid: (1, T*H*W, D)."""
        if (T, H, W) == self.table_size:
            return self.pos_embed
        table = self.pos_embed.transpose(1, 2).unflatten(2, self.table_size)  # (1, D, T, H, W)
        # by size, not by scale factor as upstream: 14 * (61/14) floors to 60
        return F.interpolate(table, size=(T, H, W), mode="trilinear").flatten(2).transpose(1, 2)

    def forward(self, video, masks=None, out_layers=None):
        """(B, 3, T*tubelet, H*patch, W*patch) ImageNet-normalised -> (B, T*N, D), t-major.

        `masks` (B, n) keeps only these token ids, at their own positions; `out_layers=[i, ...]`
        returns the normed output of each of these blocks instead. Pixels and frames that fill no
        whole patch are dropped, as upstream."""
        x = self.patch_embed(video)
        T, H, W = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # (B, T*N, D)
        rope = None
        if self.table_size:
            x = x + self.position_table(T, H, W)
        else:
            rope = rope_tables(
                grid_positions(T, H, W, x.device).view(-1, 3), self.embed_dim // self.num_heads
            )
        if masks is not None:
            x = x.gather(1, masks.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            rope = rope and [table[masks].unsqueeze(1) for table in rope]
        outputs = []
        for i, blk in enumerate(self.blocks):
            x, _ = run_block(self, blk, x, rope)
            if out_layers is not None and i in out_layers:
                outputs.append(self.norm(x))
        return self.norm(x) if out_layers is None else outputs


def run_block(model, blk, *inputs):
    if model.activation_checkpointing and torch.is_grad_enabled():
        return checkpoint(blk, *inputs, use_reentrant=False)
    return blk(*inputs)


PREDICTS = ("features", "change")
CHANGE_MARK = "predicts_change"  # in the state dict of a predictor of changes, in no other


def predict_of(state):
    """What the predictor of a state dict predicts, one of PREDICTS."""
    return "change" if CHANGE_MARK in state else "features"


class Predictor(nn.Module):
    """V-JEPA 2-AC predictor: p(z_t+1 | z_<=t, a_<=t, s_<=t). Each step is the tokens [action,
    state, (extrinsics), N patches], attention is full inside a step and causal across steps, and
    the output at step t is the prediction of step t+1.

    `grid` is the encoder's patch grid (H, W). Condition tokens sit at (t, 0, 0), so their order in
    a step changes nothing. `state_dim=0` builds no state token (jepa-wms "noprop"). Extrinsics are
    6-D camera poses.

    predict="change" adds step t's own features to the output at step t, so that the network says
    what changes: at its small initial weights it copies the step, and learns from there. Meta's
    weights are of "features". The setting travels with the weights, as an entry of the state dict:
    a reader that does not know it refuses the file, since it would take changes for features."""

    activation_checkpointing = False

    def __init__(
        self,
        embed_dim,
        action_dim,
        state_dim,
        grid,
        *,
        pred_dim=1024,
        depth=24,
        num_heads=16,
        mlp_dim=None,
        use_extrinsics=False,
        predict="features",
    ):
        super().__init__()
        if predict not in PREDICTS:
            raise ValueError(f"predict {predict!r} is unknown, choose from: {', '.join(PREDICTS)}")
        self.predict = predict
        if predict == "change":
            self.register_buffer(CHANGE_MARK, torch.ones(()))
        self.grid, self.head_dim, self.use_extrinsics = (
            tuple(grid),
            pred_dim // num_heads,
            use_extrinsics,
        )
        self.predictor_embed = Linear(embed_dim, pred_dim)
        self.action_encoder = Linear(action_dim, pred_dim)
        self.state_encoder = Linear(state_dim, pred_dim) if state_dim else None
        self.extrinsics_encoder = Linear(6, pred_dim) if use_extrinsics else None
        self.predictor_blocks = nn.ModuleList(
            Block(pred_dim, num_heads, mlp_dim or 4 * pred_dim) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(pred_dim, eps=1e-6)
        self.predictor_proj = Linear(pred_dim, embed_dim)
        init_weights(self, self.predictor_blocks)

    def positions(self, T, C, device=None, start=0):
        """(t, row, col) of every token (L, 3): the condition tokens at (t, 0, 0), columns in units
        of the grid height, as upstream."""
        H, W = self.grid
        pos = grid_positions(start + T, H, W, device)[start:].float()
        pos[:, :, 2] *= H / W
        return torch.cat([pos[:, :1].expand(-1, C, -1), pos], dim=1).view(
            -1, 3
        )  # the first patch is at (t, 0, 0)

    def forward(self, z, actions, states, extrinsics=None):
        """(B, T*N, E), (B, T, A), (B, T, S), (B, T, 6) -> (B, T*N, E): the step after each, before
        its layer norm."""
        return self.extend(z, actions, states, extrinsics)[0]

    def extend(self, z, actions, states, extrinsics=None, past=None):
        """The same, and the keys and values of every block, [(k, v)] of (B, nh, L, hd). Given back
        as `past` with the one step that follows, they stand for all steps before it: earlier steps
        never see later ones, so nothing is computed twice."""
        (H, W), T = self.grid, actions.shape[1]
        if z.shape[1] != T * H * W:
            raise ValueError(
                f"{z.shape[1]} patch tokens are not {T} actions x {H * W} patches (grid {H}x{W})"
            )
        if self.use_extrinsics != (extrinsics is not None):
            raise ValueError(
                f"use_extrinsics={self.use_extrinsics}, but extrinsics were"
                f" {'not ' if extrinsics is None else ''}given"
            )
        tokens = [self.action_encoder(actions)]
        if self.state_encoder is not None:
            tokens.append(self.state_encoder(states))
        if self.use_extrinsics:
            tokens.append(self.extrinsics_encoder(extrinsics))
        C, S = len(tokens), len(tokens) + H * W
        x = self.predictor_embed(z).unflatten(1, (T, H * W))
        x = torch.cat([torch.stack(tokens, dim=2), x], dim=2).flatten(1, 2)  # (B, L, D)
        if past is not None and T > 1:
            raise ValueError(
                f"{T} steps cannot follow the steps of `past` at once: extend it by one"
            )
        start = past[0][0].shape[2] // S if past is not None else 0
        rope, present = rope_tables(self.positions(T, C, z.device, start), self.head_dim), []
        for i, blk in enumerate(self.predictor_blocks):
            x, kv = run_block(self, blk, x, rope, S, past and past[i])
            present.append(kv)
        x = x.unflatten(1, (T, S))[:, :, C:].flatten(1, 2)  # (B, T*N, D)
        x = self.predictor_proj(self.predictor_norm(x))
        if self.predict == "change":
            x = x + z
        return x, present

    def rollout(self, z, actions, states, extrinsics=None, cache=None):
        """Context z (B, c, N, E), layer-normed, actions (B, c-1+K, A) and their states -> the K
        steps that follow (B, K, N, E), normed too, each from all before. States are taken as given;
        gradients flow through the whole chain.

        cache: keys and values of all of z but its last step, as `predict_on` returns them; those of
        one clip (batch 1) serve all B. None: made here. False: each step runs the whole sequence
        anew, as the reference does: what the cache must equal."""
        c, start, steps = z.shape[1], 0, []
        if cache:
            start, z = c - 1, z[:, -1:]
        for t in range(c, actions.shape[1] + 1):
            out, present = predict_on(self, z, actions, states, extrinsics, cache or None, start)
            steps.append(out[:, -1:])
            if cache is False:
                z = torch.cat([z, steps[-1]], dim=1)
            else:
                z, cache, start = steps[-1], present, t
        return torch.cat(steps, dim=1)


def copy_fitting(module, state):
    """Copy the tensors of a state dict that fit into a predictor; returns (taken, made anew, left
    over) as lists of names. ValueError where the two predict something else: each tensor would fit
    and mean something else."""
    if predict_of(state) != module.predict:
        raise ValueError(
            f"those weights predict {predict_of(state)}, this predictor {module.predict}: pass"
            f" --predict {predict_of(state)}"
        )
    own = module.state_dict()
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict(own | fits)
    return sorted(fits), sorted(own.keys() - fits.keys()), sorted(state.keys() - fits.keys())


# --- features ---


@functools.cache
def imagenet(device):
    """Mean and std (3, 1, 1) of the pixels that encoders were trained on, copied to a device once:
    a copy makes the host wait."""
    with torch.inference_mode(False):
        return [torch.tensor(c, device=device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD)]


def encode_steps(encoder, video, mode, frames_per_step):
    """Features (B, T, N, D), not yet normalised, of uint8 frames (B, T*frames_per_step, 3, H, W).

    `tubelet` encodes the frames of each step alone (a single frame is repeated), `frame` repeats
    each step's first frame (Meta on DROID), `clip` encodes all frames at once: the encoder is
    bidirectional, so there every step has seen the future."""
    tubelet = encoder.tubelet_size
    B, frames = video.shape[:2]
    if mode not in ("tubelet", "frame", "clip"):
        raise ValueError(f"encode mode {mode!r} is unknown, choose from: tubelet, frame, clip")
    if frames % frames_per_step:
        raise ValueError(
            f"{frames} frames are not a whole number of steps of {frames_per_step} frames"
        )
    if frames_per_step != tubelet and (
        mode == "clip" or (mode == "tubelet" and frames_per_step != 1)
    ):
        raise ValueError(
            f"--encode {mode} needs the encoder's {tubelet} frames a step, not {frames_per_step}:"
            " use --encode frame"
        )
    T = frames // frames_per_step
    if mode != "clip":
        video = video.unflatten(1, (T, frames_per_step)).flatten(
            0, 1
        )  # (B*T, frames_per_step, 3, H, W)
        if mode == "frame" or frames_per_step == 1:
            video = video[:, :1].expand(-1, tubelet, -1, -1, -1)
    mean, std = imagenet(video.device)
    video = (video.float() / 255 - mean) / std
    h = encoder(video.to(encoder.patch_embed.proj.weight.dtype).transpose(1, 2))
    return h.reshape(B, T, -1, h.shape[-1])  # (B, T, N, D)


def pack_features(z, store):
    """What is stored of features z (S, N, D): {"z"} in bf16, or int8 q with z = q * z_scale * std +
    mean; z_channels (2, D) float32 holds mean and std of the channels, z_scale (S, N, 1) float16
    the largest of a token's scaled channels / 127. Scaling the channels first keeps a few large
    ones from taking all bits of the others. ValueError for what is not finite."""
    if not z.isfinite().all():
        raise ValueError("its features are not finite: encode it with --dtype float32")
    if store == "bf16":
        return {"z": z.to(torch.bfloat16)}
    std, mean = torch.std_mean(z.float(), dim=(0, 1), correction=0)
    std, rows = (
        std.maximum(1e-6 * mean.abs()).clamp_min(1e-12),
        [],
    )  # of a constant channel, what is left is rounding
    for x in z.split(64):
        x = (x - mean) / std
        scale = (
            (x.abs().amax(-1, keepdim=True) / 127).clamp_min(2**-14).half()
        )  # below that float16 loses digits
        rows.append(((x / scale).round().clamp(-127, 127).to(torch.int8), scale))
    q, scale = (torch.cat(x) for x in zip(*rows))
    return {"z": q, "z_scale": scale, "z_channels": torch.stack([mean, std])}


def normalize_features(h, mean=None, std=None):
    """What the losses compare: optional per-channel centring and scaling, then a layer norm over D
    without affine, in fp32."""
    h = h.float()
    if mean is not None:
        h = h - mean
    if std is not None:
        h = h / std
    return F.layer_norm(h, h.shape[-1:])


def channel_stats(batches, width, device):
    """Mean and std {"mean", "std"} (D,) of every channel over all ranks' batches of features (B, T,
    N, D), for `normalize_features`."""
    zeros = torch.zeros(width, dtype=torch.float64, device=device)  # of a rank without a batch
    part = functools.reduce(
        merge_moments, (moments(h.flatten(0, 2)) for h in batches), (0, zeros, zeros)
    )
    n, mean, m2 = merge_over_ranks(part) if dist.is_initialized() else part
    if not n:
        raise ValueError("no features to take channel statistics of")
    return {"mean": mean.float(), "std": (m2 / n).sqrt().clamp_min(1e-6).float()}


# --- losses and rollouts ---


def predict(predictor, z, actions, states, extrinsics=None):
    """Layer-normed prediction of the step after each of z's steps (B, T, N, E); longer actions,
    states, extrinsics are cut to T."""
    return predict_on(predictor, z, actions, states, extrinsics)[0]


def predict_on(predictor, z, actions, states, extrinsics=None, past=None, start=0):
    """`predict` for the steps from `start` on, and the keys and values to go on from; those of the
    steps before come as `past`."""
    steps = slice(start, start + z.shape[1])
    given = (
        actions[:, steps],
        states[:, steps],
        None if extrinsics is None else extrinsics[:, steps],
    )
    out, present = predictor.extend(z.flatten(1, 2), *given, past)
    return normalize_features(out).view(z.shape), present


def ac_losses(predictor, z, actions, states, extrinsics=None, auto_steps=2, loss_exp=1.0):
    """Teacher forcing and rollout losses (jloss, sloss) of V-JEPA 2-AC: arXiv 2506.09985 section 3,
    vjepa2 app/vjepa_droid/train.py.

    z (B, T, N, E) layer-normed features, actions (B, T-1, A), states (B, T, S). Both are mean
    |prediction - z|^loss_exp / loss_exp. Teacher forcing is one causal pass; the rollout takes
    `auto_steps` steps from step 1 and shares the first with it, keys and values too."""
    T = z.shape[1]
    if not 1 <= auto_steps < T:
        raise ValueError(
            f"auto_steps={auto_steps} needs 1 <= auto_steps < T, and these clips have T={T} steps"
        )
    z = z.float()
    z_tf, present = predict_on(predictor, z[:, :-1], actions, states, extrinsics)
    z_ar = z_tf[:, :1]
    if auto_steps > 1:
        first = [
            [x[:, :, : x.shape[2] // (T - 1)].clone() for x in kv] for kv in present
        ]  # a view would keep all of it until backward
        more = predictor.rollout(
            torch.cat([z[:, :1], z_ar], 1), actions[:, :auto_steps], states, extrinsics, first
        )
        z_ar = torch.cat([z_ar, more], 1)
    jloss, sloss = (
        ((p - t).abs() ** loss_exp).mean() / loss_exp
        for p, t in ((z_tf, z[:, 1:]), (z_ar, z[:, 1 : auto_steps + 1]))
    )
    return jloss, sloss


class ACModel(nn.Module):
    """The predictor as DDP must see it: forward returns the two losses, so that every gradient is
    synchronised."""

    def __init__(self, predictor, auto_steps=2, loss_exp=1.0):
        super().__init__()
        self.predictor, self.auto_steps, self.loss_exp = predictor, auto_steps, loss_exp

    def forward(self, z, actions, states, extrinsics=None):
        return ac_losses(
            self.predictor, z, actions, states, extrinsics, self.auto_steps, self.loss_exp
        )


# --- does it use the action? ---


def compose_states(state0, actions, mean, scale):
    """VPT states (B, K, 2) before each of K actions, from the first (B, 2): yaw and pitch in
    radians, yaw wrapped to (-pi, pi].

    `actions` (B, K, A) are scaled; dims 2 and 3 are yaw_diff and pitch_diff, `mean` and `scale` the
    scaler's for the continuous dims."""
    diff = actions[..., 2:4] * scale[2:4] + mean[2:4]
    states = state0.unsqueeze(1) + F.pad(diff.cumsum(1), (0, 0, 1, 0))[:, :-1]
    yaw, pitch = states.unbind(-1)
    return torch.stack([math.pi - (math.pi - yaw) % (2 * math.pi), pitch], dim=-1)


@torch.no_grad()
def action_meter(predictor, z, actions, states, others, compose):
    """Mean absolute error of each clip at each of K = T-1 horizons, (B, K), one step ahead (`tf_`)
    and rolled out from step 0 (`ro_`): under the true actions, under shuffled ones (`others` (B, K,
    A): what was done in another recording), under zero ones (the mean action), and of copying the
    last known step. One step ahead the states are the true ones; rolled out they are
    `compose(state0, actions)`, since true states would tell what the true actions were."""
    z, target = z.float(), z[:, 1:].float()
    errors = {"tf_copy": z[:, :-1], "ro_copy": z[:, :1]}
    for name, a in (
        ("true", actions),
        ("shuffled", others),
        ("zero", torch.zeros_like(actions)),
    ):
        if torch.isnan(a).any():  # there is no other recording whose actions could be taken
            errors[f"tf_{name}"] = errors[f"ro_{name}"] = torch.full_like(target, math.nan)
            continue
        errors[f"tf_{name}"] = predict(predictor, z[:, :-1], a, states)
        errors[f"ro_{name}"] = predictor.rollout(z[:, :1], a, compose(states[:, 0], a))
    return {name: (p - target).abs().mean((2, 3)) for name, p in errors.items()}


METERS = [
    f"{p}_{n}"
    for p in ("tf", "ro")
    for n in ("true", "shuffled", "zero", "copy", "gap", "gap_low", "gap_high", "skill")
]

# With fewer recordings no interval is given. Those of 3 to 20 recordings contain the truth 90 to
# 97 % of the time in every row that `python -m bench.intervals` simulates; those of two would be
# wider than any gap.
FEWEST_RECORDINGS = 3


def ratio_interval(top, bottom, recordings):
    """95 % interval (low (K,), high (K,)) of mean(top) / mean(bottom), both positive, (n, K) over n
    clips; nan with fewer than FEWEST_RECORDINGS recordings, and where all give exactly the same
    (they all did the same, or the action is ignored): that says nothing of others.

    Clips of one recording are alike, so a recording counts as one observation. The standard error
    of the ratio's logarithm is the jackknife's (one recording left out at a time), the factor is
    Student's t. Recordings of equal weight give t G - 1 degrees of freedom. Where few of them hold
    most clips there are fewer: two thirds of the way to the effective number of recordings, 1 /
    (sum of squared weights), which is what bench.intervals found to cover."""
    names = {name: i for i, name in enumerate(dict.fromkeys(recordings))}
    G = len(names)
    if G < FEWEST_RECORDINGS:
        none = torch.full(top.shape[1:], math.nan, dtype=torch.double)
        return none, none.clone()
    group = torch.tensor([names[r] for r in recordings])
    above, below = (
        torch.zeros(G, *x.shape[1:], dtype=torch.double).index_add_(0, group, x.double())
        for x in (top, bottom)
    )
    ratio = above.sum(0) / below.sum(0)
    without = (above.sum(0) - above) / (below.sum(0) - below)  # (G, K)
    error = ((G - 1) / G * (without / ratio).log().square().sum(0)).sqrt()
    effective = 1 / (below / below.sum(0)).square().sum(0)
    freedom = (G + effective) / 2 - 1
    error = torch.where(error > 0, error, math.nan)
    reach = 1.06 * torch.from_numpy(np.asarray(stdtrit(freedom.numpy(), 0.975))) * error
    return ratio * (-reach).exp(), ratio * reach.exp()


def meter_summary(errors, recordings):
    """Action meter of many clips -> METERS: {tf_, ro_}{true, shuffled, zero, copy} mean errors, gap
    = shuffled/true - 1, its 95 % interval over recordings (gap_low, gap_high: `ratio_interval`, nan
    with too few) and skill = true/copy. errors: name -> (n, K)."""
    out = {}
    for p in ("tf", "ro"):
        clips = {}
        for name in ("true", "shuffled", "zero", "copy"):
            clips[name] = errors[f"{p}_{name}"].double().mean(1)
            out[f"{p}_{name}"] = clips[name].mean().item()
        low, high = ratio_interval(clips["shuffled"], clips["true"], recordings)
        out[f"{p}_gap"] = out[f"{p}_shuffled"] / out[f"{p}_true"] - 1
        out[f"{p}_gap_low"] = low.item() - 1
        out[f"{p}_gap_high"] = high.item() - 1
        out[f"{p}_skill"] = out[f"{p}_true"] / out[f"{p}_copy"]
    return out


# --- latent actions ---


def kmeans(x, K, generator, iterations=20):
    """K centres (K, D) of x (n, D): k-means++, then Lloyd; an empty cluster keeps its centre."""
    centres = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
    for _ in range(K - 1):
        far = torch.cdist(x, centres).amin(1).square() + 1e-12
        centres = torch.cat(
            [centres, x[torch.multinomial(far.cpu(), 1, generator=generator).to(x.device)]]
        )
    for _ in range(iterations):
        member = F.one_hot(torch.cdist(x, centres).argmin(1), K).to(x)  # (n, K)
        centres = torch.where(
            member.any(0)[:, None], member.T @ x / member.sum(0)[:, None].clamp_min(1), centres
        )
    return centres


class VectorQuantizer(nn.Module):
    """K codes for each of `slots` vectors of D dims, and what keeps them alive: `warmup` steps
    without quantisation, then k-means on the last encoder outputs; codes with under a tenth of
    their fair share are replaced. codebook: "ema" (decay 0.99) or "loss" (a gradient); a `shared`
    table serves all slots. `update`, once an optimizer step, changes the tables alike on every
    rank."""

    def __init__(
        self, slots, K, dim, *, codebook="ema", shared=False, kmeans=True, revive=True, warmup=500
    ):
        super().__init__()
        self.tables, self.K, self.ema = 1 if shared else slots, K, codebook == "ema"
        self.kmeans, self.revive, self.warmup = kmeans, revive, warmup
        self.codebook = nn.Parameter(
            torch.empty(self.tables, K, dim).uniform_(-1 / K, 1 / K), requires_grad=not self.ema
        )
        self.register_buffer("mass", torch.ones(self.tables, K))
        self.register_buffer("sums", self.codebook.detach().clone())
        self.register_buffer(
            "recent", torch.zeros(1024, self.tables, dim)
        )  # the last encoder outputs, newest first
        self.register_buffer(
            "seen", torch.zeros(2, dtype=torch.long)
        )  # updates made, encoder outputs seen
        self.pending = []

    def active(self):
        return bool(self.seen[0] >= self.warmup)

    def lookup(self, indices):
        """(..., slots) -> (..., slots, D)."""
        return self.codebook[torch.arange(self.tables), indices.reshape(-1, self.tables)].view(
            *indices.shape, -1
        )

    def forward(self, z_e):
        """z_e (..., slots, D) -> (z_q, indices (..., slots), codebook loss, commitment loss) in
        float32; z_q is z_e while warming up."""
        with torch.autocast(z_e.device.type, enabled=False):
            z = z_e.float()
            rows = z.detach().reshape(-1, self.tables, z.shape[-1])
            nearest = (
                torch.cdist(rows.transpose(0, 1), self.codebook.detach()).argmin(-1).T
            )  # (n, tables)
            indices = nearest.reshape(z.shape[:-1])
            if self.training:
                self.pending.append((rows, nearest))
            if not self.active():
                return z, indices, 0 * self.codebook.sum(), 0 * z.sum()
            z_q = self.lookup(indices)
            return (
                z + (z_q - z).detach(),
                indices,
                F.mse_loss(z_q, z.detach()),
                F.mse_loss(z, z_q.detach()),
            )

    @torch.no_grad()
    def update(self, settle=False):
        """Counts and sums over all ranks in float32, EMA, k-means at the end of the warm-up, dead
        codes (not to `settle`, at the end)."""
        (z, nearest), self.pending = (torch.cat(x) for x in zip(*self.pending)), []
        world = dist.get_world_size() if dist.is_initialized() else 1
        member = F.one_hot(nearest, self.K).to(z)  # (n, tables, K)
        stats = torch.cat(
            [member.sum(0).unsqueeze(-1), torch.einsum("ntk,ntd->tkd", member, z)], dim=-1
        )
        sample = z[: len(self.recent) // world]
        if world > 1:
            dist.all_reduce(stats)
            dist.all_gather(
                parts := [torch.empty_like(sample) for _ in range(world)], sample.contiguous()
            )
            sample = torch.cat(parts)
        self.recent.copy_(torch.cat([sample, self.recent])[: len(self.recent)])
        self.seen += torch.tensor([1, len(sample)], device=z.device)
        steps, rows = int(self.seen[0]), self.recent[: int(self.seen[1])]
        generator = torch.Generator().manual_seed(steps)
        if self.kmeans and steps == max(self.warmup, 1):
            self.codebook.copy_(
                torch.stack([kmeans(rows[:, t], self.K, generator) for t in range(self.tables)])
            )
            self.mass.fill_(len(z) * world / self.K)
            self.sums.copy_(self.codebook * self.mass.unsqueeze(-1))
        elif steps > self.warmup:
            self.mass.lerp_(stats[..., 0], 0.01)
            self.sums.lerp_(stats[..., 1:], 0.01)
            total = self.mass.sum(1, keepdim=True)
            if self.ema:  # Laplace smoothing: a code that nobody chooses does not divide by zero
                self.codebook.copy_(
                    self.sums / ((self.mass + 1e-5) * total / (total + self.K * 1e-5)).unsqueeze(-1)
                )
            for t, code in (
                (self.mass < 0.1 * total / self.K).nonzero().tolist()
                if self.revive and not settle
                else []
            ):
                self.codebook[t, code] = rows[
                    torch.randint(len(rows), (1,), generator=generator).item(), t
                ]
                self.mass[t, code] = total[t, 0] / self.K
                self.sums[t, code] = self.codebook[t, code] * self.mass[t, code]


class FiniteScalars(nn.Module):
    """FSQ (arXiv 2309.15505): each slot is one bounded number rounded to K levels; no table to keep
    alive."""

    def __init__(self, K, dim):
        super().__init__()
        self.K, self.down, self.up = K, nn.Linear(dim, 1), nn.Linear(1, dim)

    def lookup(self, indices):
        return self.up(2 * indices.unsqueeze(-1).float() / (self.K - 1) - 1)

    def forward(self, z_e):
        x = (self.down(z_e).float().tanh() + 1) * (self.K - 1) / 2  # (..., slots, 1), 0 to K-1
        indices = x.detach().round()
        return (
            self.lookup((x + (indices - x).detach()).squeeze(-1)),
            indices.squeeze(-1).long(),
            0 * x.sum(),
            0 * x.sum(),
        )


def attend(layer, x, causal=False):
    q, k, v = (
        layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    )  # (B, nh, L, hd)
    return layer.proj(
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    )


class SpaceTimeBlock(nn.Module):
    """Each patch over time (causal attention), a depthwise 3x3 convolution (it tells neighbours
    apart; LAPA's PEG), attention inside a step, MLP. Tokens of a step: `extra` others, then H x W
    patches. With a condition (B, T, A), tokens are scaled and moved by it first."""

    def __init__(self, dim, num_heads, grid, extra=0, condition=0):
        super().__init__()
        self.grid, self.extra = grid, extra
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.time, self.attn, self.mlp = (
            Attention(dim, num_heads),
            Attention(dim, num_heads),
            MLP(dim, 4 * dim),
        )
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        if condition:
            self.film = nn.Linear(condition, 2 * dim)
            nn.init.zeros_(self.film.weight)

    def forward(self, x, condition=None):
        B, T, S, _ = x.shape
        if condition is not None:
            scale, move = self.film(condition).unsqueeze(2).chunk(2, dim=-1)
            x = x * (1 + scale) + move
        x = x + attend(
            self.time, self.norm0(x).transpose(1, 2).flatten(0, 1), causal=True
        ).unflatten(0, (B, S)).transpose(1, 2)
        x = x.flatten(0, 1)  # (B*T, S, D)
        near = (
            self.conv(x[:, self.extra :].transpose(1, 2).unflatten(2, self.grid))
            .flatten(2)
            .transpose(1, 2)
        )
        x = x + F.pad(near, (0, 0, self.extra, 0))
        x = x + attend(self.attn, self.norm1(x))
        return (x + self.mlp(self.norm2(x))).unflatten(0, (B, T))


class LatentActionModel(nn.Module):
    """Latent actions of video-VAE latents z (B, T, C, H, W): the encoder says by `num_codes` codes
    of `num_embeddings` each what happened from step t to t+1, the decoder predicts z_t+1 from z_<=t
    and those codes, in training, rollout and generation alike.

    The encoder sees one pair of steps at a time: no code knows the future or how its clip began. In
    training both of a pair are moved by a random `shift`, the decoder's input is not: else a code
    can name places instead of motion. Errors are of standardised latents."""

    activation_checkpointing = False

    def __init__(
        self,
        channels=16,
        size=(64, 64),
        *,
        patch_size=4,
        patch_dim=256,
        embed_dim=512,
        encoder_depth=3,
        decoder_depth=3,
        num_heads=8,
        num_codes=3,
        num_embeddings=12,
        codebook_dim=128,
        commitment_weight=0.25,
        rollout_horizon=2,
        quantizer="vq",
        codebook="ema",
        shared_codebook=False,
        kmeans=True,
        revive=True,
        vq_warmup_steps=500,
        mean=0.0,
        std=1.0,
    ):
        super().__init__()
        if any(s % patch_size for s in size):
            raise ValueError(
                f"latents of {size[0]}x{size[1]} are no whole number of patches of {patch_size}"
            )
        self.grid = (size[0] // patch_size, size[1] // patch_size)
        self.num_codes, self.commitment_weight, self.rollout_horizon = (
            num_codes,
            commitment_weight,
            rollout_horizon,
        )
        self.register_buffer("scale", torch.tensor([mean, std]))
        self.adapter = nn.Conv2d(channels, patch_dim, patch_size, patch_size)
        self.encoder_embed, self.decoder_embed = (
            nn.Linear(2 * patch_dim, embed_dim),
            nn.Linear(patch_dim, embed_dim),
        )
        self.encoder_pos, self.decoder_pos = (
            nn.Parameter(0.02 * torch.randn(math.prod(self.grid), embed_dim)) for _ in range(2)
        )
        self.query = nn.Parameter(0.02 * torch.randn(num_codes, embed_dim))
        self.encoder = nn.ModuleList(
            SpaceTimeBlock(embed_dim, num_heads, self.grid, num_codes) for _ in range(encoder_depth)
        )
        self.encoder_norm, self.to_code = (
            nn.LayerNorm(embed_dim),
            nn.Linear(embed_dim, codebook_dim),
        )
        self.quantizer = None  # continuous: the upper bound
        if quantizer == "vq":
            options = {
                "codebook": codebook,
                "shared": shared_codebook,
                "kmeans": kmeans,
                "revive": revive,
                "warmup": vq_warmup_steps,
            }
            self.quantizer = VectorQuantizer(num_codes, num_embeddings, codebook_dim, **options)
        elif quantizer == "fsq":
            self.quantizer = FiniteScalars(num_embeddings, codebook_dim)
        width = num_codes * codebook_dim
        self.decoder = nn.ModuleList(
            SpaceTimeBlock(embed_dim, num_heads, self.grid, 0, width) for _ in range(decoder_depth)
        )
        self.decoder_norm, self.decoder_out = (
            nn.LayerNorm(embed_dim),
            nn.Linear(embed_dim, patch_dim),
        )
        self.out_adapter = nn.ConvTranspose2d(patch_dim, channels, patch_size, patch_size)

    def normalize(self, z):
        return (z.float() - self.scale[0]) / self.scale[1]

    def patches(self, z):  # standardised (B, T, C, H, W) -> (B, T, N, patch_dim)
        return self.adapter(z.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, z.shape[:2])

    def quantize_pairs(self, x, shift=None):
        """Patches (B, T, N, patch_dim) -> z_e (B, T-1, num_codes, codebook_dim), then what the
        quantizer makes of it."""
        B, T = x.shape[:2]
        pairs = torch.stack([x[:, :-1], x[:, 1:]], dim=2).flatten(
            0, 1
        )  # (B*(T-1), 2, N, patch_dim)
        if shift is not None:  # (B, T-1, 2) whole patches, down and right, around the edges
            (H, W), (dy, dx) = self.grid, shift.flatten(0, 1).unsqueeze(-1).unbind(1)
            rows, cols = (
                (torch.arange(H, device=x.device) - dy) % H,
                (torch.arange(W, device=x.device) - dx) % W,
            )
            source = (rows.unsqueeze(2) * W + cols.unsqueeze(1)).flatten(1)  # (B*(T-1), N)
            pairs = pairs.gather(2, source[:, None, :, None].expand_as(pairs))
        # each step beside the one before it, so that comparing two of the same patch need not be
        # learned; the first beside nothing
        pairs = torch.cat([pairs, F.pad(pairs[:, :1], (0, 0, 0, 0, 1, 0))], dim=-1)
        h = self.encoder_embed(pairs) + self.encoder_pos
        h = torch.cat([self.query.expand(len(h), 2, -1, -1), h], dim=2)
        for blk in self.encoder:
            h = run_block(self, blk, h)
        z_e = (
            self.to_code(self.encoder_norm(h[:, 1, : self.num_codes]))
            .unflatten(0, (B, T - 1))
            .float()
        )
        if self.quantizer is not None:
            return z_e, *self.quantizer(z_e)
        return (
            z_e,
            z_e,
            torch.zeros(z_e.shape[:-1], dtype=torch.long, device=z_e.device),
            0 * z_e.sum(),
            0 * z_e.sum(),
        )

    def predict(self, z, codes, x=None):
        """Standardised z (B, T, C, H, W), its patches if known, codes (B, T, num_codes,
        codebook_dim) -> the step after each of z."""
        h = self.decoder_embed(self.patches(z) if x is None else x) + self.decoder_pos
        for blk in self.decoder:
            h = run_block(self, blk, h, codes.flatten(2).to(h.dtype))
        h = (
            self.decoder_out(self.decoder_norm(h))
            .flatten(0, 1)
            .transpose(1, 2)
            .unflatten(2, self.grid)
        )
        return z + self.out_adapter(h).unflatten(0, z.shape[:2]).float()

    def codes(self, indices):  # a continuous model's are vectors already
        return indices if indices.is_floating_point() else self.quantizer.lookup(indices)

    def encode(self, z, shift=None):
        """z (B, T, C, H, W) -> indices (B, T-1, num_codes), z_e and z_q (B, T-1, num_codes,
        codebook_dim)."""
        z_e, z_q, indices = self.quantize_pairs(self.patches(self.normalize(z)), shift)[:3]
        return indices, z_e, z_q

    def decode(self, z, indices):
        """Steps z (B, T, C, H, W), or one (B, C, H, W), and the codes of each -> the step after
        each, of the same shape."""
        if z.ndim == 4:
            return self.decode(z.unsqueeze(1), indices.unsqueeze(1)).squeeze(1)
        return self.predict(self.normalize(z), self.codes(indices)) * self.scale[1] + self.scale[0]

    def rollout(self, z_0, indices):
        """z_0 (B, C, H, W) and the codes of K steps (B, K, num_codes) -> those steps (B, K, C, H,
        W), on the model's own predictions."""
        z, codes = self.normalize(z_0).unsqueeze(1), self.codes(indices)
        for k in range(codes.shape[1]):
            z = torch.cat([z, self.predict(z, codes[:, : k + 1])[:, -1:]], dim=1)
        return z[:, 1:] * self.scale[1] + self.scale[0]

    def forward(self, z, shift=None):
        """z (B, T, C, H, W) -> {loss, mse, mae, codebook, commitment, rollout, indices (B, T-1,
        num_codes)}. rollout: MSE of the 2nd to `rollout_horizon`-th pass of the decoder, each on
        what the one before predicted: pass k is k steps ahead from every step."""
        horizon = self.rollout_horizon
        if z.shape[1] <= horizon:
            raise ValueError(
                f"--rollout_horizon {horizon} needs windows of {horizon + 1} steps,"
                f" --sequence_length is {z.shape[1]}"
            )
        z = self.normalize(z)
        x = self.patches(z)
        _, z_q, indices, codebook, commitment = self.quantize_pairs(x, shift)
        out = ahead = self.predict(z[:, :-1], z_q, x[:, :-1])
        mse, mae, rollout = F.mse_loss(out, z[:, 1:]), F.l1_loss(out, z[:, 1:]), 0 * out.sum()
        for k in range(1, horizon):
            ahead = self.predict(torch.cat([z[:, :1], ahead[:, :-1]], dim=1), z_q)
            rollout = rollout + F.mse_loss(ahead[:, k:], z[:, k + 1 :]) / (horizon - 1)
        out = {
            "mse": mse,
            "mae": mae,
            "codebook": codebook,
            "commitment": commitment,
            "rollout": rollout,
            "indices": indices,
        }
        return {"loss": mse + codebook + self.commitment_weight * commitment + rollout} | out
