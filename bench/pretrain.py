"""How long does one step of masked pretraining take, against the reference's own code?

    git clone https://github.com/facebookresearch/vjepa2; pip install einops
    python -m bench.pretrain --vjepa2 vjepa2     # CPU: vit_tiny, 8 frames at 128 px, fp32
    python -m bench.pretrain --vjepa2 vjepa2 --encoder vit_large_16 --crop_size 256 \\
        --frames_per_clip 16 --pred_dim 384 --pred_depth 12 --pred_heads 12 --batch_size 24 \\
        --dtype bfloat16     # a GPU: the sizes of Meta's ViT-L

A step: the teacher encodes whole clips, the encoder what two kinds of masks leave, the predictor
gives the rest; then the loss, backward, AdamW, and the teacher follows. Prints a row for each:
milliseconds, clips/s, the reference's time over it, useful FLOP/s, and their share of a large
matmul timed in the run. The two take turns, so that a slow minute hits both.

The reference's networks are imported from the folder --vjepa2. Its step is a closure in
app/vjepa/train.py and cannot be imported: `reference_step` says the same in its order. Left out, in
its favour: DDP, and the drawing of masks, which its data loader does. Ours draws them in the step,
as train_vjepa.py does. Weights, clips and masks are the same in both. Losses of the first step and
all gradients are compared before anything is timed.

Useful FLOPs are 2 for each weight and token forward and 4 backward, and those of the attention
scores. The teacher only runs forward."""

import argparse
import contextlib
import copy
import functools
import importlib.util
import math
import os
import sys
import types

import torch
import torch.nn.functional as F

import bench
from model import (
    MaskedModel,
    MaskPredictor,
    momentum_at,
    pixels_to_video,
    sample_masks,
    teacher_targets,
    update_teacher,
)
from weights import ARCHITECTURES, build_encoder

# Meta's two kinds of masks: blocks, share of the picture, aspect ratio
KINDS = [(8, 0.15), (2, 0.7)]
ASPECT = (0.75, 1.5)
EMA = (0.99925, 0.99925)
TOTAL_STEPS = 90_000


def draw_masks(batch, grid, step):
    """The masks of a step, as train_vjepa.py draws them: [Mask] of each kind."""
    masks = []
    for kind, (blocks, scale) in enumerate(KINDS):
        seed = [0, step, kind]
        masks.append(sample_masks(batch, grid, blocks, scale, ASPECT, seed, [*seed, 1]))
    return masks


def groups_of(modules):
    """Parameter groups of AdamW: no weight decay for biases and norms."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.04}, {"params": vectors, "weight_decay": 0.0}]


# --- the reference ---


def open_checkout(folder, parser, flag="--vjepa2", repository="facebookresearch/vjepa2"):
    """Make the packages of a checkout importable. Ends the program if it is none.

    Meta's repositories all call their package `src`: what was imported from another checkout keeps
    working, and is not found again."""
    if not os.path.exists(os.path.join(folder, "src", "models", "ac_predictor.py")):
        parser.error(
            f"{flag} {folder} is no checkout of {repository}: it has no"
            f" src/models/ac_predictor.py; git clone https://github.com/{repository}"
        )
    if not importlib.util.find_spec("einops"):
        parser.error("the reference needs the package einops: pip install einops")

    # they take from timm only what drops whole paths, which nothing here does
    if "timm" not in sys.modules and not importlib.util.find_spec("timm"):
        layers = types.ModuleType("timm.layers")
        layers.drop_path = lambda x, drop_prob=0.0, training=False: x
        for name in ("timm", "timm.models"):
            sys.modules[name] = types.ModuleType(name)
        for name in ("timm.layers", "timm.models.layers"):
            sys.modules[name] = layers

    for name in list(sys.modules):
        if name.partition(".")[0] == "src":
            del sys.modules[name]
    sys.path.insert(0, folder)


def shared_options(encoder, frames, crop_size):
    """What the reference's encoder and predictor are both built with."""
    return {
        "img_size": crop_size,
        "patch_size": encoder.patch_size,
        "num_frames": frames,
        "tubelet_size": encoder.tubelet_size,
        "uniform_power": True,
        "use_rope": True,
        "use_sdpa": True,
    }


def encoder_of_reference(encoder, frames, crop_size):
    """The reference's encoder of clips of so many frames, with the weights of ours."""
    from src.models.vision_transformer import VisionTransformer

    theirs = VisionTransformer(
        embed_dim=encoder.embed_dim,
        depth=len(encoder.blocks),
        num_heads=encoder.num_heads,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        **shared_options(encoder, frames, crop_size),
    )
    theirs.load_state_dict(encoder.state_dict())
    return theirs


def reference_networks(encoder, predictor, frames, crop_size):
    """(encoder, predictor, apply_masks) of the reference, with our weights."""
    from src.masks.utils import apply_masks
    from src.models.predictor import vit_predictor
    from src.utils.wrappers import MultiSeqWrapper, PredictorMultiSeqWrapper

    reference_encoder = encoder_of_reference(encoder, frames, crop_size)

    # the predictor, with as many mask tokens
    reference_predictor = vit_predictor(
        embed_dim=encoder.embed_dim,
        predictor_embed_dim=predictor.pred_dim,
        depth=len(predictor.predictor_blocks),
        num_heads=predictor.num_heads,
        use_mask_tokens=True,
        num_mask_tokens=len(predictor.mask_tokens),
        **shared_options(encoder, frames, crop_size),
    )
    reference_predictor.load_state_dict(predictor.state_dict())
    wrapped = PredictorMultiSeqWrapper(reference_predictor)
    return MultiSeqWrapper(reference_encoder), wrapped, apply_masks


def reference_step(encoder, predictor, apply_masks, pixels, all_masks, autocast, device):
    """A function that makes one step of app/vjepa/train.py and returns the loss."""
    encoder.to(device)
    predictor.to(device)
    teacher = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(groups_of([encoder, predictor]), lr=1e-4)
    numbers = iter(range(len(all_masks)))

    def step(update=True):
        masks = all_masks[next(numbers) if update else 0]
        clips = [pixels_to_video(pixels.to(device, non_blocking=True))]
        context = [[mask.context.to(device, non_blocking=True) for mask in masks]]
        predicted = [[mask.predicted.to(device, non_blocking=True) for mask in masks]]

        with autocast():
            with torch.no_grad():
                targets = [F.layer_norm(h, (h.size(-1),)) for h in teacher(clips)]
            z = predictor(encoder(clips, context), context, predicted)
            targets = [apply_masks(h, ids, concat=False) for h, ids in zip(targets, predicted)]
            losses = [(a - b).abs().mean() for a, b in zip(z[0], targets[0])]
            loss = sum(losses) / len(losses)
        loss.backward()
        if not update:
            return loss.item()
        optimizer.step()
        optimizer.zero_grad()

        # the teacher follows, all weights in two calls
        with torch.no_grad():
            of_teacher = list(teacher.parameters())
            torch._foreach_mul_(of_teacher, EMA[0])
            torch._foreach_add_(of_teacher, list(encoder.parameters()), alpha=1 - EMA[0])
        return loss.item()

    return step


# --- ours ---


def our_step(encoder, predictor, pixels, grid, autocast, device):
    """The same, as train_vjepa.py makes it."""
    teacher = copy.deepcopy(encoder).requires_grad_(False)
    model = MaskedModel(encoder, predictor, None, None).to(device)
    teacher.to(device)
    optimizer = torch.optim.AdamW(groups_of([model]), lr=1e-4, fused=True)
    loss_scaler = torch.amp.GradScaler(device.type, enabled=False)
    loss_weights = torch.tensor([1.0, 0, 0, 0, 0, 0], device=device)
    done = 0

    def step(update=True):
        nonlocal done
        masks = [mask.to(device) for mask in draw_masks(len(pixels), grid, done)]
        video = pixels_to_video(pixels.to(device, non_blocking=True))
        with torch.no_grad(), autocast():
            targets = teacher_targets(teacher, video, "clip")
        with autocast():
            parts = model(video, targets, masks)
        loss = (parts * loss_weights).sum()
        loss_scaler.scale(loss).backward()
        if not update:
            return loss.item()

        # the gradient's norm is measured for the log
        loss_scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        loss_scaler.step(optimizer)
        loss_scaler.update()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        update_teacher(teacher, encoder, momentum_at(done, TOTAL_STEPS, *EMA))
        return loss.detach()

    return step


def useful_flops(encoder, predictor, grid, clips, masks):
    """In one step, of the encoder, the teacher and the predictor."""

    def of_blocks(tokens, blocks, width):
        weights = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
        return tokens * (2 * weights + 4 * tokens * width * len(blocks))

    # the teacher, forward
    D = encoder.embed_dim
    embedding = 2 * encoder.patch_embed.proj.weight.numel()  # of a token
    all_tokens = math.prod(grid)
    total = of_blocks(all_tokens, encoder.blocks, D) + embedding * all_tokens

    # encoder and predictor, forward and backward; pixels need no gradient
    for mask in masks:
        context = mask.context.shape[1]
        both = context + mask.predicted.shape[1]
        total += 3 * of_blocks(context, encoder.blocks, D) + 2 * embedding * context
        total += 3 * of_blocks(both, predictor.predictor_blocks, predictor.pred_dim)
        total += 3 * 2 * D * predictor.pred_dim * both
    return clips * total


def loss_and_gradients(step, *modules):
    """(loss, {name: gradient}) of a step that changes nothing."""
    loss = step(update=False)
    gradients = {}
    for module in modules:
        for name, p in module.named_parameters():
            if p.grad is not None:
                gradients[name] = p.grad.clone()
        module.zero_grad()
    return loss, gradients


def gradients_off(gradients, wanted):
    """How far apart two dicts of gradients by name are in all, as a share of the wanted norm. Ends
    the program if they are of other weights."""
    if gradients.keys() != wanted.keys():
        raise SystemExit(f"other weights are trained: {gradients.keys() ^ wanted.keys()}")
    squares = sum((gradients[name] - g).square().sum() for name, g in wanted.items())
    norm = sum(g.square().sum() for g in wanted.values())
    return (squares / norm).sqrt().item()


if __name__ == "__main__":
    # --- flags ---
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--vjepa2", required=True, help="folder of a checkout of facebookresearch/vjepa2")
    encoder_help = "architecture of encoder and teacher (default vit_tiny)"
    flag("--encoder", default="vit_tiny", choices=ARCHITECTURES, help=encoder_help)
    flag("--crop_size", type=int, default=128, help="pixels of a frame (default 128)")
    flag("--frames_per_clip", type=int, default=8, help="frames of a clip (default 8)")
    flag("--batch_size", type=int, default=4, help="clips of a step (default 4)")
    flag("--pred_dim", type=int, default=192, help="width of the predictor (default 192)")
    flag("--pred_depth", type=int, default=4, help="blocks of the predictor (default 4)")
    flag("--pred_heads", type=int, default=6, help="attention heads (default 6)")
    dtype_help = "autocast of both (default float32)"
    flag("--dtype", default="float32", choices=["float32", "bfloat16"], help=dtype_help)
    flag("--repeats", type=int, default=10, help="steps timed of each (default 10)")
    flag("--json", action="store_true", help="print rows as JSON lines")
    args = parser.parse_args()
    open_checkout(args.vjepa2, parser)

    # --- networks and a batch of noise ---
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    encoder = build_encoder(args.encoder, args.crop_size, args.frames_per_clip)
    encoder.train().requires_grad_(True)
    side = args.crop_size // encoder.patch_size
    grid = (args.frames_per_clip // encoder.tubelet_size, side, side)
    size = {"pred_dim": args.pred_dim, "depth": args.pred_depth, "num_heads": args.pred_heads}
    predictor = MaskPredictor(encoder.embed_dim, grid[1:], **size, num_mask_tokens=len(KINDS))
    predictor.freeze_unused()
    frames = (args.batch_size, args.frames_per_clip, 3, args.crop_size, args.crop_size)
    pixels = torch.randint(256, frames, dtype=torch.uint8)

    # the same masks for both: one set a step
    warmup = 2
    count = warmup + args.repeats
    all_masks = [draw_masks(args.batch_size, grid, step) for step in range(count)]

    def autocast():
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype)

    # --- both must compute the same ---
    reference_encoder, reference_predictor, apply_masks = reference_networks(
        encoder, predictor, args.frames_per_clip, args.crop_size
    )
    step_of_reference = reference_step(
        reference_encoder, reference_predictor, apply_masks, pixels, all_masks, autocast, device
    )
    step_of_ours = our_step(encoder, predictor, pixels, grid, autocast, device)

    # the first step of both
    wanted, wanted_gradients = loss_and_gradients(
        step_of_reference, reference_encoder.backbone, reference_predictor.backbone
    )
    loss, gradients = loss_and_gradients(step_of_ours, encoder, predictor)

    # gradients by name, and how far apart they are in all
    apart = gradients_off(gradients, wanted_gradients)
    loss_off = abs(loss - wanted) / wanted
    print(
        f"first step: loss {wanted:.7f} of the reference, ours {loss:.7f}, off by {loss_off:.1e};"
        f" gradients by {apart:.1e}"
    )

    # rounding explains no more than this
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    if not (loss_off <= bound and apart <= bound):
        raise SystemExit("ours computes something else than the reference")

    # --- time ---
    last_losses = {}

    def keeping_loss(name, step):
        def call():
            last_losses[name] = step()

        return call

    # both take turns
    steps = {"reference": step_of_reference, "ours": step_of_ours}
    calls = {name: keeping_loss(name, step) for name, step in steps.items()}
    seconds = bench.medians(calls, device, args.repeats, warmup)
    print(
        f"after {count} steps: loss {float(last_losses['reference']):.5f} of the reference, ours"
        f" {float(last_losses['ours']):.5f}"
    )

    # a row each, beside the peak that a large matmul reaches in this run
    useful = useful_flops(encoder, predictor, grid, args.batch_size, all_masks[0])
    matmul_flops, _ = bench.ceilings(device, dtype)
    rows = []
    for name, s in seconds.items():
        row = {"step": name, "ms": 1e3 * s, "clips/s": args.batch_size / s}
        row["reference / it"] = seconds["reference"] / s
        row["useful TFLOP/s"] = useful / s / 1e12
        row["of matmul"] = useful / s / matmul_flops
        rows.append(row)
    bench.report(rows, args.json, device)
