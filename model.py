"""Every nn.Module and the losses: the frozen video encoder (V-JEPA 1 and 2) and the action-conditioned predictor (V-JEPA 2-AC).

Shapes, one alphabet for the whole project:
    B clips · T steps · H, W patch grid · N = H*W patches a step · C condition tokens a step · S = C + N · L = T*S
    D width (E: the encoder's, where both are meant) · nh heads · hd head dim · A action dim · K codebook size, or steps predicted
Submodule names are Meta's, so that released weights load by key.
"""

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import apply_rope, block_causal_attention, linear, merge_moments, merge_over_ranks, moments

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# --- positions ---


def grid_positions(T, H, W, device=None):
    """Integer (t, row, col) of every patch, t-major, as floats: (T, N, 3)."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (T, H, W)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(T, H * W, 3)


def rope_tables(pos, head_dim):
    """cos and sin factors (..., hd) of 3-D RoPE for positions (..., 3): k dims for time, k for rows, k for columns, the rest not rotated.

    Built anew in fp32 by each forward, once for all its layers: a buffer would be rounded by `.bfloat16()`, a cached tensor made
    under inference_mode could not be used in training. The sign of `apply_rope`'s swapped term is folded into sin.
    """
    if head_dim % 2:
        raise ValueError(f"RoPE rotates pairs of dims, a head dim of {head_dim} is odd: choose another number of heads")
    half = head_dim // 3 // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=pos.device) / half) if half else pos.new_zeros(0)
    angle = pos.unsqueeze(-1) * omega
    # Meta's quirk: frequencies are tiled [w0 w1 .. w0 w1 ..] although adjacent dims are paired. No true rotation, but the weights need it.
    angle = F.pad(torch.cat([angle, angle], dim=-1).flatten(-2), (0, head_dim - 6 * half))
    sign = torch.ones_like(angle)
    sign[..., ::2] = -1
    return angle.cos(), angle.sin() * sign


def sincos_table(dim, T, H, W):
    """V-JEPA 1's fixed table (1, T*H*W, D), `uniform_power`: [sin | cos] for time, rows, columns, each ceil(D/6) wide, cut to D."""
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
        """(B, L, D) -> (B, L, D) and (k, v) (B, nh, L, hd). `past` is the (k, v) of earlier steps, all of which one further step sees."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # (B, nh, L, hd); not slices: the gradient of one is a full tensor of zeros
        if rope is not None:
            q, k = apply_rope((q, k), *rope)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
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
    """Pre-norm transformer block, the same in encoder and predictor; `block` tokens a step make its attention block-causal."""

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
    """Meta's initialisation: normal std 0.02, zero biases, then both residual outputs of block i (from 1) divided by sqrt(2i)."""
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
    """V-JEPA video transformer. `pos="rope"` is V-JEPA 2 (any size and length); `pos="sincos"` is V-JEPA 1, whose table is made for
    square `img_size` and `num_frames` and interpolated to any other size, time too (a lone step gets the mean of the middle rows)."""

    activation_checkpointing = False

    def __init__(
        self, embed_dim, depth, num_heads, *, mlp_dim=None, patch_size=16, tubelet_size=2, pos="rope", img_size=224, num_frames=16
    ):
        super().__init__()
        self.embed_dim, self.num_heads, self.patch_size, self.tubelet_size = embed_dim, num_heads, patch_size, tubelet_size
        self.patch_embed = PatchEmbed(embed_dim, patch_size, tubelet_size)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_dim or 4 * embed_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        if pos not in ("rope", "sincos"):
            raise ValueError(f"pos={pos!r}: choose rope (V-JEPA 2) or sincos (V-JEPA 1)")
        self.table_size = (num_frames // tubelet_size, img_size // patch_size, img_size // patch_size) if pos == "sincos" else None
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

        `masks` (B, n) keeps only these token ids, at their own positions; `out_layers=[i, ...]` returns the normed output of each of these
        blocks instead. Pixels and frames that fill no whole patch are dropped, as upstream.
        """
        x = self.patch_embed(video)
        T, H, W = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # (B, T*N, D)
        rope = None
        if self.table_size:
            x = x + self.position_table(T, H, W)
        else:
            rope = rope_tables(grid_positions(T, H, W, x.device).view(-1, 3), self.embed_dim // self.num_heads)
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


class Predictor(nn.Module):
    """V-JEPA 2-AC predictor: p(z_t+1 | z_<=t, a_<=t, s_<=t). Each step is the tokens [action, state, (extrinsics), N patches], attention is
    full inside a step and causal across steps, and the output at step t is the prediction of step t+1 itself, not of a difference.

    `grid` is the encoder's patch grid (H, W). Condition tokens sit at (t, 0, 0), so their order in a step changes nothing.
    `state_dim=0` builds no state token (jepa-wms "noprop"). Extrinsics are 6-D camera poses.
    """

    activation_checkpointing = False

    def __init__(
        self, embed_dim, action_dim, state_dim, grid, *, pred_dim=1024, depth=24, num_heads=16, mlp_dim=None, use_extrinsics=False
    ):
        super().__init__()
        self.grid, self.head_dim, self.use_extrinsics = tuple(grid), pred_dim // num_heads, use_extrinsics
        self.predictor_embed = Linear(embed_dim, pred_dim)
        self.action_encoder = nn.Linear(action_dim, pred_dim)
        self.state_encoder = nn.Linear(state_dim, pred_dim) if state_dim else None
        self.extrinsics_encoder = nn.Linear(6, pred_dim) if use_extrinsics else None
        self.predictor_blocks = nn.ModuleList(Block(pred_dim, num_heads, mlp_dim or 4 * pred_dim) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(pred_dim, eps=1e-6)
        self.predictor_proj = Linear(pred_dim, embed_dim)
        init_weights(self, self.predictor_blocks)

    def positions(self, T, C, device=None, start=0):
        """(t, row, col) of every token (L, 3): the condition tokens at (t, 0, 0), columns in units of the grid height, as upstream."""
        H, W = self.grid
        pos = grid_positions(start + T, H, W, device)[start:] * torch.tensor([1, 1, H / W], device=device)
        return torch.cat([pos[:, :1].expand(-1, C, -1), pos], dim=1).view(-1, 3)  # the first patch is at (t, 0, 0)

    def forward(self, z, actions, states, extrinsics=None):
        """(B, T*N, E), (B, T, A), (B, T, S), (B, T, 6) -> (B, T*N, E)."""
        return self.extend(z, actions, states, extrinsics)[0]

    def extend(self, z, actions, states, extrinsics=None, past=None):
        """The same, and the keys and values of every block, [(k, v)] of (B, nh, L, hd). Given back as `past` with the one step that
        follows, they stand for all steps before it: earlier steps never see later ones, so nothing is computed twice."""
        (H, W), T = self.grid, actions.shape[1]
        if z.shape[1] != T * H * W:
            raise ValueError(f"{z.shape[1]} patch tokens are not {T} actions x {H * W} patches (grid {H}x{W})")
        if self.use_extrinsics != (extrinsics is not None):
            raise ValueError(f"use_extrinsics={self.use_extrinsics}, but extrinsics were {'not ' if extrinsics is None else ''}given")
        tokens = [self.action_encoder(actions)]
        if self.state_encoder is not None:
            tokens.append(self.state_encoder(states))
        if self.use_extrinsics:
            tokens.append(self.extrinsics_encoder(extrinsics))
        C, S = len(tokens), len(tokens) + H * W
        x = self.predictor_embed(z).unflatten(1, (T, H * W))
        x = torch.cat([torch.stack(tokens, dim=2), x], dim=2).flatten(1, 2)  # (B, L, D)
        if past is not None and T > 1:
            raise ValueError(f"{T} steps cannot follow the steps of `past` at once: extend it by one")
        start = past[0][0].shape[2] // S if past is not None else 0
        rope, present = rope_tables(self.positions(T, C, z.device, start), self.head_dim), []
        for i, blk in enumerate(self.predictor_blocks):
            x, kv = run_block(self, blk, x, rope, S, past and past[i])
            present.append(kv)
        x = x.unflatten(1, (T, S))[:, :, C:].flatten(1, 2)  # (B, T*N, D)
        return self.predictor_proj(self.predictor_norm(x)), present


def copy_fitting(module, state):
    """Copy the tensors of a state dict that fit into a module; returns (taken, made anew, left over) as lists of names."""
    own = module.state_dict()
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict(own | fits)
    return sorted(fits), sorted(own.keys() - fits.keys()), sorted(state.keys() - fits.keys())


# --- features ---


def encode_steps(encoder, video, mode, frames_per_step):
    """Features (B, T, N, D), not yet normalised, of uint8 frames (B, T*frames_per_step, 3, H, W).

    `tubelet` encodes the frames of each step alone (a single frame is repeated), `frame` repeats each step's first frame (Meta on
    DROID), `clip` encodes all frames at once: the encoder is bidirectional, so there every step has seen the future.
    """
    tubelet = encoder.tubelet_size
    B, frames = video.shape[:2]
    if mode not in ("tubelet", "frame", "clip"):
        raise ValueError(f"encode mode {mode!r} is unknown, choose from: tubelet, frame, clip")
    if frames % frames_per_step:
        raise ValueError(f"{frames} frames are not a whole number of steps of {frames_per_step} frames")
    if frames_per_step != tubelet and (mode == "clip" or (mode == "tubelet" and frames_per_step != 1)):
        raise ValueError(f"--encode {mode} needs the encoder's {tubelet} frames a step, not {frames_per_step}: use --encode frame")
    T = frames // frames_per_step
    if mode != "clip":
        video = video.unflatten(1, (T, frames_per_step)).flatten(0, 1)  # (B*T, frames_per_step, 3, H, W)
        if mode == "frame" or frames_per_step == 1:
            video = video[:, :1].expand(-1, tubelet, -1, -1, -1)
    mean, std = (torch.tensor(c, device=video.device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    video = (video.float() / 255 - mean) / std
    h = encoder(video.to(encoder.patch_embed.proj.weight.dtype).transpose(1, 2))
    return h.reshape(B, T, -1, h.shape[-1])  # (B, T, N, D)


def normalize_features(h, mean=None, std=None):
    """What the losses compare: optional per-channel centring and scaling, then a layer norm over D without affine, in fp32."""
    h = h.float()
    if mean is not None:
        h = h - mean
    if std is not None:
        h = h / std
    return F.layer_norm(h, h.shape[-1:])


def channel_stats(batches, width, device):
    """Mean and std {"mean", "std"} (D,) of every channel over all ranks' batches of features (B, T, N, D), for `normalize_features`."""
    zeros = torch.zeros(width, dtype=torch.float64, device=device)  # of a rank without a batch
    part = functools.reduce(merge_moments, (moments(h.flatten(0, 2)) for h in batches), (0, zeros, zeros))
    n, mean, m2 = merge_over_ranks(part) if dist.is_initialized() else part
    return {"mean": mean.float(), "std": (m2 / n).sqrt().clamp_min(1e-6).float()}


# --- losses and rollouts ---


def predict(predictor, z, actions, states, extrinsics=None):
    """Layer-normed prediction of the step after each of z's steps (B, T, N, E); longer actions, states, extrinsics are cut to T."""
    return predict_on(predictor, z, actions, states, extrinsics)[0]


def predict_on(predictor, z, actions, states, extrinsics=None, past=None, start=0):
    """`predict` for the steps from `start` on, and the keys and values to go on from; those of the steps before come as `past`."""
    steps = slice(start, start + z.shape[1])
    given = actions[:, steps], states[:, steps], None if extrinsics is None else extrinsics[:, steps]
    out, present = predictor.extend(z.flatten(1, 2), *given, past)
    return normalize_features(out).view(z.shape), present


def rollout(predictor, z, actions, states, extrinsics=None, past=None):
    """Context z (B, c, N, E) and actions (B, c-1+K, A), with their states -> the K steps that follow (B, K, N, E), each from all before.

    `past`: what `predict_on` returned for all of z but its last step. States are taken as given; gradients flow through the whole chain.
    """
    c, steps = z.shape[1], []
    start = 0 if past is None else c - 1
    z = z[:, start:]
    for t in range(c, actions.shape[1] + 1):
        out, past = predict_on(predictor, z, actions, states, extrinsics, past, start)
        z, start = out[:, -1:], t
        steps.append(z)
    return torch.cat(steps, dim=1)


def ac_losses(predictor, z, actions, states, extrinsics=None, auto_steps=2, loss_exp=1.0):
    """Teacher forcing and rollout losses (jloss, sloss) of V-JEPA 2-AC: arXiv 2506.09985 section 3, vjepa2 app/vjepa_droid/train.py.

    z (B, T, N, E) layer-normed features, actions (B, T-1, A), states (B, T, S). Both are mean |prediction - z|^loss_exp / loss_exp. Teacher
    forcing is one causal pass; the rollout takes `auto_steps` steps from step 1 and shares the first with it, keys and values too.
    """
    T = z.shape[1]
    if not 1 <= auto_steps < T:
        raise ValueError(f"auto_steps={auto_steps} needs 1 <= auto_steps < T, and these clips have T={T} steps")
    z = z.float()
    z_tf, present = predict_on(predictor, z[:, :-1], actions, states, extrinsics)
    z_ar = z_tf[:, :1]
    if auto_steps > 1:
        first = [[x[:, :, : x.shape[2] // (T - 1)] for x in kv] for kv in present]
        z_ar = torch.cat([z_ar, rollout(predictor, torch.cat([z[:, :1], z_ar], 1), actions[:, :auto_steps], states, extrinsics, first)], 1)
    jloss, sloss = (((p - t).abs() ** loss_exp).mean() / loss_exp for p, t in ((z_tf, z[:, 1:]), (z_ar, z[:, 1 : auto_steps + 1])))
    return jloss, sloss


class ACModel(nn.Module):
    """The predictor as DDP must see it: forward returns the two losses, so that every gradient is synchronised."""

    def __init__(self, predictor, auto_steps=2, loss_exp=1.0):
        super().__init__()
        self.predictor, self.auto_steps, self.loss_exp = predictor, auto_steps, loss_exp

    def forward(self, z, actions, states, extrinsics=None):
        return ac_losses(self.predictor, z, actions, states, extrinsics, self.auto_steps, self.loss_exp)


# --- does it use the action? ---


def compose_states(state0, actions, mean, scale):
    """VPT states (B, K, 2) before each of K actions, from the first (B, 2): yaw and pitch in radians, yaw wrapped to (-pi, pi].

    `actions` (B, K, A) are scaled; dims 2 and 3 are yaw_diff and pitch_diff, `mean` and `scale` the scaler's for the continuous dims.
    """
    diff = actions[..., 2:4] * scale[2:4] + mean[2:4]
    states = state0.unsqueeze(1) + F.pad(diff.cumsum(1), (0, 0, 1, 0))[:, :-1]
    yaw, pitch = states.unbind(-1)
    return torch.stack([math.pi - (math.pi - yaw) % (2 * math.pi), pitch], dim=-1)


@torch.no_grad()
def action_meter(predictor, z, actions, states, shuffle, compose):
    """Mean absolute error of each clip at each of K = T-1 horizons, (B, K), one step ahead (`tf_`) and rolled out from step 0 (`ro_`):
    under the true actions, under those of another clip (`shuffle`: a derangement of the batch), under zero ones (the mean action), and of
    copying the last known step. One step ahead the states are the true ones; rolled out they are `compose(state0, actions)`, since true
    states would tell what the true actions were.
    """
    z, target = z.float(), z[:, 1:].float()
    errors = {"tf_copy": z[:, :-1], "ro_copy": z[:, :1]}
    for name, a in (("true", actions), ("shuffled", actions[shuffle]), ("zero", torch.zeros_like(actions))):
        errors[f"tf_{name}"] = predict(predictor, z[:, :-1], a, states)
        errors[f"ro_{name}"] = rollout(predictor, z[:, :1], a, compose(states[:, 0], a))
    return {name: (p - target).abs().mean((2, 3)) for name, p in errors.items()}


METERS = [f"{p}_{n}" for p in ("tf", "ro") for n in ("true", "shuffled", "zero", "copy", "gap", "gap_low", "gap_high", "skill")]


def meter_summary(errors, recordings, samples=2000):
    """Action meter of many clips -> METERS: {tf_, ro_}{true, shuffled, zero, copy} mean errors, gap = shuffled/true - 1, its 95 % interval
    (gap_low, gap_high: bootstrap over recordings, since clips of one recording are alike) and skill = true/copy. errors: name -> (n, K)."""
    group = torch.tensor([sorted(set(recordings)).index(r) for r in recordings])
    draws = torch.randint(group.max() + 1, (samples, int(group.max()) + 1), generator=torch.Generator().manual_seed(0))
    out = {}
    for p in ("tf", "ro"):
        total = {}
        for name in ("true", "shuffled", "zero", "copy"):
            clip = errors[f"{p}_{name}"].double().mean(1)
            out[f"{p}_{name}"] = clip.mean().item()
            total[name] = torch.zeros(len(draws[0]), dtype=torch.double).index_add_(0, group, clip)
        gaps = total["shuffled"][draws].sum(1) / total["true"][draws].sum(1) - 1
        out[f"{p}_gap"] = out[f"{p}_shuffled"] / out[f"{p}_true"] - 1
        out[f"{p}_gap_low"], out[f"{p}_gap_high"] = gaps.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        out[f"{p}_skill"] = out[f"{p}_true"] / out[f"{p}_copy"]
    return out
