"""How long does one training step take, against the same step as the reference writes it?

    python -m bench.step             # CPU: vit_tiny, a 6-layer 384-wide predictor, 128 px, fp32
    python -m bench.step --encoder vit_large_16 --crop_size 256 --pred_dim 1024 --pred_depth 24 \\
        --pred_heads 16 --batch_size 8 --dtype bfloat16     # a GPU: the released ViT-L's sizes

A step encodes, predicts with teacher forcing and in a rollout, goes backward and updates. Prints a
row for the reference, for ours and for ours with --compile: milliseconds, clips/s, the
reference's time over it, useful FLOP/s, and their share of a large matmul timed in the run. Weights
are random.

The baseline does what vjepa2's app/vjepa_droid does, in plain PyTorch, on the same weights: a dense
mask over all tokens, RoPE angles rebuilt in every layer, q, k, v of each condition token projected
apart from the patches', the rollout from scratch, losses read back to the host every step, AdamW
without fusion. Its losses and gradients are compared with ours before anything is timed.

Useful FLOPs are 2 for each weight and token forward and 4 backward, and those of the attention
scores that the mask lets through."""

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
    # a frequency for each pair of channels, built again in every call as upstream does
    d = x.shape[-1]
    pairs = torch.arange(d // 2, dtype=x.dtype, device=x.device)
    omega = 1.0 / 10000 ** (pairs / (d / 2))

    # angles of all positions; both channels of a pair turn by the same one
    angle = torch.einsum("l,f->lf", pos.to(x.dtype), omega)
    sin = angle.sin().repeat(1, 2)
    cos = angle.cos().repeat(1, 2)

    # upstream repeats the table, but pairs neighbours: so the weights were trained
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-x2, x1), dim=-1).flatten(-2)
    return x * cos + turned * sin


def rotate_all(x, *positions):
    """The leading dims by time, the next by row, the next by column; the rest stay."""
    # a third of the channels each, an even number because they turn in pairs
    d = x.shape[-1] // 3 // 2 * 2
    parts = []
    for i, pos in enumerate(positions):
        channels = x[..., i * d : (i + 1) * d]
        parts.append(rotate(channels, pos))

    # condition tokens have a time only, so more of their channels stay
    parts.append(x[..., len(positions) * d :])
    return torch.cat(parts, dim=-1)


def attention(layer, x, T, H, W, conditions=0, mask=None):
    """One attention layer on (B, T*(conditions + H*W), D), as the reference computes it."""
    # step, row and column of every patch token
    token = torch.arange(T * H * W, device=x.device)
    step = token // (H * W)
    row = token % (H * W) // W
    column = token % W
    positions = (step, row, column)

    def project(tokens, *pos):
        qkv = dense(layer.qkv, tokens)
        qkv = qkv.unflatten(-1, (3, layer.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, L, hd) each
        return rotate_all(q, *pos), rotate_all(k, *pos), v

    if conditions:
        # condition tokens have a time and no place: each is projected apart from the patches
        steps = x.unflatten(1, (T, -1))
        times = torch.arange(T, device=x.device)
        apart = [project(steps[:, :, i], times) for i in range(conditions)]
        patches = steps[:, :, conditions:].flatten(1, 2)
        of_patches = project(patches, *positions)

        # back in order: the condition tokens of a step, then its patches
        qkv = []
        for i in range(3):
            condition_part = torch.stack([parts[i] for parts in apart], dim=3)
            patch_part = of_patches[i].unflatten(2, (T, -1))
            part = torch.cat([condition_part, patch_part], dim=3)
            qkv.append(part.flatten(2, 3))
    else:
        qkv = project(x, *positions)

    # the mask is a dense matrix: what cannot be seen is computed all the same
    x = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    x = x.transpose(1, 2).flatten(2)
    return dense(layer.proj, x)


def blocks(layers, x, *args):
    """Transformer blocks: attention, then the MLP, each added to its input."""
    for blk in layers:
        x = x + attention(blk.attn, blk.norm1(x), *args)
        hidden = F.gelu(dense(blk.mlp.fc1, blk.norm2(x)))
        x = x + dense(blk.mlp.fc2, hidden)
    return x


@torch.no_grad()
def reference_encode(encoder, video):
    """uint8 (B, T*2, 3, H, W) -> layer-normed features (B, T, N, D), each step alone."""
    # pixels as the encoder was trained on them
    B, frames = video.shape[:2]
    mean = torch.tensor(IMAGENET_MEAN, device=video.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=video.device).view(3, 1, 1)
    video = (video.float() / 255 - mean) / std

    # every step is a clip of two frames
    clips = video.unflatten(1, (frames // 2, 2)).flatten(0, 1)
    x = encoder.patch_embed(clips.transpose(1, 2))  # (B*T, D, 1, H, W)
    _, _, T, H, W = x.size()
    x = x.flatten(2).transpose(1, 2)
    x = blocks(encoder.blocks, x, T, H, W)
    x = encoder.norm(x)

    # features without a scale of their own, back in clips
    x = F.layer_norm(x.float(), x.shape[-1:])
    return x.view(B, frames // 2, H * W, -1)


def reference_predict(predictor, z, actions, states, mask):
    """(B, T, N, E) -> the layer-normed prediction of the next steps; `mask` is cut from the one for
    the longest clip."""
    # two condition tokens, then the patches of each step
    B, T = z.shape[:2]
    a = predictor.action_encoder(actions[:, :T])
    s = predictor.state_encoder(states[:, :T])
    tokens = torch.stack([a, s], dim=2)
    patches = dense(predictor.predictor_embed, z)
    x = torch.cat([tokens, patches], dim=2).flatten(1, 2)

    # one mask for the longest clip, cut to this one; upstream moves it in every call
    L = x.shape[1]
    mask = mask[:L, :L].to(x.device, non_blocking=True)
    x = blocks(predictor.predictor_blocks, x, T, *predictor.grid, 2, mask)

    # the next features stand where the patches were; condition tokens predict nothing
    x = x.unflatten(1, (T, -1))[:, :, 2:]
    x = predictor.predictor_norm(x)
    x = dense(predictor.predictor_proj, x)
    return F.layer_norm(x.float(), z.shape[-1:])


def reference_losses(predictor, z, actions, states, mask):
    """(teacher-forcing loss, rollout loss of two steps)."""
    # teacher forcing: every context is true
    z_tf = reference_predict(predictor, z[:, :-1], actions, states, mask)

    # rollout: the second step follows its own first prediction, and all of it runs again
    first = z_tf[:, :1]
    context = torch.cat([z[:, :1], first], dim=1)
    second = reference_predict(predictor, context, actions, states, mask)[:, -1:]
    z_ar = torch.cat([first, second], dim=1)

    # mean absolute errors, as upstream trains with
    jloss = (z_tf - z[:, 1:]).abs().mean()
    sloss = (z_ar - z[:, 1:3]).abs().mean()
    return jloss, sloss


def useful_flops(encoder, predictor, B, T):
    """(of the encoder, of the predictor) in one training step. The encoder runs forward; the
    predictor forward and backward, for T-1 steps of teacher forcing and one of rollout."""

    # biases and norms are vectors: what they cost is not counted
    def weights(module):
        return sum(p.numel() for p in module.parameters() if p.dim() > 1)

    N = math.prod(predictor.grid)
    S = N + 2  # with the condition tokens
    D = encoder.embed_dim
    width = predictor.predictor_embed.out_features

    # the encoder: its weights on every token, and all scores inside a step
    token_flops = 2 * (weights(encoder.blocks) + weights(encoder.patch_embed))
    token_flops += 4 * D * N * len(encoder.blocks)
    encode = B * T * N * token_flops

    # the predictor: the scores of teacher forcing that the mask lets through, and of the rollout
    pairs_of_steps = (T - 1) * T / 2 + 2
    scores = 4 * width * S**2 * pairs_of_steps
    scores *= B * len(predictor.predictor_blocks)

    # its weights, for each step; embedding and projection see patches only
    step_flops = 2 * weights(predictor.predictor_blocks) * S
    step_flops += 4 * D * width * N

    # backward costs twice the forward pass, and 2.5 times for scores: they are computed once more
    predict = 3 * B * T * step_flops + 3.5 * scores
    return encode, predict


# --- the two steps that are compared ---


def training_step(losses, optimizer):
    """A function that makes one step on what `losses()` gives, the loss of teacher forcing and that
    of the rollout, and returns both. With update=False it leaves gradients and changes nothing."""

    def step(update=True):
        # both losses weigh the same
        jloss, sloss = losses()
        loss = jloss + sloss
        loss.backward()
        if update:
            optimizer.step()
            optimizer.zero_grad()
        return jloss.detach(), sloss.detach()

    return step


def reference_step(encoder, predictor, batch, autocast):
    """A function that makes one step on a batch and returns both losses."""
    device = next(predictor.parameters()).device
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-4)

    # the dense mask: a token sees its own step and those before
    T = batch["states"].shape[1]
    tokens_of_a_step = math.prod(predictor.grid) + 2
    step_of = torch.arange(T).repeat_interleave(tokens_of_a_step)
    mask = step_of[None, :] <= step_of[:, None]

    def losses():
        # the way to the device is part of a step, for ours too
        video = batch["video"].to(device)
        actions = batch["actions"].to(device)
        states = batch["states"].to(device)
        with autocast():
            z = reference_encode(encoder, video)
            return reference_losses(predictor, z, actions, states, mask)

    # upstream reads the losses back in every step, which makes a GPU wait
    train = training_step(losses, optimizer)

    def step(update=True):
        jloss, sloss = train(update)
        return jloss.item(), sloss.item()

    return step


def our_step(encoder, predictor, batch, autocast, dtype, is_compiled):
    """The same, as train_ac.py makes it. encoder: None for a batch of features."""
    # a frozen encoder needs no weights in fp32; the caller's stays as it is
    device = next(predictor.parameters()).device
    frozen = None
    if encoder is not None:
        frozen = copy.deepcopy(encoder).to(dtype)
    model = ACModel(predictor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    # one size of input: nothing need be compiled again
    if is_compiled:
        model.compile(dynamic=False)
        if frozen is not None:
            frozen.compile(dynamic=False)

    # features stay as the encoder gives them: the reference does not standardize
    stats = {"mean": None, "std": None}
    features_of = make_features_of(frozen, "tubelet", 2, stats, device, autocast)

    def losses():
        z, actions, states = features_of(batch)
        with autocast():
            return model(z, actions, states)

    return training_step(losses, optimizer)


def losses_and_gradients(step, predictor):
    """(losses (2,), all gradients in one vector) of a step that changes nothing."""
    losses = torch.tensor([float(x) for x in step(update=False)])
    gradients = torch.cat([p.grad.flatten() for p in predictor.parameters()])

    # the timed steps start without them
    predictor.zero_grad()
    return losses, gradients


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    encoder_help = "architecture of the frozen encoder (default vit_tiny)"
    flag("--encoder", default="vit_tiny", choices=ARCHITECTURES, help=encoder_help)
    flag("--crop_size", type=int, default=128, help="pixels of a frame (default 128)")
    flag("--steps", type=int, default=8, help="steps T of a clip, two frames each (default 8)")
    flag("--batch_size", type=int, default=4, help="clips of a step (default 4)")
    flag("--pred_dim", type=int, default=384, help="width of the predictor (default 384)")
    flag("--pred_depth", type=int, default=6, help="blocks of the predictor (default 6)")
    flag("--pred_heads", type=int, default=6, help="attention heads (default 6)")
    dtype_help = "autocast of both, and our encoder's weights (default float32)"
    flag("--dtype", default="float32", choices=["float32", "bfloat16"], help=dtype_help)
    switch = argparse.BooleanOptionalAction
    flag("--compile", action=switch, default=True, help="time train_ac.py --compile too")
    flag("--repeats", type=int, default=10, help="steps timed of each (default 10)")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()

    # --- model and a batch of noise ---
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    B = args.batch_size
    T = args.steps

    # random weights: time does not depend on them
    torch.manual_seed(0)
    encoder = build_encoder(args.encoder).to(device)
    grid = (args.crop_size // 16, args.crop_size // 16)
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    base = Predictor(encoder.embed_dim, 13, 2, grid, **size).to(device)

    # a batch as the loader gives it, on the CPU
    shape = (B, 2 * T, 3, args.crop_size, args.crop_size)
    batch = {
        "video": torch.randint(256, shape, dtype=torch.uint8),
        "actions": torch.randn(B, T - 1, 13),
        "states": torch.randn(B, T, 2),
    }

    # mixed precision as in train_ac.py; none in fp32
    def autocast():
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype)

    # --- all must compute the same ---
    names = ["reference", "ours"]
    if args.compile:
        names.append("ours, --compile")

    # rounding explains no more than this
    bound = 1e-5 if args.dtype == "float32" else 5e-2
    steps = {}
    for name in names:
        # each has weights of its own, equal at the start
        predictor = copy.deepcopy(base)
        if name == "reference":
            step = reference_step(encoder, predictor, batch, autocast)
        else:
            is_compiled = name != "ours"
            step = our_step(encoder, predictor, batch, autocast, dtype, is_compiled)
        losses, gradients = losses_and_gradients(step, predictor)

        # the reference comes first, and is what the others are compared with
        if name == "reference":
            wanted_losses = losses
            wanted_gradients = gradients

        # relative errors: of the worse loss, and of the gradients as one vector
        losses_off = ((losses - wanted_losses) / wanted_losses).abs().max().item()
        difference = (gradients - wanted_gradients).norm()
        gradients_off = (difference / wanted_gradients.norm()).item()
        print(
            f"{name}: losses {losses.tolist()},"
            f" off by {losses_off:.1e}, gradients by {gradients_off:.1e}"
        )
        if max(losses_off, gradients_off) > bound:
            raise SystemExit(f"{name} computes something else than the reference")
        steps[name] = step

    # --- time ---
    seconds_of = bench.medians(steps, device, args.repeats)

    # a row each, beside the peak that a large matmul reaches in this run
    useful = sum(useful_flops(encoder, base, B, T))
    matmul_flops, _ = bench.ceilings(device, dtype)
    rows = []
    for name, seconds in seconds_of.items():
        row = {
            "step": name,
            "ms": 1e3 * seconds,
            "clips/s": B / seconds,
            "reference / it": seconds_of["reference"] / seconds,
            "useful TFLOP/s": useful / seconds / 1e12,
            "of matmul": useful / seconds / matmul_flops,
        }
        rows.append(row | bench.peak_memory(steps[name], device))
    bench.report(rows, args.json, device)
