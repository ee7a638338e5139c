"""Every nn.Module and every loss: the frozen video encoder (V-JEPA 1, 2 and 2.1), the
action-conditioned predictor (V-JEPA 2-AC), latent actions and LoRA layers.

The file reads from top to bottom: positions, transformer, encoder, predictor, features (from a
batch to what the losses compare), losses, pictures, latent actions, LoRA.

Shapes, one alphabet for the whole project:
    B clips · T steps · H, W patch grid · N = H*W patches of a step
    C condition tokens of a step · S = C + N tokens of a step · L = T*S
    D width (E: the encoder's, where both are meant) · nh heads · hd head dim
    A action dim · K codebook size, or number of predicted steps
Submodules have Meta's names, so released weights load by key.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kernels import (
    apply_rope,
    block_causal_attention,
    linear,
    low_rank,
    merge_moments,
    merge_over_ranks,
    moments,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# --- positions ---


def grid_positions(T, H, W, device=None):
    """Integer (t, row, col) of every patch as floats, ordered by t: (T, N, 3)."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (T, H, W)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(T, H * W, 3)


def scale_positions(pos, grid):
    """V-JEPA 2.1's positions (..., 3): rows and columns of a patch grid (H, W) stretched to the 16
    x 16 patches of its pretraining. Changes `pos`."""
    # a side of one patch is at 0, whatever the factor
    pos[..., 1] *= 15 / max(grid[0] - 1, 1)
    pos[..., 2] *= 15 / max(grid[1] - 1, 1)
    return pos


def rope_tables(pos, head_dim, tiled=True):
    """cos and sin factors (..., hd) of 3-D RoPE for positions (..., 3). A third of the dims is
    rotated by time, a third by row and a third by column; the rest is not rotated. `tiled` is
    V-JEPA 2's order of the frequencies, without it this is a true rotation (V-JEPA 2.1).

    Every forward builds them in fp32, once for all its layers. A buffer would be rounded by
    `.bfloat16()`, and a tensor cached under inference_mode could not be used in training. The sign
    of the term that `apply_rope` swaps is folded into sin."""
    if head_dim % 2:
        raise ValueError(
            f"RoPE rotates pairs of dims, a head dim of {head_dim} is odd: choose another number of"
            " heads"
        )

    # one frequency for each pair of dims; heads of under 6 dims have none
    half = head_dim // 3 // 2
    omega = pos.new_zeros(0)
    if half:
        exponents = torch.arange(half, dtype=torch.float32, device=pos.device) / half
        omega = 10000.0**-exponents
    angle = pos.unsqueeze(-1) * omega

    # Meta's quirk: frequencies are tiled [w0 w1 .. w0 w1 ..] although adjacent dims are paired.
    # This is no true rotation, but the released weights of V-JEPA 2 need it. In those of 2.1 both
    # dims of a pair have one frequency.
    if tiled:
        angle = torch.cat([angle, angle], dim=-1)
    else:
        angle = angle.repeat_interleave(2, dim=-1)
    angle = angle.flatten(-2)
    angle = F.pad(angle, (0, head_dim - 6 * half))

    sign = torch.ones_like(angle)
    sign[..., ::2] = -1
    return angle.cos(), angle.sin() * sign


def sincos_table(dim, T, H, W):
    """V-JEPA 1's fixed table (1, T*H*W, D), called `uniform_power` there: [sin | cos] for time,
    rows and columns, each ceil(D/6) wide, cut to D."""
    half = math.ceil(dim / 6)
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = grid_positions(T, H, W).view(-1, 3, 1).double() * omega
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)[None, :, :dim].float()


# --- transformer ---


class Linear(nn.Linear):
    """nn.Linear by our kernel: on some CPUs another library is faster, and a frozen layer gives the
    same bits as a trained one."""

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
        """(B, L, D) -> (B, L, D) and (k, v) (B, nh, L, hd).

        `past` is the (k, v) of all earlier steps, for an x of one further step, which sees all of
        them. The `past` of one clip serves a whole batch."""
        # unbind, not slices: the gradient of one slice is a full tensor of zeros
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(2)
        q = q.transpose(1, 2)  # (B, nh, L, hd)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        if rope is not None:
            q, k = apply_rope((q, k), *rope)

        if past is not None:
            past_k, past_v = past
            k = torch.cat([past_k.expand(len(k), -1, -1, -1), k], dim=2)
            v = torch.cat([past_v.expand(len(v), -1, -1, -1), v], dim=2)

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
    """Pre-norm transformer block, the same in encoder and predictor. With `block`, the number of
    tokens of a step, its attention is block-causal."""

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
    """Meta's initialisation: normal with std 0.02 and zero biases. Then both residual outputs of
    block i (counted from 1) are divided by sqrt(2i)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        for i, blk in enumerate(blocks, start=1):
            blk.attn.proj.weight.div_(math.sqrt(2 * i))
            blk.mlp.fc2.weight.div_(math.sqrt(2 * i))


def run_block(model, blk, *inputs):
    """A block's output, recomputed in the backward pass if the model asks for checkpointing."""
    if model.activation_checkpointing and torch.is_grad_enabled():
        return checkpoint(blk, *inputs, use_reentrant=False)
    return blk(*inputs)


# --- encoder ---


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch_size, tubelet_size):
        super().__init__()
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, dim, kernel_size=kernel, stride=kernel)

    def forward(self, video):
        return self.proj(video)


class Encoder(nn.Module):
    """V-JEPA video transformer.

    `pos="rope"` is V-JEPA 2, for any size and length; Encoder21 is 2.1. `pos="sincos"` is V-JEPA 1:
    its table is made for square pictures of `img_size` and for `num_frames`, and interpolated to
    any other size and length (a single step gets the mean of the middle rows)."""

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
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        # frames that stand for a single picture: it is repeated
        self.picture_frames = tubelet_size

        self.patch_embed = PatchEmbed(embed_dim, patch_size, tubelet_size)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_dim or 4 * embed_dim) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        if pos not in ("rope", "sincos"):
            raise ValueError(f"pos={pos!r}: choose rope (V-JEPA 2) or sincos (V-JEPA 1)")
        self.table_size = None
        if pos == "sincos":
            side = img_size // patch_size
            self.table_size = (num_frames // tubelet_size, side, side)
            self.register_buffer("pos_embed", sincos_table(embed_dim, *self.table_size))
        init_weights(self, self.blocks)

    def position_table(self, T, H, W):
        """The sincos table for a T x H x W grid: (1, T*H*W, D)."""
        if (T, H, W) == self.table_size:
            return self.pos_embed
        table = self.pos_embed.transpose(1, 2).unflatten(2, self.table_size)  # (1, D, T, H, W)
        # by size, not by scale factor as upstream: 14 * (61/14) floors to 60
        return F.interpolate(table, size=(T, H, W), mode="trilinear").flatten(2).transpose(1, 2)

    def embed(self, video):
        """Video -> patches (B, D, T, H, W)."""
        return self.patch_embed(video)

    def rotary_tables(self, T, H, W, device):
        """RoPE's cos and sin (T*H*W, hd)."""
        pos = grid_positions(T, H, W, device).view(-1, 3)
        return rope_tables(pos, self.embed_dim // self.num_heads)

    def output_norm(self, layer):
        """The norm of what block `layer` puts out."""
        return self.norm

    def forward(self, video, masks=None, out_layers=None):
        """(B, 3, T*tubelet, H*patch, W*patch), ImageNet-normalised -> (B, T*N, D), ordered by t.

        `masks` (B, n) keeps only these token ids, at their own positions. `out_layers=[i, ...]`
        returns the normed output of each of these blocks instead. Pixels and frames that fill no
        whole patch are dropped, as upstream."""
        x = self.embed(video)
        _, _, T, H, W = x.size()
        x = x.flatten(2).transpose(1, 2)  # (B, T*N, D)

        rope = None
        if self.table_size:
            x = x + self.position_table(T, H, W)
        else:
            rope = self.rotary_tables(T, H, W, x.device)

        if masks is not None:
            x = x.gather(1, masks.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            if rope is not None:
                rope = [table[masks].unsqueeze(1) for table in rope]

        outputs = []
        for i, blk in enumerate(self.blocks):
            x, _ = run_block(self, blk, x, rope)
            if out_layers is not None and i in out_layers:
                outputs.append(self.output_norm(i)(x))
        if out_layers is not None:
            return outputs
        return self.output_norm(len(self.blocks) - 1)(x)


class Encoder21(Encoder):
    """V-JEPA 2.1: an Encoder whose RoPE is a true rotation, with rows and columns scaled to the 16
    x 16 patches of its pretraining, so that every picture spans the same positions.

    A video of one frame is a picture and has a patch embedding of its own; do not repeat it. Which
    of the two the tokens are is added to them. In place of one norm there are four, after each
    quarter of the blocks. `out_layers` takes those `levels` only. Meta's distilled files (ViT-B and
    ViT-L) have trained the last norm alone: the other three are still at weight 1 and bias 0."""

    def __init__(self, embed_dim, depth, num_heads, *, mlp_dim=None, patch_size=16, tubelet_size=2):
        if depth % 4:
            raise ValueError(
                f"V-JEPA 2.1 has a norm after each quarter of its blocks, and {depth} blocks have"
                " no quarters: choose a multiple of 4"
            )
        super().__init__(
            embed_dim,
            depth,
            num_heads,
            mlp_dim=mlp_dim,
            patch_size=patch_size,
            tubelet_size=tubelet_size,
        )
        self.picture_frames = 1
        self.patch_embed_img = PatchEmbed(embed_dim, patch_size, 1)
        init_weights(self.patch_embed_img, [])
        self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, embed_dim))

        # the blocks after which a level of features can be read, counted from 0
        self.levels = [quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4)]
        if depth == 48:
            self.levels[2] = 37  # Meta's third level of ViT-G is no quarter
        del self.norm  # the base class's
        self.norms_block = nn.ModuleList(nn.LayerNorm(embed_dim, eps=1e-6) for _ in self.levels)

    def embed(self, video):
        """Video, or one frame, -> patches (B, D, T, H, W)."""
        if video.shape[2] == 1:
            x = self.patch_embed_img(video)
            kind = self.img_mod_embed
        else:
            x = self.patch_embed(video)
            kind = self.video_mod_embed
        return x + kind.view(-1, 1, 1, 1).to(x.dtype)

    def rotary_tables(self, T, H, W, device):
        """RoPE's cos and sin (T*H*W, hd)."""
        pos = scale_positions(grid_positions(T, H, W, device).view(-1, 3), (H, W))
        return rope_tables(pos, self.embed_dim // self.num_heads, tiled=False)

    def freeze_unused(self, num_levels):
        """Freeze what is not trained by video whose last level (num_levels 1) or all four levels
        are used: DDP would wait for its gradients."""
        self.patch_embed_img.requires_grad_(False)
        self.img_mod_embed.requires_grad_(False)
        if num_levels == 1:
            self.norms_block[:-1].requires_grad_(False)

    def output_norm(self, layer):
        """The norm of a level."""
        return self.norms_block[self.levels.index(layer)]

    def forward(self, video, masks=None, out_layers=None):
        """As Encoder's; (B, 3, 1, H*patch, W*patch) is a picture -> (B, N, D)."""
        unknown = sorted(set(out_layers or ()) - set(self.levels))
        if unknown:
            raise ValueError(
                f"out_layers {unknown}: this encoder has norms after blocks {self.levels} only"
            )
        return super().forward(video, masks, out_layers)


class PictureEncoder(nn.Module):
    """Somebody's transformer for pictures as an encoder: every frame is encoded alone and is a step
    of its own.

    `backbone` takes pictures (B, 3, H, W) and returns an object whose `last_hidden_state` (B,
    extra_tokens + N, D) begins with class and register tokens. These are dropped. What remains are
    patches, row by row."""

    tubelet_size = 1
    picture_frames = 1

    def __init__(self, backbone, embed_dim, patch_size, extra_tokens):
        super().__init__()
        self.backbone = backbone
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.extra_tokens = extra_tokens

    def forward(self, video):
        """(B, 3, T, H*patch, W*patch), ImageNet-normalised -> (B, T*N, D), ordered by t."""
        B, _, T, _, _ = video.size()
        pictures = video.transpose(1, 2).flatten(0, 1)  # (B*T, 3, H*patch, W*patch)
        h = self.backbone(pictures).last_hidden_state
        h = h[:, self.extra_tokens :]  # (B*T, N, D)
        return h.unflatten(0, (B, T)).flatten(1, 2)


# --- predictor ---

PREDICTS = ("features", "change")

# an entry in the state dict of a predictor of changes, and of no other
CHANGE_MARK = "predicts_change"


def predict_of(state):
    """What the predictor with this state dict predicts, one of PREDICTS."""
    return "change" if CHANGE_MARK in state else "features"


class Predictor(nn.Module):
    """V-JEPA 2-AC predictor: p(z_t+1 | z_<=t, a_<=t, s_<=t).

    Each step is the tokens [action, state, (extrinsics), N patches]. Attention is full inside a
    step and causal across steps. The output at step t is the prediction of step t+1.

    `grid` is the encoder's patch grid (H, W). Condition tokens sit at (t, 0, 0), so their order in
    a step changes nothing. `state_dim=0` builds no state token (jepa-wms calls it "noprop").
    Extrinsics are 6-D camera poses; Meta's files have a layer for them.

    predict="change" adds step t's own features to the output at step t, so the network only has to
    give the change: with its small initial weights it copies the step, and learns from there.
    Meta's weights are of "features". The setting is an entry of the state dict and travels with the
    weights: code that does not know it refuses the file instead of taking changes for features."""

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
        self.grid = tuple(grid)
        self.head_dim = pred_dim // num_heads
        self.use_extrinsics = use_extrinsics

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
        """(t, row, col) of every token of T steps from `start` on: (L, 3). Condition tokens are at
        (t, 0, 0); columns are in units of the grid height, as upstream."""
        H, W = self.grid
        pos = grid_positions(start + T, H, W, device)[start:].float()
        pos[:, :, 2] *= H / W
        condition = pos[:, :1].expand(-1, C, -1)  # the first patch is at (t, 0, 0) too
        return torch.cat([condition, pos], dim=1).view(-1, 3)

    def condition_tokens(self, actions, states, extrinsics=None):
        """(B, T, A), (B, T, S), (B, T, 6) or None -> (B, T, C, D)."""
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
        return torch.stack(tokens, dim=2)

    def forward(self, z, actions, states, extrinsics=None):
        """(B, T*N, E), (B, T, A), (B, T, S), (B, T, 6) or None -> (B, T*N, E): the prediction of
        the step after each, before its layer norm."""
        return self.extend(z, actions, states, extrinsics)[0]

    def extend(self, z, actions, states, extrinsics=None, past=None):
        """`forward`, and the keys and values of every block: [(k, v)] of (B, nh, L, hd).

        Earlier steps never see later ones, so nothing has to be computed twice: pass the keys and
        values back as `past`, with the one step that follows, and they stand for all steps before
        it."""
        H, W = self.grid
        T = actions.shape[1]
        if z.shape[1] != T * H * W:
            raise ValueError(
                f"{z.shape[1]} patch tokens are not {T} actions x {H * W} patches (grid {H}x{W})"
            )
        if past is not None and T > 1:
            raise ValueError(
                f"{T} steps cannot follow the steps of `past` at once: extend it by one"
            )

        # the tokens of all steps, one after another
        condition = self.condition_tokens(actions, states, extrinsics)
        patches = self.predictor_embed(z).unflatten(1, (T, H * W))
        x = torch.cat([condition, patches], dim=2).flatten(1, 2)  # (B, L, D)

        # their positions; new steps come after those of the past
        C = condition.shape[2]
        S = C + H * W
        start = past[0][0].shape[2] // S if past is not None else 0
        rope = rope_tables(self.positions(T, C, z.device, start), self.head_dim)

        present = []
        for i, blk in enumerate(self.predictor_blocks):
            block_past = past[i] if past is not None else None
            x, keys_values = run_block(self, blk, x, rope, S, block_past)
            present.append(keys_values)

        # only patches are predicted
        x = x.unflatten(1, (T, S))[:, :, C:].flatten(1, 2)  # (B, T*N, D)
        x = self.predictor_proj(self.predictor_norm(x))
        if self.predict == "change":
            x = x + z
        return x, present

    def rollout(self, z, actions, states, cache=None):
        """Predict K steps, each from all before it and the model's own predictions.

        z (B, c, N, E) is the context, layer-normed; actions (B, c-1+K, A) and states (at least as
        long) are given for all steps -> (B, K, N, E), layer-normed. Gradients flow through the
        whole chain.

        `cache` is optional: the keys and values of all context steps but the last, as `predict_on`
        returns them. Those of one clip (batch size 1) serve all B."""
        context = z.shape[1]
        start = 0
        past = None
        if cache:
            past = cache
            start = context - 1
            z = z[:, -1:]

        steps = []
        for end in range(context, actions.shape[1] + 1):
            predictions, past = predict_on(self, z, actions, states, past, start)
            z = predictions[:, -1:]
            start = end
            steps.append(z)
        return torch.cat(steps, dim=1)


def size_of(predictor):
    """The options of Predictor that say how large it is."""
    width = predictor.predictor_embed.out_features
    return {
        "pred_dim": width,
        "depth": len(predictor.predictor_blocks),
        "num_heads": width // predictor.head_dim,
    }


def copy_fitting(module, state):
    """Copy those tensors of a state dict into a predictor that fit by name and shape.

    Returns three lists of names: copied, left as they were initialised, not used. Raises ValueError
    if the two predict different things: every tensor would fit and mean something else."""
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
    """Mean and std (3, 1, 1) of the pixels that encoders were trained on. They are copied to a
    device once, because a copy makes the host wait."""
    with torch.inference_mode(False):
        return [torch.tensor(c, device=device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD)]


def encode_steps(encoder, video, mode, frames_per_step):
    """Features (B, T, N, D), not yet normalised, of uint8 frames (B, T*frames_per_step, 3, H, W).

    `tubelet` encodes the frames of each step alone. `frame` encodes each step's first frame (Meta
    on DROID). A single frame is repeated, unless the encoder has a path for pictures. `clip`
    encodes all frames at once: the encoder is bidirectional, so there every step has seen the
    future."""
    tubelet = encoder.tubelet_size
    picture_frames = getattr(encoder, "picture_frames", tubelet)
    B, frames = video.shape[:2]
    sees_one_frame = mode == "frame" or (mode == "tubelet" and frames_per_step == 1)
    if mode not in ("tubelet", "frame", "clip"):
        raise ValueError(f"encode mode {mode!r} is unknown, choose from: tubelet, frame, clip")
    if frames % frames_per_step:
        raise ValueError(
            f"{frames} frames are not a whole number of steps of {frames_per_step} frames"
        )
    if frames_per_step != tubelet and not sees_one_frame:
        raise ValueError(
            f"--encode {mode} needs the encoder's {tubelet} frames a step, not {frames_per_step}:"
            " use --encode frame"
        )

    # every step becomes a video of its own
    T = frames // frames_per_step
    if mode != "clip":
        video = video.unflatten(1, (T, frames_per_step))
        video = video.flatten(0, 1)  # (B*T, frames_per_step, 3, H, W)
        if sees_one_frame:
            video = video[:, :1].expand(-1, picture_frames, -1, -1, -1)

    mean, std = imagenet(video.device)
    video = (video.float() / 255 - mean) / std
    h = encoder(video.to(next(encoder.parameters()).dtype).transpose(1, 2))
    return h.reshape(B, T, -1, h.shape[-1])  # (B, T, N, D)


def normalize_features(h, mean=None, std=None):
    """What the losses compare: a layer norm over D without affine, in fp32, optionally after
    centring and scaling every channel."""
    h = h.float()
    if mean is not None:
        h = h - mean
    if std is not None:
        h = h / std
    return F.layer_norm(h, h.shape[-1:])


def channel_stats(batches, width, device):
    """{"mean", "std"} (D,) of every channel over all ranks' batches of features (B, T, N, D), for
    `normalize_features`."""
    # a rank without a batch has these
    zeros = torch.zeros(width, dtype=torch.float64, device=device)
    total = (0, zeros, zeros)
    for h in batches:
        total = merge_moments(total, moments(h.flatten(0, 2)))

    n, mean, m2 = merge_over_ranks(total)
    if not n:
        raise ValueError("no features to take channel statistics of")
    return {"mean": mean.float(), "std": (m2 / n).sqrt().clamp_min(1e-6).float()}


def make_features_of(
    encoder, encode, frames_per_step, feature_stats, device, autocast=contextlib.nullcontext
):
    """A function from a batch of data.py to what the predictor takes: (z, actions, states) on the
    device. `feature_stats` {"mean", "std"} of the channels may be filled in later."""

    @torch.no_grad()
    def features_of(batch, normalize=True):
        is_encoded = "z" in batch
        h = batch["z" if is_encoded else "video"].to(device, non_blocking=True)
        # plain video has none of these
        actions, states = batch.get("actions"), batch.get("states")
        if actions is not None:
            actions = actions.to(device, non_blocking=True)
            states = states.to(device, non_blocking=True)

        if not is_encoded:
            # weights in bf16 need no autocast, it would only cast back and forth
            is_fp32 = next(encoder.parameters()).dtype == torch.float32
            cast = autocast if is_fp32 else contextlib.nullcontext
            with torch.inference_mode(), cast():
                h = encode_steps(encoder, h, encode, frames_per_step)

        if not normalize:
            return h.float(), actions, states
        return normalize_features(h, **feature_stats), actions, states

    return features_of


@torch.no_grad()
def picture_features(pictures, encoder, crop_size, encode="frame", feature_stats=None):
    """Features (N, D) of one step, float32 and layer-normed, from its pictures: av.VideoFrames, or
    arrays (H, W, 3) uint8. They are resized and cut to the centre as recordings are.
    `feature_stats` are those of a run with --feature_norm standardize."""
    # here, because most programs that import model.py decode no pictures
    import av

    from files.video import upright

    frames = []
    for picture in pictures:
        if not isinstance(picture, av.VideoFrame):
            picture = np.ascontiguousarray(picture)
            picture = av.VideoFrame.from_ndarray(picture, format="rgb24")
        pixels = upright(picture, crop_size)
        top = (pixels.shape[0] - crop_size) // 2
        left = (pixels.shape[1] - crop_size) // 2
        frames.append(pixels[top : top + crop_size, left : left + crop_size])

    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None]  # (1, frames, 3, H, W)
    video = video.to(next(encoder.parameters()).device)
    h = encode_steps(encoder, video, encode, len(frames))
    return normalize_features(h, **(feature_stats or {}))[0, 0]


# --- losses ---


def predict(predictor, z, actions, states):
    """Layer-normed predictions of the step after each of z's steps: (B, T, N, E) -> (B, T, N, E).
    Actions and states may be longer than z."""
    return predict_on(predictor, z, actions, states)[0]


def predict_on(predictor, z, actions, states, past=None, start=0):
    """`predict`, and the keys and values to continue from. z holds the steps from `start` on;
    `past` are the keys and values of the steps before. Actions and states are given from step 0
    on."""
    steps = slice(start, start + z.shape[1])
    tokens = z.flatten(1, 2)
    out, present = predictor.extend(tokens, actions[:, steps], states[:, steps], past=past)
    return normalize_features(out).view(z.shape), present


def ac_losses(predictor, z, actions, states, auto_steps=2, loss_exp=1.0):
    """Teacher forcing and rollout losses (jloss, sloss) of V-JEPA 2-AC: arXiv 2506.09985 section 3,
    vjepa2 app/vjepa_droid/train.py.

    z (B, T, N, E) layer-normed features, actions (B, T-1, A), states (B, T, S). Teacher forcing
    predicts every step from true ones, in one causal pass. The rollout predicts the `auto_steps`
    steps after the first; its first step is that of teacher forcing, keys and values too."""
    T = z.shape[1]
    if not 1 <= auto_steps < T:
        raise ValueError(
            f"auto_steps={auto_steps} needs 1 <= auto_steps < T, and these clips have T={T} steps"
        )

    def error(prediction, target):
        return ((prediction - target).abs() ** loss_exp).mean() / loss_exp

    # teacher forcing
    z = z.float()
    z_tf, present = predict_on(predictor, z[:, :-1], actions, states)

    # rollout: continue from the keys and values of step 0, copied, because a view would keep those
    # of all steps in memory until the backward pass
    z_ar = z_tf[:, :1]
    if auto_steps > 1:
        cache = []
        for k, v in present:
            S = k.shape[2] // (T - 1)
            cache.append((k[:, :, :S].clone(), v[:, :, :S].clone()))
        context = torch.cat([z[:, :1], z_ar], dim=1)
        later = predictor.rollout(context, actions[:, :auto_steps], states, cache)
        z_ar = torch.cat([z_ar, later], dim=1)

    jloss = error(z_tf, z[:, 1:])
    sloss = error(z_ar, z[:, 1 : auto_steps + 1])
    return jloss, sloss


class ACModel(nn.Module):
    """The predictor as DDP must see it: forward returns the two losses, so every gradient is
    synchronised."""

    def __init__(self, predictor, auto_steps=2, loss_exp=1.0):
        super().__init__()
        self.predictor = predictor
        self.auto_steps = auto_steps
        self.loss_exp = loss_exp

    def forward(self, z, actions, states):
        return ac_losses(self.predictor, z, actions, states, self.auto_steps, self.loss_exp)


def compose_states(state0, actions, mean, scale):
    """VPT states (B, K, 2) before each of K actions, from the first state (B, 2): yaw and pitch in
    radians, yaw wrapped to (-pi, pi].

    `actions` (B, K, A) are scaled, with yaw_diff and pitch_diff in dims 2 and 3. `mean` and `scale`
    are the scaler's, for the continuous dims."""
    diff = actions[..., 2:4] * scale[2:4] + mean[2:4]
    states = state0.unsqueeze(1) + F.pad(diff.cumsum(1), (0, 0, 1, 0))[:, :-1]
    yaw, pitch = states.unbind(-1)
    return torch.stack([math.pi - (math.pi - yaw) % (2 * math.pi), pitch], dim=-1)


# --- masked pretraining (V-JEPA 2) ---


class Mask(NamedTuple):
    """One kind of mask for a batch of clips."""

    context: torch.Tensor  # (B, n) ids of the tokens that the encoder sees, ascending
    predicted: torch.Tensor  # (B, m) ids of those that are predicted, ascending
    per_step: (
        int  # tokens of context in each step that has any; no use where clips are cut unevenly
    )
    whole_steps: bool  # whether all patches of a step are on one side

    def to(self, device):
        context = self.context.to(device, non_blocking=True)
        predicted = self.predicted.to(device, non_blocking=True)
        return self._replace(context=context, predicted=predicted)


def sample_masks(clips, grid, blocks, scale, aspect, size_seed, place_seed, even=False):
    """Random tubes of blocks for some clips: which tokens the encoder sees and which are predicted
    (vjepa2 src/masks/multiseq_multiblock3d.py).

    `grid` is (T, H, W) in patches. A block covers the share `scale` of a picture, has an aspect
    ratio between the two numbers `aspect`, and lasts for all T steps. The union of `blocks` blocks
    at random places is predicted, the rest is context; a clip without context is drawn again.

    The numbers of tokens are those of the clip that has the fewest; of the other clips the last ids
    are on neither side. With `even` they are cut in every step alike, else at the end of the clip,
    as upstream. `size_seed` gives the size of the blocks: ranks that share it have the same.
    `place_seed` gives the places. Both may be lists of whole numbers."""
    T = grid[0]
    H, W = grid[1:]
    area = int(H * W * scale)
    ratio = np.random.default_rng(size_seed).uniform(*aspect)
    h = min(max(round(math.sqrt(area * ratio)), 1), H)
    w = min(max(round(math.sqrt(area / ratio)), 1), W)
    if (h, w) == (H, W):
        raise ValueError(
            f"--mask_scale {scale:g}: a block of {h}x{w} patches covers the whole picture and"
            " leaves no context: take a smaller share, or more patches"
        )

    # a tube covers the same patches in every step
    rng = np.random.default_rng(place_seed)
    hidden = np.zeros((clips, H, W), dtype=bool)
    to_draw = np.arange(clips)
    while len(to_draw):
        top = rng.integers(0, H - h + 1, (len(to_draw), blocks, 1))
        left = rng.integers(0, W - w + 1, (len(to_draw), blocks, 1))
        rows = (np.arange(H) >= top) & (np.arange(H) < top + h)  # (clips, blocks, H)
        columns = (np.arange(W) >= left) & (np.arange(W) < left + w)
        hidden[to_draw] = (rows[:, :, :, None] & columns[:, :, None, :]).any(1)
        to_draw = to_draw[hidden[to_draw].all((1, 2))]

    # a stable sort of False before True lists ids in ascending order
    hidden = hidden.reshape(clips, -1)
    if not even:
        hidden = np.tile(hidden, (1, T))
    sides = []
    for is_hidden in (hidden, ~hidden):
        count = (~is_hidden).sum(1).min()
        ids = np.argsort(is_hidden, axis=1, kind="stable")[:, :count]
        if even:
            ids = (ids[:, None] + H * W * np.arange(T)[:, None]).reshape(clips, -1)
        sides.append(torch.from_numpy(ids))
    return Mask(*sides, per_step=sides[0].shape[1] // T, whole_steps=False)


def sample_step_masks(clips, grid, share, place_seed):
    """Masks of whole steps: of each clip a random `share` of the T steps of its grid (T, H, W) is
    predicted from the others."""
    T = grid[0]
    N = grid[1] * grid[2]
    hidden_steps = min(max(round(T * share), 1), T - 1)
    rng = np.random.default_rng(place_seed)
    order = rng.random((clips, T)).argsort(axis=1)
    sides = []
    for steps in (order[:, hidden_steps:], order[:, :hidden_steps]):
        ids = np.sort(steps, axis=1)[:, :, None] * N + np.arange(N)
        sides.append(torch.from_numpy(ids.reshape(clips, -1)))
    return Mask(*sides, per_step=N, whole_steps=True)


def take_tokens(x, ids):
    """x (B, L, D), ids (B, n) -> (B, n, D)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def token_positions(ids, grid):
    """(t, row, col) of token ids (B, n) on a patch grid (H, W), as floats: (B, n, 3)."""
    H, W = grid
    return torch.stack([ids // (H * W), ids // W % H, ids % W], dim=-1).float()


class MaskPredictor(nn.Module):
    """V-JEPA 2's predictor: from the features of context tokens to those of masked ones.

    `grid` is the encoder's patch grid (H, W). A masked token starts as a learned vector, the first
    of `num_mask_tokens`, whatever kind of mask hides it: Meta counts them by clip lengths, and one
    run has one length. The others are there because Meta's files have them."""

    activation_checkpointing = False

    # levels of the encoder's features that it takes and predicts
    num_levels = 1

    def __init__(
        self,
        embed_dim,
        grid,
        *,
        pred_dim=384,
        depth=12,
        num_heads=12,
        mlp_dim=None,
        num_mask_tokens=2,
    ):
        super().__init__()
        self.grid = tuple(grid)
        self.embed_dim = embed_dim
        self.pred_dim = pred_dim
        self.num_heads = num_heads
        self.predictor_embed = Linear(embed_dim, pred_dim)
        self.mask_tokens = nn.ParameterList(
            nn.Parameter(torch.zeros(1, 1, pred_dim)) for _ in range(num_mask_tokens)
        )
        self.predictor_blocks = nn.ModuleList(
            Block(pred_dim, num_heads, mlp_dim or 4 * pred_dim) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(pred_dim, eps=1e-6)
        self.predictor_proj = Linear(pred_dim, embed_dim)
        init_weights(self, self.predictor_blocks)

    def freeze_unused(self, with_context=False):
        """Freeze what training does not use: DDP would wait for its gradients."""
        self.mask_tokens[1:].requires_grad_(False)

    def embed(self, context, count):
        """Features of the context (B, n, E) and `count` masked tokens -> (B, n+count, D)."""
        x = self.predictor_embed(context)
        masked = self.mask_tokens[0].to(x.dtype).expand(len(x), count, -1)
        return torch.cat([x, masked], dim=1)

    def rotary_tables(self, ids):
        """RoPE's cos and sin (B, L, hd) for token ids (B, L)."""
        return rope_tables(token_positions(ids, self.grid), self.pred_dim // self.num_heads)

    def hidden(self, context, context_ids, predicted_ids):
        """What the heads read: (B, n+m, D), the context first, not yet normed."""
        x = self.embed(context, predicted_ids.shape[1])  # (B, n+m, D)

        # sorted by position, as upstream
        ids = torch.cat([context_ids, predicted_ids], dim=1)
        ids, order = ids.sort(dim=1)
        x = take_tokens(x, order)
        rope = [table.unsqueeze(1) for table in self.rotary_tables(ids)]

        for blk in self.predictor_blocks:
            x, _ = run_block(self, blk, x, rope)

        # back in the order of context_ids and predicted_ids
        return take_tokens(x, order.argsort(dim=1))

    def forward(self, context, context_ids, predicted_ids):
        """context (B, n, E), ids (B, n) and (B, m) -> (B, m, E)."""
        x = self.hidden(context, context_ids, predicted_ids)
        return self.predictor_proj(self.predictor_norm(x[:, context_ids.shape[1] :]))


class MaskPredictor21(MaskPredictor):
    """V-JEPA 2.1's predictor. It predicts the tokens of the context, too, by a head of their own.

    Its RoPE is a true rotation, with rows and columns scaled as in Encoder21. So it was trained;
    Meta's hub code leaves the scaling out, which is another model above 256 pixels. With
    `num_levels` 4 (Meta's ViT-g and ViT-G) it takes and predicts all levels of the encoder,
    concatenated; with 1 the last. `out_dim` is the width of both heads."""

    def __init__(
        self,
        embed_dim,
        grid,
        *,
        num_levels=1,
        out_dim=None,
        pred_dim=384,
        depth=12,
        num_heads=12,
        mlp_dim=None,
        num_mask_tokens=8,
    ):
        super().__init__(
            embed_dim,
            grid,
            pred_dim=pred_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            num_mask_tokens=num_mask_tokens,
        )
        self.num_levels = num_levels
        if num_levels > 1:
            self.predictor_embed = nn.Sequential(
                Linear(num_levels * embed_dim, embed_dim), nn.GELU(), Linear(embed_dim, pred_dim)
            )
            init_weights(self.predictor_embed, [])
        self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, pred_dim))
        self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, pred_dim))
        self.new_heads(out_dim or num_levels * embed_dim)

    def new_heads(self, out_dim):
        """Make both heads new, for targets of width `out_dim`. Returns their names."""
        self.predictor_proj = Linear(self.pred_dim, out_dim)
        self.predictor_proj_context = Linear(self.pred_dim, out_dim)
        for head in (self.predictor_proj, self.predictor_proj_context):
            init_weights(head, [])
        return ["predictor_proj", "predictor_proj_context"]

    def freeze_unused(self, with_context=False):
        """Freeze what training on video does not use, and without the context loss its head."""
        self.mask_tokens[1:].requires_grad_(False)
        self.img_mod_embed.requires_grad_(False)
        self.predictor_proj_context.requires_grad_(with_context)

    def embed(self, context, count):
        x = super().embed(context, count)
        return x + self.video_mod_embed.to(x.dtype)

    def rotary_tables(self, ids):
        pos = scale_positions(token_positions(ids, self.grid), self.grid)
        return rope_tables(pos, self.pred_dim // self.num_heads, tiled=False)

    def forward(self, context, context_ids, predicted_ids):
        """As MaskPredictor's -> predicted tokens (B, m, out_dim), context tokens (B, n,
        out_dim)."""
        x = self.predictor_norm(self.hidden(context, context_ids, predicted_ids))
        n = context_ids.shape[1]
        return self.predictor_proj(x[:, n:]), self.predictor_proj_context(x[:, :n])


def pixels_to_video(frames):
    """uint8 frames (B, F, 3, H, W) -> what an encoder takes: (B, 3, F, H, W), normalised."""
    mean, std = imagenet(frames.device)
    return ((frames.float() / 255 - mean) / std).transpose(1, 2)


def random_aspect(video, aspect, seed):
    """Clips (B, 3, F, H, W) stretched at random: of each a box whose aspect ratio is between the
    two numbers `aspect` is cut out, as large as fits and anywhere, and resized to the whole. With
    random crops of the loader this is upstream's random resized crop."""
    B = len(video)
    rng = np.random.default_rng(seed)
    ratio = np.exp(rng.uniform(*np.log(aspect), B))  # width / height
    share = np.stack([np.minimum(ratio, 1), np.minimum(1 / ratio, 1)], axis=1)  # of width, height
    centre = rng.uniform(-1, 1, (B, 2)) * (1 - share)
    theta = torch.zeros(B, 2, 3)
    theta[:, [0, 1], [0, 1]] = torch.from_numpy(share).float()
    theta[:, :, 2] = torch.from_numpy(centre).float()
    frames = video.transpose(1, 2).flatten(0, 1)  # (B*F, 3, H, W)
    theta = theta.repeat_interleave(video.shape[2], dim=0).to(video.device)
    grid = F.affine_grid(theta, frames.shape, align_corners=False)
    frames = F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
    return frames.unflatten(0, (B, -1)).transpose(1, 2)


def masked_loss(predicted, targets, predicted_ids, loss_exp=1.0):
    """Mean |error|^loss_exp of predicted tokens (B, m, E). targets: the teacher's layer-normed
    features of the whole clip (B, L, E), of which predicted_ids (B, m) are compared."""
    error = predicted.float() - take_tokens(targets, predicted_ids)
    return (error.abs() ** loss_exp).mean() / loss_exp


def context_weights(context_ids, predicted_ids, grid):
    """How much each context token (B, n) counts in V-JEPA 2.1's context loss: 1 / d, where d is the
    square root of its distance, in patches and steps, to the nearest predicted token (B, m)."""
    seen = token_positions(context_ids, grid)
    hidden = token_positions(predicted_ids, grid)
    nearest = []
    for a, b in zip(seen, hidden):  # clip by clip: a table of n x m is large
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        nearest.append(distance.amin(1))
    return torch.stack(nearest).rsqrt()


def context_loss(of_context, targets, context_ids, token_weights, loss_exp=1.0):
    """Mean weighted |error|^loss_exp of context tokens (B, n, E). targets: as in masked_loss;
    token_weights (B, n): context_weights."""
    error = of_context.float() - take_tokens(targets, context_ids)
    return (error.abs() ** loss_exp * token_weights.unsqueeze(-1)).mean() / loss_exp


def context_weight_at(step, weight, start, end):
    """Weight of the context loss in step `step` (from 1): 0 for `start` steps, then linear up to
    `weight` after `end` steps."""
    share = (step - 1 - start) / max(end - start, 1)
    if step - 1 >= end:
        share = 1.0
    return weight * max(share, 0.0)


class MeanOfRanks(torch.autograd.Function):
    """The mean of a tensor over all ranks, and of its gradients."""

    @staticmethod
    def forward(ctx, x):
        mean = x.clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return MeanOfRanks.forward(ctx, gradient.contiguous())


def mean_of_ranks(x):
    """The mean of a tensor over all ranks; gradients flow back to all of them."""
    return MeanOfRanks.apply(x) if dist.is_initialized() else x


def sigreg(x, directions, seed):
    """How far vectors x (N, D) are from standard normal ones: a scalar, about 1 if they are
    (sketched isotropic Gaussian regularisation, LeJEPA, arXiv 2511.08544).

    For random unit directions the characteristic function of the projections is compared with that
    of a Gaussian (Epps-Pulley): N times a weighted sum over 17 knots t from 0 to 3. Each step needs
    its own `seed`, which all ranks share. N counts the vectors of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    u = F.normalize(torch.randn(x.shape[1], directions, generator=generator), dim=0)
    t = torch.linspace(0, 3, 17)
    gaussian = torch.exp(-t.square() / 2)
    spacing = torch.full((17,), 2 * 3 / 16)
    spacing[[0, -1]] /= 2

    # float32: cosines of products in bfloat16 would be noise
    with torch.autocast(x.device.type, enabled=False):
        angles = (x.float() @ u.to(x.device)).unsqueeze(-1) * t.to(x.device)  # (N, directions, 17)
        moments_of_rank = torch.stack([angles.cos().mean(0), angles.sin().mean(0)])
        real, imaginary = mean_of_ranks(moments_of_rank)
        error = (real - gaussian.to(x.device)).square() + imaginary.square()
        world = dist.get_world_size() if dist.is_initialized() else 1
        weights = (spacing * gaussian).to(x.device)
        return len(x) * world * (error @ weights).mean()


def variance_and_covariance(x):
    """Two terms against collapse, for features x (n, D) of all ranks (VICReg, arXiv 2105.04906):
    how far the std of a channel is below 1 on average, and the sum of the squared covariances
    between channels, over D."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        mean = mean_of_ranks(x.mean(0))
        centred = x - mean
        covariance = mean_of_ranks(centred.T @ centred / len(x))
    std = (covariance.diag() + 1e-4).sqrt()
    variance_term = F.relu(1 - std).mean()
    off_diagonal = covariance.square().sum() - covariance.diag().square().sum()
    return variance_term, off_diagonal / x.shape[1]


class BatchNorm(nn.Module):
    """Batch norm over the vectors of all ranks (nn.SyncBatchNorm needs a GPU). It serves training
    alone and keeps no running statistics."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        """(N, D) -> (N, D), float32."""
        x = x.float()
        mean, square = mean_of_ranks(torch.stack([x.mean(0), x.square().mean(0)]))
        std = (square - mean.square()).clamp_min(0).add(1e-5).sqrt()
        return (x - mean) / std * self.weight + self.bias


class InverseDynamics(nn.Module):
    """The action between two consecutive steps, from the tokens of both: a regulariser that keeps
    in the features what the player does."""

    def __init__(self, embed_dim, action_dim, grid, width=128, num_heads=4):
        super().__init__()
        self.grid = tuple(grid)
        self.head_dim = width // num_heads
        self.embed = Linear(2 * embed_dim, width)
        self.block = Block(width, num_heads, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.out = Linear(width, action_dim)

    def forward(self, steps):
        """Tokens of steps (B, T, N, E) -> (B, T-1, A)."""
        pairs = torch.cat([steps[:, :-1], steps[:, 1:]], dim=-1).flatten(0, 1)  # (B*(T-1), N, 2E)
        pos = grid_positions(1, *self.grid, pairs.device)[0]
        x, _ = self.block(self.embed(pairs), rope_tables(pos, self.head_dim))
        x = self.out(self.norm(x).mean(1))
        return x.unflatten(0, (len(steps), -1))


def inverse_loss(predicted, actions, continuous, columns=None):
    """Error of predicted actions (B, T-1, A): squared for the first `continuous` dims, which are
    standardised, cross-entropy for keys, which are 0 or 1. columns: indices of the actions that
    were predicted, the continuous ones first; None: all."""
    if columns is not None:
        actions = actions[..., columns]
    predicted = predicted.float()
    loss = F.mse_loss(predicted[..., :continuous], actions[..., :continuous])
    if actions.shape[-1] > continuous:
        keys = F.binary_cross_entropy_with_logits(
            predicted[..., continuous:], actions[..., continuous:]
        )
        loss = loss + keys
    return loss


def encode_levels(encoder, video, ids, levels):
    """Features of the tokens `ids` (None: all), or of these levels of an Encoder21, concatenated:
    (B, n, E * levels)."""
    if levels is None:
        return encoder(video, masks=ids)
    return torch.cat(encoder(video, masks=ids, out_layers=levels), dim=-1)


def encode_clip(encoder, video, encode, ids=None, per_step=None, levels=None):
    """Features of clips (B, 3, F, H, W): (B, T*N, E), or with ids (B, n) those of these tokens
    alone, which then see nothing else. With `levels` those of an Encoder21, side by side.

    encode="clip" encodes whole clips at once, "tubelet" every step alone, as later stages do. Then
    ids must hold `per_step` tokens of each step that they name."""
    if encode == "clip":
        return encode_levels(encoder, video, ids, levels)
    B = len(video)
    tubelet = encoder.tubelet_size
    steps = video.unflatten(2, (-1, tubelet)).transpose(1, 2)  # (B, T, 3, tubelet, H, W)
    if ids is None:
        x = encode_levels(encoder, steps.flatten(0, 1), None, levels)
        return x.unflatten(0, (B, -1)).flatten(1, 2)

    # which steps they name, and which tokens of these
    N = math.prod(video.shape[3:]) // encoder.patch_size**2
    ids = ids.unflatten(1, (-1, per_step))  # (B, steps, per_step)
    named = ids[:, :, 0] // N
    steps = steps[torch.arange(B, device=ids.device)[:, None], named]
    x = encode_levels(encoder, steps.flatten(0, 1), (ids % N).flatten(0, 1), levels)
    return x.unflatten(0, (B, -1)).flatten(1, 2)


def teacher_targets(teacher, video, encode, levels=None):
    """What is predicted: the teacher's features of all tokens of clips, layer-normed without
    weights, (B, L, E) float32. With `levels` each of them is normed by itself, (B, L, E *
    levels)."""
    h = encode_clip(teacher, video, encode, levels=levels)
    if levels is None:
        return normalize_features(h)
    return normalize_features(h.unflatten(-1, (len(levels), -1))).flatten(-2)


class MaskedModel(nn.Module):
    """Everything that masked pretraining trains, as DDP must see it: forward returns the losses.

    `projector` (for SIGReg) and `inverse` (an InverseDynamics) may be None; `inverse_of` are the
    indices of the actions that it predicts (None: all). `decorrelate` says whether variance and
    covariance are wanted, `with_context` whether the context loss is, which needs a
    MaskPredictor21."""

    def __init__(
        self,
        encoder,
        predictor,
        projector,
        inverse,
        *,
        encode="clip",
        loss_exp=1.0,
        directions=256,
        decorrelate=False,
        continuous=4,
        inverse_of=None,
        with_context=False,
    ):
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.projector = projector
        self.inverse = inverse
        self.encode = encode
        self.loss_exp = loss_exp
        self.directions = directions
        self.decorrelate = decorrelate
        self.continuous = continuous
        self.inverse_of = inverse_of
        self.with_context = with_context
        self.levels = encoder.levels if predictor.num_levels > 1 else None

    def forward(self, video, targets, masks, actions=None, seed=0, regularise=True):
        """video (B, 3, F, H, W), the teacher's targets (B, L, E), masks [Mask] of each kind,
        actions (B, T-1, A) -> (6,): the mean masked loss of all kinds, SIGReg, variance,
        covariance, inverse dynamics, the mean context loss; 0 for what is off, and without
        `regularise` for all but the first and the last. `seed` is SIGReg's, of this step."""
        zero = video.new_zeros(())
        losses = dict.fromkeys(("sigreg", "variance", "covariance", "inverse"), zero)

        # the regularisers see what later stages see: every step encoded alone
        tokens = None
        projector = self.projector if regularise else None
        inverse = self.inverse if regularise else None
        decorrelate = self.decorrelate and regularise
        if projector is not None or inverse is not None or decorrelate:
            tokens = encode_clip(self.encoder, video, "tubelet", levels=self.levels)
            T = video.shape[2] // self.encoder.tubelet_size
            last_level = tokens[..., -self.encoder.embed_dim :]
            steps = last_level.unflatten(1, (T, -1))  # (B, T, N, E)
        if projector is not None:
            means = projector(steps.mean(2).flatten(0, 1))
            losses["sigreg"] = sigreg(means, self.directions, seed)
        if decorrelate:
            variance, covariance = variance_and_covariance(last_level.flatten(0, 1))
            losses |= {"variance": variance, "covariance": covariance}
        if inverse is not None:
            predicted = inverse(steps)
            losses["inverse"] = inverse_loss(predicted, actions, self.continuous, self.inverse_of)
        masked = context = zero
        if masks:
            masked, context = self.masked_losses(video, targets, masks, tokens)
        return torch.stack([masked, *losses.values(), context])

    def masked_losses(self, video, targets, masks, tokens=None):
        """The masked and the context loss, means over all kinds of masks. tokens (B, T*N, E): every
        step encoded alone, if that is done already."""
        masked = []
        of_context = []
        for mask in masks:
            if tokens is not None and self.encode == "tubelet" and mask.whole_steps:
                x = take_tokens(tokens, mask.context)  # it is among them
            else:
                x = encode_clip(
                    self.encoder, video, self.encode, mask.context, mask.per_step, self.levels
                )
            predicted = self.predictor(x, mask.context, mask.predicted)
            if isinstance(self.predictor, MaskPredictor21):
                predicted, context = predicted
            masked.append(masked_loss(predicted, targets, mask.predicted, self.loss_exp))
            if self.with_context:
                token_weights = context_weights(mask.context, mask.predicted, self.predictor.grid)
                of_context.append(
                    context_loss(context, targets, mask.context, token_weights, self.loss_exp)
                )
            else:
                of_context.append(video.new_zeros(()))
        return torch.stack(masked).mean(), torch.stack(of_context).mean()


def new_projector(embed_dim, hidden, dim):
    """The MLP before SIGReg. Its batch norm matters: a layer norm there hinders SIGReg (LeWM, arXiv
    2603.19312)."""
    return nn.Sequential(
        nn.Linear(embed_dim, hidden), BatchNorm(hidden), nn.GELU(), nn.Linear(hidden, dim)
    )


# vectors of a batch that are enough for SIGReg, whose cost grows with them
MOST_VECTORS = 1024


class RunningBatchNorm(BatchNorm):
    """A BatchNorm that can be used later: out of training it takes running means and stds."""

    def __init__(self, dim, momentum=0.1):
        super().__init__(dim)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_std", torch.ones(dim))

    def forward(self, x):
        """(N, D) -> (N, D), float32."""
        x = x.float()
        if self.training:
            mean, square = mean_of_ranks(torch.stack([x.mean(0), x.square().mean(0)]))
            std = (square - mean.square()).clamp_min(0).add(1e-5).sqrt()
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_std.lerp_(std.detach(), self.momentum)
        else:
            mean = self.running_mean.float()
            std = self.running_std.float()
        return (x - mean) / std * self.weight + self.bias


class PooledEncoder(nn.Module):
    """An Encoder that gives one vector a step: the mean of its tokens, through an MLP with batch
    norm (LeWM, arXiv 2603.19312, has the class token there). Every step is encoded alone.

    It keeps the contract of encoders in weights.py: a picture of `crop_size` is one patch."""

    def __init__(self, encoder, crop_size):
        super().__init__()
        width = encoder.embed_dim
        hidden = 4 * width
        self.encoder = encoder
        self.projector = nn.Sequential(
            Linear(width, hidden), RunningBatchNorm(hidden), nn.GELU(), Linear(hidden, width)
        )
        self.embed_dim = width
        self.tubelet_size = encoder.tubelet_size
        self.patch_size = crop_size

    def forward(self, video):
        """(B, 3, T*tubelet, H, W) -> (B, T, D)."""
        steps = video.unflatten(2, (-1, self.tubelet_size)).transpose(1, 2)
        means = self.encoder(steps.flatten(0, 1)).mean(1)  # (B*T, D)
        return self.projector(means).unflatten(0, (len(video), -1))


class WorldModel(nn.Module):
    """Encoder and predictor that are trained together, as DDP must see them: forward returns the
    losses (LeWM, arXiv 2603.19312, with patch tokens or one vector a step).

    No gradient is stopped: features become what can be predicted. Nothing else would keep them from
    becoming constant, so that at least one of the other terms is needed. `inverse` (an
    InverseDynamics) may be None; `inverse_of` are the indices of the actions that it predicts
    (None: all); `directions` 0 leaves SIGReg out."""

    def __init__(
        self,
        encoder,
        predictor,
        inverse,
        *,
        encode="tubelet",
        frames_per_step=2,
        auto_steps=1,
        loss_exp=2.0,
        directions=0,
        continuous=4,
        inverse_of=None,
    ):
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.inverse = inverse
        self.encode = encode
        self.frames_per_step = frames_per_step
        self.auto_steps = auto_steps
        self.loss_exp = loss_exp
        self.directions = directions
        self.continuous = continuous
        self.inverse_of = inverse_of

    def forward(self, video, actions, states, seed=0):
        """video (B, T*frames_per_step, 3, H, W) uint8, actions (B, T-1, A), states (B, T, S) ->
        losses (6,): one step ahead, rolled out, SIGReg, variance, covariance, inverse dynamics, 0
        for what is off; and the features (B, T, N, D). `seed` is SIGReg's, of this step."""
        h = encode_steps(self.encoder, video, self.encode, self.frames_per_step).float()
        z = normalize_features(h)
        jloss, sloss = ac_losses(self.predictor, z, actions, states, self.auto_steps, self.loss_exp)

        # the regularisers
        vectors = h.flatten(0, 2)
        variance, covariance = variance_and_covariance(vectors)
        sigreg_loss = z.new_zeros(())
        if self.directions:
            some = vectors[:: math.ceil(len(vectors) / MOST_VECTORS)]
            sigreg_loss = sigreg(some, self.directions, seed)
        inverse = z.new_zeros(())
        if self.inverse is not None:
            inverse = inverse_loss(self.inverse(z), actions, self.continuous, self.inverse_of)
        losses = [jloss, sloss, sigreg_loss, variance, covariance, inverse]
        return torch.stack(losses), h.detach()


def momentum_at(step, total_steps, start, end):
    """The teacher's momentum in step `step` (from 1) of a run: linear from start to end."""
    return start + (end - start) * (step - 1) / max(total_steps - 1, 1)


@torch.no_grad()
def update_teacher(teacher, encoder, momentum):
    """Move the teacher's weights towards the encoder's: an exponential moving average."""
    for mine, other in zip(teacher.parameters(), encoder.parameters(), strict=True):
        if isinstance(mine, DTensor):
            mine = mine.to_local()  # both are sharded alike
            other = other.to_local()
        mine.lerp_(other, 1 - momentum)


@torch.no_grad()
def feature_spread(x):
    """Whether features x (n, D) of all ranks have collapsed: (effective rank, smallest std).

    The effective rank is the participation ratio of the covariance's eigenvalues, (sum)^2 / sum of
    squares: D if all directions vary alike, 1 if only one does. The other number is the std of the
    channel that varies least."""
    x = x.double()
    sums = torch.cat([x.T @ x, x.sum(0, keepdim=True)])
    count = torch.tensor(len(x), dtype=torch.float64, device=x.device)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(count)
    mean = sums[-1] / count
    covariance = sums[:-1] / count - torch.outer(mean, mean)
    rank = covariance.trace().square() / covariance.square().sum().clamp_min(1e-30)
    return rank.item(), covariance.diag().min().clamp_min(0).sqrt().item()


# --- pictures ---


class ConvBlock(nn.Module):
    """Two 3x3 convolutions on top of their input. (B, C, H, W) -> the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.gelu(self.conv1(F.gelu(self.norm(x)))))


def growth_of(factor):
    """By what a grid of patches grows to a picture that is `factor` times as large: (first step,
    number of doublings, last step). The last step makes 4, 2 or 1 pixels of one place, the first
    one takes what is no power of two."""
    last = math.gcd(factor, 4)
    rest = factor // last
    doublings = 0
    while rest % 2 == 0:
        rest //= 2
        doublings += 1
    return rest, doublings, last


class PictureDecoder(nn.Module):
    """Layer-normed features of single steps (B, N, E) -> pictures (B, C, size, size).

    Transformer blocks let the patches of a step agree. Convolutions then double the side of the
    grid until it is a quarter of the picture's, and a last one gives the pixels of each place.
    Every doubling halves the channels, down to `least_width`. The output is added to a mean picture
    (`mean`), so that an untrained decoder shows that."""

    def __init__(
        self, embed_dim, grid, channels, size, width=192, depth=2, num_heads=4, least_width=48
    ):
        super().__init__()
        if size % grid:
            raise ValueError(
                f"a picture of {size} pixels cannot be cut into {grid} x {grid} patches: choose a"
                f" multiple of {grid}"
            )
        self.grid = grid
        self.size = size
        self.embed = Linear(embed_dim, width)
        self.pos = nn.Parameter(torch.zeros(1, grid**2, width))
        self.blocks = nn.ModuleList(Block(width, num_heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

        # from the grid of patches to the picture
        first, doublings, self.last = growth_of(size // grid)
        self.first = first
        self.spread = Linear(width, first**2 * width)
        stages = [ConvBlock(width)]
        for _ in range(doublings):
            narrower = max(width // 2, least_width)
            stages.append(nn.Upsample(scale_factor=2))
            stages.append(nn.Conv2d(width, narrower, 3, padding=1))
            stages.append(ConvBlock(narrower))
            width = narrower
        self.stages = nn.Sequential(*stages)
        self.out = nn.Conv2d(width, channels * self.last**2, 3, padding=1)
        self.register_buffer("mean", torch.zeros(channels, size, size))
        self.activation_checkpointing = False

        # positions as in other transformers, pictures from the mean one on
        init_weights(self, self.blocks)
        nn.init.trunc_normal_(self.pos, std=0.02)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z):
        x = self.embed(z) + self.pos
        for blk in self.blocks:
            x, _ = run_block(self, blk, x)

        # each patch becomes first x first places of the grid
        x = self.spread(self.norm(x)).transpose(1, 2)  # (B, first^2 * width, N)
        x = F.pixel_shuffle(x.unflatten(2, (self.grid, self.grid)), self.first)
        x = self.stages(x)
        x = F.pixel_shuffle(self.out(F.gelu(x)), self.last)  # (B, C, size, size)
        return self.mean + x


def picture_gradients(x):
    """Differences (..., H, W) -> of neighbours below each other, and beside each other."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


class DecoderModel(nn.Module):
    """Losses of a PictureDecoder. One forward gives all: DDP synchronises a single forward.

    noise: features get Gaussian noise of a std drawn from 0 to this for every step, so that
    predictions, which are blurred, decode too. Features are layer-normed, so their own std is 1.
    perceptual: a function from two batches of pictures (B, 3, H, W) in [0, 1] to distances (B,), or
    None."""

    def __init__(self, decoder, noise=0.0, perceptual=None):
        super().__init__()
        self.decoder = decoder
        self.noise = noise
        self.perceptual = perceptual

    def forward(self, z, targets, seed=0):
        """z (B, N, E), targets (B, C, size, size) -> losses (3,): mean absolute error, that of the
        gradients of the picture, and LPIPS (0 without `perceptual`)."""
        if self.noise:
            generator = torch.Generator(z.device).manual_seed(seed)
            std = self.noise * torch.rand(len(z), 1, 1, generator=generator, device=z.device)
            noise = torch.randn(z.shape, generator=generator, device=z.device)
            # predictions are layer-normed, too
            z = normalize_features(z + std * noise)
        return self.losses(self.decoder(z), targets)

    def losses(self, pictures, targets):
        """The three losses of decoded pictures."""
        # edges, where a mean over possible pictures would be grey
        error = (pictures - targets).abs().mean()
        edges = torch.zeros_like(error)
        for a, b in zip(picture_gradients(pictures), picture_gradients(targets)):
            edges = edges + (a - b).abs().mean() / 2

        # what a network for pictures finds different; it sees three channels at once
        distance = torch.zeros_like(error)
        if self.perceptual is not None:
            frames = pictures.unflatten(1, (-1, 3)).flatten(0, 1)
            of_targets = targets.unflatten(1, (-1, 3)).flatten(0, 1)
            distance = self.perceptual(frames, of_targets).mean()
        return torch.stack([error, edges, distance])


class TinyBlock(nn.Module):
    """A residual block of TAESD (madebyollin/taesd, MIT), with its names. With `pooled` a wider
    1x1 part comes first, as in the newer models."""

    def __init__(self, pooled=False, width=64):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    """TAESD's bound on latents, at 3."""

    def forward(self, x):
        return 3 * torch.tanh(x / 3)


class TinyAutoencoder(nn.Module):
    """TAESD: a small autoencoder for pictures, with the names of its files. Latents are an eighth
    of the picture's side."""

    factor = 8

    def __init__(self, channels, pooled=False):
        super().__init__()
        self.channels = channels

        # each halving is a convolution without a bias, then three blocks
        layers = [nn.Conv2d(3, 64, 3, padding=1), TinyBlock()]
        for deep in (False, False, pooled):
            layers.append(nn.Conv2d(64, 64, 3, padding=1, stride=2, bias=False))
            layers += [TinyBlock(deep) for _ in range(3)]
        layers.append(nn.Conv2d(64, channels, 3, padding=1))
        self.encoder = nn.Sequential(*layers)

        # each doubling is three blocks, then a convolution without a bias
        layers = [SoftClamp(), nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU()]
        for deep in (pooled, False, False):
            layers += [TinyBlock(deep) for _ in range(3)]
            layers.append(nn.Upsample(scale_factor=2))
            layers.append(nn.Conv2d(64, 64, 3, padding=1, bias=False))
        layers += [TinyBlock(), nn.Conv2d(64, 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def encode(self, pictures):
        """(B, 3, H, W) in [0, 1] -> latents (B, channels, H / 8, W / 8)."""
        return self.encoder(pictures)

    def decode(self, latents):
        """The inverse; pictures may leave [0, 1] a little."""
        return self.decoder(latents)


class DiffusersPictures(nn.Module):
    """AutoencoderTiny or AutoencoderKL of diffusers, with the interface of TinyAutoencoder."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if hasattr(vae.config, "encoder_block_out_channels"):
            self.factor = 2 ** (len(vae.config.encoder_block_out_channels) - 1)

        # KL latents have any size: their config brings them to a std of 1
        self.is_kl = type(vae).__name__ == "AutoencoderKL"
        self.scale = vae.config.scaling_factor if self.is_kl else 1.0

    def encode(self, pictures):
        encoded = self.vae.encode(2 * pictures - 1)
        latents = encoded.latent_dist.mode() if self.is_kl else encoded.latents
        return latents * self.scale

    def decode(self, latents):
        return self.vae.decode(latents / self.scale).sample / 2 + 0.5


# --- latent actions ---


def kmeans(x, K, generator, iterations=20):
    """K centres (K, D) of x (n, D): k-means++, then Lloyd. An empty cluster keeps its centre."""
    # k-means++: far points are likelier to become the next centre
    first = torch.randint(len(x), (1,), generator=generator)
    centres = x[first.to(x.device)]
    for _ in range(K - 1):
        distance = torch.cdist(x, centres).amin(1).square() + 1e-12
        drawn = torch.multinomial(distance.cpu(), 1, generator=generator)
        centres = torch.cat([centres, x[drawn.to(x.device)]])

    # Lloyd: each centre becomes the mean of its members
    for _ in range(iterations):
        member = F.one_hot(torch.cdist(x, centres).argmin(1), K).to(x)  # (n, K)
        means = member.T @ x / member.sum(0)[:, None].clamp_min(1)
        centres = torch.where(member.any(0)[:, None], means, centres)
    return centres


class VectorQuantizer(nn.Module):
    """K codes for each of `slots` vectors of D dims, kept alive in three ways: `warmup` steps
    without quantisation, then k-means on the last encoder outputs, and codes with less than a tenth
    of their fair share are replaced.

    `codebook` is "ema" (decay 0.99) or "loss" (a gradient). A `shared` table serves all slots. Call
    `update()` once after each optimizer step; it makes the same change on every rank."""

    def __init__(
        self, slots, K, dim, *, codebook="ema", shared=False, kmeans=True, revive=True, warmup=500
    ):
        super().__init__()
        self.tables = 1 if shared else slots
        self.K = K
        self.ema = codebook == "ema"
        self.kmeans = kmeans
        self.revive = revive
        self.warmup = warmup

        table = torch.empty(self.tables, K, dim).uniform_(-1 / K, 1 / K)
        self.codebook = nn.Parameter(table, requires_grad=not self.ema)
        self.register_buffer("mass", torch.ones(self.tables, K))
        self.register_buffer("sums", self.codebook.detach().clone())
        # the last encoder outputs, newest first
        self.register_buffer("recent", torch.zeros(1024, self.tables, dim))
        # number of updates, number of encoder outputs put into `recent`
        self.register_buffer("seen", torch.zeros(2, dtype=torch.long))
        # encoder outputs and their codes since the last update
        self.pending = []

    def active(self):
        """Whether the warm-up is over."""
        return bool(self.seen[0] >= self.warmup)

    def lookup(self, indices):
        """(..., slots) -> (..., slots, D)."""
        rows = indices.reshape(-1, self.tables)
        return self.codebook[torch.arange(self.tables), rows].view(*indices.shape, -1)

    def forward(self, z_e):
        """z_e (..., slots, D) -> (z_q, indices (..., slots), codebook loss, commitment loss) in
        float32. During the warm-up z_q is z_e and both losses are 0."""
        with torch.autocast(z_e.device.type, enabled=False):
            z = z_e.float()
            rows = z.detach().reshape(-1, self.tables, z.shape[-1])
            distance = torch.cdist(rows.transpose(0, 1), self.codebook.detach())
            nearest = distance.argmin(-1).T  # (n, tables)
            indices = nearest.reshape(z.shape[:-1])
            if self.training:
                self.pending.append((rows, nearest))
            if not self.active():
                return z, indices, 0 * self.codebook.sum(), 0 * z.sum()

            # straight-through: the value is z_q's, the gradient goes to z
            z_q = self.lookup(indices)
            straight_through = z + (z_q - z).detach()
            codebook_loss = F.mse_loss(z_q, z.detach())
            commitment_loss = F.mse_loss(z, z_q.detach())
            return straight_through, indices, codebook_loss, commitment_loss

    @torch.no_grad()
    def update(self, settle=False):
        """Change the tables by what all ranks have encoded since the last update. With `settle`,
        for the end of training, dead codes are not replaced any more."""
        counts, sums, total = self._gather()
        step = int(self.seen[0])
        rows = self.recent[: int(self.seen[1])]
        generator = torch.Generator().manual_seed(step)

        if self.kmeans and step == max(self.warmup, 1):
            self._start_from_kmeans(rows, total, generator)
        elif step > self.warmup:
            self._ema(counts, sums)
            if self.revive and not settle:
                self._revive(rows, generator)

    def _gather(self):
        """Over all ranks, how often each code was chosen (tables, K), the sums of the encoder
        outputs that chose it (tables, K, D), and the number of those outputs. Also puts a share of
        every rank's outputs in front of `recent`."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        z = torch.cat([rows for rows, _ in self.pending])  # (n, tables, D)
        nearest = torch.cat([codes for _, codes in self.pending])  # (n, tables)
        self.pending = []

        # counts and sums in one tensor, so ranks add them up in one call
        member = F.one_hot(nearest, self.K).to(z)  # (n, tables, K)
        counts = member.sum(0).unsqueeze(-1)
        sums = torch.einsum("ntk,ntd->tkd", member, z)
        stats = torch.cat([counts, sums], dim=-1)  # (tables, K, 1 + D)
        sample = z[: len(self.recent) // ranks]
        if ranks > 1:
            dist.all_reduce(stats)
            samples = [torch.empty_like(sample) for _ in range(ranks)]
            dist.all_gather(samples, sample.contiguous())
            sample = torch.cat(samples)

        self.recent.copy_(torch.cat([sample, self.recent])[: len(self.recent)])
        self.seen += torch.tensor([1, len(sample)], device=z.device)
        return stats[..., 0], stats[..., 1:], len(z) * ranks

    def _start_from_kmeans(self, rows, total, generator):
        """Every code becomes a centre of the last encoder outputs `rows`, with the same share of
        the `total` outputs of an update."""
        centres = [kmeans(rows[:, t], self.K, generator) for t in range(self.tables)]
        self.codebook.copy_(torch.stack(centres))
        self.mass.fill_(total / self.K)
        self.sums.copy_(self.codebook * self.mass.unsqueeze(-1))

    def _ema(self, counts, sums):
        """Moving averages of counts and sums. With codebook="ema" a code is the mean of the encoder
        outputs that choose it."""
        self.mass.lerp_(counts, 0.01)
        self.sums.lerp_(sums, 0.01)
        if self.ema:
            # Laplace smoothing: a code that nobody chooses does not divide by zero
            total = self.mass.sum(1, keepdim=True)
            smooth = (self.mass + 1e-5) * total / (total + self.K * 1e-5)
            self.codebook.copy_(self.sums / smooth.unsqueeze(-1))

    def _revive(self, rows, generator):
        """Codes with less than a tenth of their fair share become random ones of the last encoder
        outputs `rows`, with a fair share."""
        total = self.mass.sum(1, keepdim=True)
        dead = self.mass < 0.1 * total / self.K
        for t, code in dead.nonzero().tolist():
            drawn = torch.randint(len(rows), (1,), generator=generator).item()
            self.codebook[t, code] = rows[drawn, t]
            self.mass[t, code] = total[t, 0] / self.K
            self.sums[t, code] = self.codebook[t, code] * self.mass[t, code]


class FiniteScalars(nn.Module):
    """FSQ (arXiv 2309.15505): each slot is one bounded number, rounded to K levels. There is no
    table to keep alive."""

    def __init__(self, K, dim):
        super().__init__()
        self.K = K
        self.down = nn.Linear(dim, 1)
        self.up = nn.Linear(1, dim)

    def lookup(self, indices):
        """(..., slots) -> (..., slots, D)."""
        return self.up(2 * indices.unsqueeze(-1).float() / (self.K - 1) - 1)

    def forward(self, z_e):
        """As VectorQuantizer; both losses are 0."""
        x = (self.down(z_e).float().tanh() + 1) * (self.K - 1) / 2  # (..., slots, 1), 0 to K-1
        indices = x.detach().round()
        straight_through = x + (indices - x).detach()
        z_q = self.lookup(straight_through.squeeze(-1))
        return z_q, indices.squeeze(-1).long(), 0 * x.sum(), 0 * x.sum()


def attend(layer, x, causal=False):
    """Attention by the weights of an `Attention` layer over x (B, L, D), without positions."""
    qkv = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, nh, L, hd)
    x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return layer.proj(x.transpose(1, 2).flatten(2))


class SpaceTimeBlock(nn.Module):
    """Causal attention of each patch over time, a depthwise 3x3 convolution (it tells neighbours
    apart; LAPA's PEG), attention inside each step, MLP.

    The tokens of a step are `extra` others, then H x W patches. With a condition (B, T, A), tokens
    are first scaled and moved by it."""

    def __init__(self, dim, num_heads, grid, extra=0, condition=0):
        super().__init__()
        self.grid = grid
        self.extra = extra
        self.norm0 = nn.LayerNorm(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.time = Attention(dim, num_heads)
        self.attn = Attention(dim, num_heads)
        self.mlp = MLP(dim, 4 * dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        if condition:
            self.film = nn.Linear(condition, 2 * dim)
            nn.init.zeros_(self.film.weight)

    def forward(self, x, condition=None):
        """x (B, T, S, D) -> the same shape."""
        B, T, S, _ = x.size()
        if condition is not None:
            scale, move = self.film(condition).unsqueeze(2).chunk(2, dim=-1)
            x = x * (1 + scale) + move

        # over time
        h = self.norm0(x).transpose(1, 2).flatten(0, 1)  # (B*S, T, D)
        h = attend(self.time, h, causal=True)
        x = x + h.unflatten(0, (B, S)).transpose(1, 2)

        # inside each step; only patches have neighbours
        x = x.flatten(0, 1)  # (B*T, S, D)
        patches = x[:, self.extra :].transpose(1, 2).unflatten(2, self.grid)
        near = self.conv(patches).flatten(2).transpose(1, 2)
        x = x + F.pad(near, (0, 0, self.extra, 0))
        x = x + attend(self.attn, self.norm1(x))
        return (x + self.mlp(self.norm2(x))).unflatten(0, (B, T))


def moved(x, move, kind="wrap"):
    """Pictures x (n, ..., H, W), each moved by its own `move` (n, 2) pixels, down and right. What
    leaves at an edge enters at the other one ("wrap"), or pictures continue as in a mirror
    ("reflect")."""
    # from which row and which column each pixel comes
    for axis, distance in ((-2, move[:, :1]), (-1, move[:, 1:])):
        length = x.shape[axis]
        source = torch.arange(length, device=x.device) - distance  # (n, length)
        if kind == "reflect":
            source = source % (2 * length)
            source = torch.minimum(source, 2 * length - 1 - source)
        source = source % length
        shape = [len(x)] + [1] * (x.ndim - 1)
        shape[axis] = length
        x = x.gather(axis, source.view(shape).expand_as(x))
    return x


def nearby(length, reach, device):
    """For each place of a line of `length`, which begins again at its end: the places at most
    `reach` before and behind it (length, 2 reach + 1), that behind it first."""
    places = torch.arange(length, device=device)
    return (places[:, None] - torch.arange(-reach, reach + 1, device=device)) % length


def match(before, after, reach, patch_size):
    """How well each patch of `after` (n, C, H, W) fits to `before`, moved by at most `reach`
    pixels, around the edges: (n, N, (2 reach + 1)^2), the first of which are moves up. About 1
    where a patch comes from. FlowNet's correlation (arXiv 1504.06852), of whole patches."""
    n, C, H, W = after.size()
    columns = nearby(W, reach, after.device).expand(n, H, -1, -1)
    rows = after.permute(0, 2, 3, 1)  # (n, H, W, C)

    # products of each pixel and those of one row of `before`, from which the near ones are kept
    products = []
    for down in range(-reach, reach + 1):
        others = torch.roll(before, down, 2).transpose(1, 2)  # (n, H, C, W)
        products.append((rows @ others).gather(3, columns))
    products = torch.cat(products, dim=3).permute(0, 3, 1, 2) / C

    # relative to the energy of the patch; a patch without structure fits to none
    fits = F.avg_pool2d(products, patch_size).flatten(2).transpose(1, 2)
    energy = F.avg_pool2d(after.square().mean(1, keepdim=True), patch_size).flatten(2)
    energy = energy.transpose(1, 2)
    return fits / (energy + 0.1 * energy.mean(1, keepdim=True) + 1e-6)


def mix_columns(z, weights):
    """Pictures z (n, C, H, W), each pixel a mixture of those left and right of it, around the
    edges. weights (n, H, W, 2 reach + 1), the first is that of the rightmost."""
    # as attention: a matrix for each row of pixels, zero beyond reach
    n, H, W, K = weights.size()
    source = nearby(W, K // 2, z.device).expand(n, H, -1, -1)
    matrix = weights.new_zeros(n, H, W, W).scatter_add(3, source, weights)
    return (matrix @ z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LatentActionModel(nn.Module):
    """Latent actions of video-VAE latents z (B, T, C, H, W).

    The encoder describes what happened from step t to t+1 by `num_codes` codes of `num_embeddings`
    each. The decoder predicts z_t+1 from z_<=t and those codes, in the same way in training,
    rollout and generation.

    The encoder sees one pair of steps at a time: no code knows the future or how its clip began. In
    training both steps of a pair are moved by a random `shift`, the decoder's input is not:
    otherwise a code can name places instead of motion. Errors are of standardised latents.

    `warp` says how the decoder can move what the last step shows, by at most `reach` latent pixels:
    "neighbours" (each pixel is a mixture of those around it, of rows and columns in turn), "flow"
    (each pixel is read at one place nearby, between pixels if need be) or "none". With `reach` the
    encoder also sees how well each patch fits to the step before it, at each place within reach.
    Both are needed where the whole picture moves: patches do not hold enough to draw it again."""

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
        warp="none",
        reach=0,
        shift_kind="patches",
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
        self.patch_size = patch_size
        self.warp = warp
        self.reach = reach
        self.shift_kind = shift_kind
        self.num_codes = num_codes
        self.commitment_weight = commitment_weight
        self.rollout_horizon = rollout_horizon
        N = math.prod(self.grid)

        # from latents to patch tokens
        self.register_buffer("scale", torch.tensor([mean, std]))
        self.adapter = nn.Conv2d(channels, patch_dim, patch_size, patch_size)
        self.encoder_embed = nn.Linear(2 * patch_dim, embed_dim)
        self.decoder_embed = nn.Linear(patch_dim, embed_dim)
        self.encoder_pos = nn.Parameter(0.02 * torch.randn(N, embed_dim))
        self.decoder_pos = nn.Parameter(0.02 * torch.randn(N, embed_dim))

        # from a pair of steps to its codes
        self.query = nn.Parameter(0.02 * torch.randn(num_codes, embed_dim))
        self.encoder = nn.ModuleList(
            SpaceTimeBlock(embed_dim, num_heads, self.grid, num_codes) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(embed_dim)
        self.to_code = nn.Linear(embed_dim, codebook_dim)

        # without a quantizer codes are continuous: the upper bound
        self.quantizer = None
        if quantizer == "vq":
            self.quantizer = VectorQuantizer(
                num_codes,
                num_embeddings,
                codebook_dim,
                codebook=codebook,
                shared=shared_codebook,
                kmeans=kmeans,
                revive=revive,
                warmup=vq_warmup_steps,
            )
        elif quantizer == "fsq":
            self.quantizer = FiniteScalars(num_embeddings, codebook_dim)

        # from a step and its codes to the next step
        width = num_codes * codebook_dim
        self.decoder = nn.ModuleList(
            SpaceTimeBlock(embed_dim, num_heads, self.grid, 0, width) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(embed_dim)
        self.decoder_out = nn.Linear(embed_dim, patch_dim)
        self.out_adapter = nn.ConvTranspose2d(patch_dim, channels, patch_size, patch_size)

        # where things went, and where they come from
        self.match_embed = nn.Linear((2 * reach + 1) ** 2, embed_dim) if reach else None
        places = {"none": 0, "neighbours": 2 * (2 * reach + 1), "flow": 2}[warp]
        if warp != "none":
            self.warp_out = nn.Linear(embed_dim, places * patch_size**2)

            # at first things tend to stay where they are. Not more than that: a neighbour that has
            # next to no weight gets next to no gradient
            nn.init.zeros_(self.warp_out.bias)
            if warp == "neighbours":
                with torch.no_grad():
                    self.warp_out.bias.view(2, 2 * reach + 1, -1)[:, reach] = 2

    def normalize(self, z):
        """Latents -> standardised latents."""
        return (z.float() - self.scale[0]) / self.scale[1]

    def patches(self, z):
        """Standardised latents (B, T, C, H, W) -> (B, T, N, patch_dim)."""
        x = self.adapter(z.flatten(0, 1))
        return x.flatten(2).transpose(1, 2).unflatten(0, z.shape[:2])

    def encode_pairs(self, z, shift=None):
        """Standardised z (B, T, C, H, W) -> z_e (B, T-1, num_codes, codebook_dim), not quantised.
        `shift` (B, T-1, 2) moves each pair by that many latent pixels, down and right."""
        B, T = z.shape[:2]
        pairs = torch.stack([z[:, :-1], z[:, 1:]], dim=2).flatten(0, 1)  # (n, 2, C, H, W)
        if shift is not None:
            pairs = moved(pairs, shift.flatten(0, 1), self.shift_kind)
        x = self.patches(pairs)  # (n, 2, N, patch_dim)

        # each step beside the one before it, so the encoder need not learn to compare the same
        # patch of two steps; the first step is beside zeros
        before = F.pad(x[:, :1], (0, 0, 0, 0, 1, 0))
        h = self.encoder_embed(torch.cat([x, before], dim=-1)) + self.encoder_pos

        # and where each of its patches was before
        if self.reach:
            with torch.no_grad():
                fits = match(pairs[:, 0], pairs[:, 1], self.reach, self.patch_size)
            h = h + F.pad(self.match_embed(fits).unsqueeze(1), (0, 0, 0, 0, 1, 0))

        # codes are read from the query tokens of the second step
        h = torch.cat([self.query.expand(len(h), 2, -1, -1), h], dim=2)
        for blk in self.encoder:
            h = run_block(self, blk, h)
        z_e = self.to_code(self.encoder_norm(h[:, 1, : self.num_codes]))
        return z_e.unflatten(0, (B, T - 1)).float()

    def quantize_pairs(self, z, shift=None):
        """Standardised z (B, T, C, H, W) -> z_e, z_q (B, T-1, num_codes, codebook_dim), indices (B,
        T-1, num_codes), codebook loss, commitment loss."""
        z_e = self.encode_pairs(z, shift)
        if self.quantizer is not None:
            return z_e, *self.quantizer(z_e)
        indices = torch.zeros(z_e.shape[:-1], dtype=torch.long, device=z_e.device)
        return z_e, z_e, indices, 0 * z_e.sum(), 0 * z_e.sum()

    def predict(self, z, codes):
        """Standardised z (B, T, C, H, W), codes (B, T, num_codes, codebook_dim) -> the step after
        each of z."""
        h = self.decoder_embed(self.patches(z)) + self.decoder_pos
        for blk in self.decoder:
            h = run_block(self, blk, h, codes.flatten(2).to(h.dtype))
        h = self.decoder_norm(h).flatten(0, 1)  # (B*T, N, embed_dim)

        # what moves, then what changes
        z = self.carry(z.flatten(0, 1), h).unflatten(0, z.shape[:2])
        change = self.decoder_out(h).transpose(1, 2).unflatten(2, self.grid)
        return z + self.out_adapter(change).unflatten(0, z.shape[:2]).float()

    def carry(self, z, h):
        """Steps z (n, C, H, W), moved as decoder tokens h (n, N, embed_dim) say, around the
        edges."""
        if self.warp == "none":
            return z
        places = self.warp_out(h).float().transpose(1, 2).unflatten(2, self.grid)
        places = F.pixel_shuffle(places, self.patch_size)  # (n, numbers of a pixel, H, W)

        # a mixture of the pixels above and below, then of those left and right
        if self.warp == "neighbours":
            vertical, horizontal = places.chunk(2, dim=1)
            z = mix_columns(z.transpose(2, 3), vertical.softmax(1).permute(0, 3, 2, 1))
            return mix_columns(z.transpose(2, 3), horizontal.softmax(1).permute(0, 2, 3, 1))

        # one place: the picture is continued around its edges, then read between its pixels
        H, W = z.shape[2:]
        r = self.reach
        wide = F.pad(z, (r, r, r, r), mode="circular")
        rows = torch.arange(H, device=z.device).view(H, 1) + r + r * places[:, 0].tanh()
        columns = torch.arange(W, device=z.device) + r + r * places[:, 1].tanh()
        where = torch.stack(
            [(2 * columns + 1) / (W + 2 * r) - 1, (2 * rows + 1) / (H + 2 * r) - 1], dim=-1
        )
        return F.grid_sample(wide, where, align_corners=False)

    def codes(self, indices):
        """Indices -> vectors. Those of a continuous model are vectors already."""
        return indices if indices.is_floating_point() else self.quantizer.lookup(indices)

    def encode(self, z, shift=None):
        """z (B, T, C, H, W) -> indices (B, T-1, num_codes), z_e and z_q (B, T-1, num_codes,
        codebook_dim)."""
        z_e, z_q, indices, _, _ = self.quantize_pairs(self.normalize(z), shift)
        return indices, z_e, z_q

    def decode(self, z, indices):
        """Steps z (B, T, C, H, W), or one step (B, C, H, W), and the codes of each -> the step
        after each, of the same shape."""
        if z.ndim == 4:
            return self.decode(z.unsqueeze(1), indices.unsqueeze(1)).squeeze(1)
        return self.predict(self.normalize(z), self.codes(indices)) * self.scale[1] + self.scale[0]

    def rollout(self, z_0, indices):
        """z_0 (B, C, H, W) and the codes of K steps (B, K, num_codes) -> those steps (B, K, C, H,
        W), on the model's own predictions."""
        z = self.normalize(z_0).unsqueeze(1)
        codes = self.codes(indices)
        for k in range(codes.shape[1]):
            last = self.predict(z, codes[:, : k + 1])[:, -1:]
            z = torch.cat([z, last], dim=1)
        return z[:, 1:] * self.scale[1] + self.scale[0]

    def forward(self, z, shift=None):
        """z (B, T, C, H, W) -> {loss, mse, mae, codebook, commitment, rollout, indices (B, T-1,
        num_codes)}.

        rollout: MSE of the 2nd to `rollout_horizon`-th pass of the decoder, each on the predictions
        of the pass before. Pass k is k steps ahead, from every step."""
        horizon = self.rollout_horizon
        if z.shape[1] <= horizon:
            raise ValueError(
                f"--rollout_horizon {horizon} needs windows of {horizon + 1} steps,"
                f" --sequence_length is {z.shape[1]}"
            )

        # one step ahead
        z = self.normalize(z)
        _, z_q, indices, codebook, commitment = self.quantize_pairs(z, shift)
        prediction = self.predict(z[:, :-1], z_q)
        mse = F.mse_loss(prediction, z[:, 1:])
        mae = F.l1_loss(prediction, z[:, 1:])

        # further ahead
        ahead = prediction
        rollout = 0 * prediction.sum()
        for k in range(1, horizon):
            ahead = self.predict(torch.cat([z[:, :1], ahead[:, :-1]], dim=1), z_q)
            rollout = rollout + F.mse_loss(ahead[:, k:], z[:, k + 1 :]) / (horizon - 1)

        return {
            "loss": mse + codebook + self.commitment_weight * commitment + rollout,
            "mse": mse,
            "mae": mae,
            "codebook": codebook,
            "commitment": commitment,
            "rollout": rollout,
            "indices": indices,
        }


# --- LoRA ---

# target -> its layer in a block, and which third of that layer's outputs it is (None: all)
TARGETS = {
    "q_proj": ("attn.qkv", 0),
    "k_proj": ("attn.qkv", 1),
    "v_proj": ("attn.qkv", 2),
    "o_proj": ("attn.proj", None),
    "mlp.fc1": ("mlp.fc1", None),
    "mlp.fc2": ("mlp.fc2", None),
}

# condition encoders, which are trained whole beside the adapters
CONDITION = ("action_encoder", "state_encoder")


class LoRALinear(Linear):
    """A frozen linear layer and its low-rank update, W + scale B A (arXiv 2106.09685). A (r, in)
    starts with Kaiming's initialisation and B (out, r) with zeros; both are fp32.

    scale is alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), or alpha / r without rslora. `thirds` names
    k of the three parts of a fused qkv, and each gets its own update: A (k r, in), B (k, out / 3,
    r). Weight and bias keep their names."""

    # whether the update is in the weight already, whether it is left out
    merged = False
    off = False

    def __init__(self, base, r, alpha, dropout=0.0, rslora=True, qkv_parts=None):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight = base.weight.requires_grad_(False)
        self.bias = base.bias.requires_grad_(False)
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.rslora = rslora
        self.qkv_parts = qkv_parts
        self.scale = alpha / (math.sqrt(r) if rslora else r)

        device = base.weight.device
        A_shape = (r, base.in_features)
        B_shape = (base.out_features, r)
        if qkv_parts:
            A_shape = (len(qkv_parts) * r, base.in_features)
            B_shape = (len(qkv_parts), base.out_features // 3, r)
        self.lora_A = nn.Parameter(torch.empty(A_shape, device=device))
        self.lora_B = nn.Parameter(torch.zeros(B_shape, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def full_B(self):
        """B as one matrix (out, rows of A). With thirds it is block-diagonal, and the parts without
        an update are zero."""
        if not self.qkv_parts:
            return self.lora_B
        full = self.lora_B.new_zeros(3, self.out_features // 3, len(self.qkv_parts), self.r)
        full[list(self.qkv_parts), :, list(range(len(self.qkv_parts)))] = self.lora_B
        return full.view(self.out_features, -1)

    def full_update(self):
        """scale B A in float64: a GPU may multiply fp32 matrices in TF32."""
        return self.scale * (self.full_B().double() @ self.lora_A.double())

    def full_weight(self):
        """W + scale B A, in the dtype of W."""
        return (self.weight.double() + self.full_update()).to(self.weight.dtype)

    def forward(self, x):
        """(..., in) -> (..., out)."""
        if self.merged or self.off:
            return super().forward(x)

        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        dropped = None
        if self.training and self.dropout:
            dropped = F.dropout(x, self.dropout).flatten(0, -2)

        rows = x.flatten(0, -2)
        B = self.full_B()
        y = low_rank(rows, dropped, self.weight, self.bias, self.lora_A, B, self.scale)
        return y.view(*x.shape[:-1], -1)


def lora_layers(model):
    """{name: layer} of the adapted layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextlib.contextmanager
def without_lora(model):
    """The model as it was before add_lora, with its adapters switched off."""
    for m in lora_layers(model).values():
        m.off = True
    yield
    for m in lora_layers(model).values():
        m.off = False


def wrap_with_lora(model, name, r, alpha, dropout, rslora=True, qkv_parts=None):
    """Replace the layer `name` of a model by a LoRALinear around it, and return that."""
    parent, _, last = name.rpartition(".")
    layer = LoRALinear(model.get_submodule(name), r, alpha, dropout, rslora, qkv_parts)
    setattr(model.get_submodule(parent), last, layer)
    return layer


def add_lora(
    model, targets=tuple(TARGETS), r=16, alpha=32, dropout=0.0, rslora=True, fused_qkv=False
):
    """Freeze a predictor and put adapters of rank r on the targets of all its blocks. `fused_qkv`
    shares one adapter among q, k and v. Returns the number of trainable parameters."""
    unknown = set(targets) - set(TARGETS)
    if unknown:
        raise ValueError(
            f"LoRA targets {', '.join(sorted(unknown))} are unknown, choose from:"
            f" {', '.join(TARGETS)}"
        )
    if not targets or r < 1:
        raise ValueError(
            f"LoRA with r={r} on {len(targets)} targets adapts nothing: give r >= 1 and a target"
        )
    if lora_layers(model):
        raise ValueError("this model has LoRA adapters already: adapt a model once")

    qkv_parts = tuple(sorted(TARGETS[t][1] for t in targets if TARGETS[t][1] is not None))
    if fused_qkv and len(qkv_parts) in (1, 2):
        raise ValueError(
            "--fused_qkv is one adapter for q, k and v: name all three as targets, or none"
        )

    # q, k and v are one layer: each layer once, in the order of the targets
    layers = list(dict.fromkeys(TARGETS[t][0] for t in targets))
    model.requires_grad_(False)
    for i in range(len(model.predictor_blocks)):
        for layer in layers:
            separate = qkv_parts if layer == "attn.qkv" and not fused_qkv else None
            name = f"predictor_blocks.{i}.{layer}"
            wrap_with_lora(model, name, r, alpha, dropout, rslora, separate)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def merge_lora(model):
    """Add the adapters to the weights, computed in float64. ValueError if that is done already."""
    layers = lora_layers(model).values()
    if not layers or any(m.merged for m in layers):
        raise ValueError("no adapters to merge: there are none, or they are merged already")
    for m in layers:
        m.weight.copy_(m.full_weight())
        m.merged = True


@torch.no_grad()
def merged_state(model):
    """The state dict of the plain predictor that equals an adapted one. The model is not
    changed."""
    state = {k: v for k, v in model.state_dict().items() if "lora_" not in k.rpartition(".")[2]}
    for name, m in lora_layers(model).items():
        if not m.merged:
            state[f"{name}.weight"] = m.full_weight()
    return state
