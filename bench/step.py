"""One training step (encode, teacher forcing, rollout, backward, update) against the same step
written as the reference writes it.

    python -m bench.step                         # CPU: vit_tiny, a 6-layer 384-wide predictor, 128 px, T=8, batch 4, fp32
    python -m bench.step --encoder vit_large_16 --crop_size 256 --pred_dim 1024 --pred_depth 24 --pred_heads 16 --batch_size 8 \\
        --dtype bfloat16                         # a GPU: the released ViT-L's sizes, random weights

The baseline does what vjepa2's app/vjepa_droid does, in plain PyTorch, on the same weights: a dense
mask over all tokens, RoPE angles rebuilt in every layer, q, k, v of each condition token projected
apart from the patches', the rollout from scratch, losses read back to the host every step, AdamW
without fusion. Its losses and gradients are compared with ours before anything is timed. Useful
FLOPs: 2 a weight and token forward, 4 backward, and the attention scores that the mask lets
through; `of matmul` is of a large one timed in the run. """

import argparse
import contextlib
import copy
import math

import torch
import torch.nn.functional as F

import bench
from model import IMAGENET_MEAN, IMAGENET_STD, ACModel, Predictor, make_features_of
from weights import ARCHITECTURES, build_encoder


def dense(layer, x):
    """Plain F.linear: our layers would take the faster matmul library on their own."""
    return F.linear(x, layer.weight, layer.bias)


def rotate(x, pos):
    """x (B, nh, L, d) turned by the angles of integer positions (L,), all of them computed here."""
    omega = 1.0 / 10000 ** (
        torch.arange(x.shape[-1] // 2, dtype=x.dtype, device=x.device) / (x.shape[-1] / 2)
    )
    angle = torch.einsum("l,f->lf", pos.to(x.dtype), omega)
    sin, cos = (t.repeat(1, 2) for t in (angle.sin(), angle.cos()))
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-x2, x1), dim=-1).flatten(-2) * sin


def rotate_all(x, *positions):
    """The leading dims by time, the next by row, the next by column; the rest stay."""
    d = x.shape[-1] // 3 // 2 * 2
    parts = [rotate(x[..., i * d : (i + 1) * d], pos) for i, pos in enumerate(positions)]
    return torch.cat([*parts, x[..., len(parts) * d :]], dim=-1)


def attention(layer, x, T, H, W, conditions=0, mask=None):
    """One attention layer on (B, T*(conditions + H*W), D), as the reference computes it."""
    token = torch.arange(T * H * W, device=x.device)
    positions = token // (H * W), token % (H * W) // W, token % W

    def project(tokens, *pos):
        q, k, v = (
            dense(layer.qkv, tokens).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        return rotate_all(q, *pos), rotate_all(k, *pos), v

    if conditions:
        steps = x.unflatten(1, (T, -1))
        apart = [
            project(steps[:, :, i], torch.arange(T, device=x.device)) for i in range(conditions)
        ]
        patches = project(steps[:, :, conditions:].flatten(1, 2), *positions)
        qkv = [
            torch.cat(
                [torch.stack([a[i] for a in apart], dim=3), patches[i].unflatten(2, (T, -1))], dim=3
            ).flatten(2, 3)
            for i in range(3)
        ]
    else:
        qkv = project(x, *positions)
    out = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    return dense(layer.proj, out.transpose(1, 2).flatten(2))


def blocks(layers, x, *args):
    for blk in layers:
        x = x + attention(blk.attn, blk.norm1(x), *args)
        x = x + dense(blk.mlp.fc2, F.gelu(dense(blk.mlp.fc1, blk.norm2(x))))
    return x


@torch.no_grad()
def reference_encode(encoder, video):
    """uint8 (B, T*2, 3, H, W) -> layer-normed features (B, T, N, D), each step alone."""
    B, frames = video.shape[:2]
    mean, std = (
        torch.tensor(c, device=video.device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD)
    )
    clip = (
        ((video.float() / 255 - mean) / std)
        .unflatten(1, (frames // 2, 2))
        .flatten(0, 1)
        .transpose(1, 2)
    )
    x = encoder.patch_embed(clip)
    _, _, T, H, W = x.size()
    h = encoder.norm(blocks(encoder.blocks, x.flatten(2).transpose(1, 2), T, H, W))
    return F.layer_norm(h.float(), h.shape[-1:]).view(B, frames // 2, H * W, -1)


def reference_predict(predictor, z, actions, states, mask):
    """(B, T, N, E) -> the layer-normed prediction of the next steps; `mask` is cut from the one for
    the longest clip."""
    B, T = z.shape[:2]
    tokens = torch.stack(
        [predictor.action_encoder(actions[:, :T]), predictor.state_encoder(states[:, :T])], dim=2
    )
    x = torch.cat([tokens, dense(predictor.predictor_embed, z)], dim=2).flatten(1, 2)
    mask = mask[: x.shape[1], : x.shape[1]].to(x.device, non_blocking=True)
    x = blocks(predictor.predictor_blocks, x, T, *predictor.grid, 2, mask)
    x = x.unflatten(1, (T, -1))[:, :, 2:]
    return F.layer_norm(
        dense(predictor.predictor_proj, predictor.predictor_norm(x)).float(), z.shape[-1:]
    )


def reference_losses(predictor, z, actions, states, mask):
    z_tf = reference_predict(predictor, z[:, :-1], actions, states, mask)
    start = torch.cat([z[:, :1], z_tf[:, :1]], dim=1)
    z_ar = torch.cat(
        [z_tf[:, :1], reference_predict(predictor, start, actions, states, mask)[:, -1:]], dim=1
    )
    return (z_tf - z[:, 1:]).abs().mean(), (z_ar - z[:, 1:3]).abs().mean()


def useful_flops(encoder, predictor, B, T):
    """(encoder, predictor) of one step: forward; T-1 steps of teacher forcing and one of rollout,
    forward and backward."""

    def weights(blocks):
        return sum(p.numel() for p in blocks.parameters() if p.dim() > 1)

    N = math.prod(predictor.grid)
    D = encoder.embed_dim
    width = predictor.predictor_embed.out_features
    encode = (
        B
        * T
        * N
        * (
            2 * (weights(encoder.blocks) + weights(encoder.patch_embed))
            + 4 * D * N * len(encoder.blocks)
        )
    )
    scores = 4 * width * (N + 2) ** 2 * len(predictor.predictor_blocks) * B * ((T - 1) * T / 2 + 2)
    tokens = (
        2 * weights(predictor.predictor_blocks) * (N + 2) + 4 * D * width * N
    )  # of a step; embedding and projection see patches
    return encode, 3 * B * T * tokens + 3.5 * scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag(
        "--encoder",
        default="vit_tiny",
        choices=ARCHITECTURES,
        help="architecture of the frozen encoder, random weights",
    )
    flag("--crop_size", type=int, default=128, help="pixels of a frame")
    flag("--steps", type=int, default=8, help="steps T of a clip, two frames each")
    flag("--batch_size", type=int, default=4, help="clips of a step")
    flag("--pred_dim", type=int, default=384, help="width of the predictor")
    flag("--pred_depth", type=int, default=6, help="blocks of the predictor")
    flag("--pred_heads", type=int, default=6, help="attention heads of the predictor")
    flag(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="autocast precision of both; our encoder's weights too",
    )
    flag(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time train_ac.py --compile too",
    )
    flag("--repeats", type=int, default=10, help="steps timed of each")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    T = args.steps
    B = args.batch_size
    torch.manual_seed(0)
    encoder, grid = build_encoder(args.encoder).to(device), args.crop_size // 16
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    base = Predictor(encoder.embed_dim, 13, 2, (grid, grid), **size).to(device)
    video = torch.randint(256, (B, 2 * T, 3, args.crop_size, args.crop_size), dtype=torch.uint8)
    batch = {"video": video, "actions": torch.randn(B, T - 1, 13), "states": torch.randn(B, T, 2)}
    step_of = torch.arange(T * (grid * grid + 2)) // (grid * grid + 2)
    mask = step_of[None, :] <= step_of[:, None]

    def autocast():
        return (
            torch.autocast(device.type, dtype)
            if args.dtype != "float32"
            else contextlib.nullcontext()
        )

    def reference_step():
        def step(update=True):
            inputs = {k: v.to(device) for k, v in batch.items()}
            with autocast():
                z = reference_encode(encoder, inputs["video"])
                jloss, sloss = reference_losses(
                    predictor, z, inputs["actions"], inputs["states"], mask
                )
            (jloss + sloss).backward()
            if update:
                optimizer.step()
                optimizer.zero_grad()
            return jloss.item(), sloss.item()

        predictor = copy.deepcopy(base)
        optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-4)
        return predictor, step

    def our_step(compiled):
        def step(update=True):
            z, actions, states = inputs(batch)
            with autocast():
                jloss, sloss = model(z, actions, states)
            (jloss + sloss).backward()
            if update:
                optimizer.step()
                optimizer.zero_grad()
            return jloss.detach(), sloss.detach()

        model, frozen = ACModel(copy.deepcopy(base)), copy.deepcopy(encoder).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if compiled:
            model.compile(dynamic=False)
            frozen.compile(dynamic=False)
        inputs = make_features_of(
            frozen, "tubelet", 2, {"mean": None, "std": None}, device, autocast
        )
        return model.predictor, step

    calls, wanted = {}, None
    for name in ("reference", "ours", "ours, --compile")[: 3 if args.compile else 2]:
        predictor, step = our_step(name != "ours") if name != "reference" else reference_step()
        losses = torch.tensor([float(x) for x in step(update=False)])
        grads = torch.cat([p.grad.flatten() for p in predictor.parameters()])
        wanted = wanted or (losses, grads)
        off = (
            ((losses - wanted[0]) / wanted[0]).abs().max().item(),
            ((grads - wanted[1]).norm() / wanted[1].norm()).item(),
        )
        print(f"{name}: losses {losses.tolist()}, off by {off[0]:.1e}, gradients by {off[1]:.1e}")
        if max(off) > (1e-5 if args.dtype == "float32" else 5e-2):
            raise SystemExit(f"{name} computes something else than the reference")
        predictor.zero_grad()
        calls[name] = step
    seconds = bench.medians(calls, device, args.repeats)
    useful, ceiling = sum(useful_flops(encoder, base, B, T)), bench.ceilings(device, dtype)[0]
    rows = [
        {
            "step": k,
            "ms": 1e3 * s,
            "clips/s": B / s,
            "reference / it": seconds["reference"] / s,
            "useful TFLOP/s": useful / s / 1e12,
            "of matmul": useful / s / ceiling,
        }
        | bench.peak_memory(calls[k], device)
        for k, s in seconds.items()
    ]
    bench.report(rows, args.json, device)
