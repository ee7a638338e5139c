"""A frozen linear layer with a low-rank update (LoRA) as one autograd node: one pass over the
output, one over the input's gradient."""

import torch

from .linear import linear_auto


class LowRank(torch.autograd.Function):
    """Keeps A's input and r numbers a token for the backward pass, but no input of W, because W is
    frozen. Weights are cast to x's dtype in both passes; autocast would keep the cast copies."""

    @staticmethod
    def forward(ctx, x, drop, weight, bias, A, B, scale):
        low_in = x if drop is None else drop
        h = low_in @ A.to(x.dtype).t()  # (n, r)
        ctx.scale = scale
        ctx.save_for_backward(low_in, weight, A, B, h)

        y = linear_auto(x, weight.to(x.dtype), bias.to(x.dtype))
        return y.addmm_(h, B.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx, g):
        low_in, weight, A, B, h = tuple(ctx.saved_tensors)
        low = (g @ B.to(g.dtype)).mul_(ctx.scale)  # (n, r)

        # to x through W, and through A unless that has an input of its own
        needs_x, needs_drop = ctx.needs_input_grad[:2]
        gx = linear_auto(g, weight.to(g.dtype).t(), None) if needs_x else None
        gdrop = low @ A.to(g.dtype) if needs_drop else None
        if gx is not None and gdrop is None:
            gx.addmm_(low, A.to(g.dtype))

        gA = (low.t() @ low_in).to(A.dtype)
        gB = (g.t() @ h).mul_(ctx.scale).to(B.dtype)
        return gx, gdrop, None, None, gA, gB, None


def low_rank_fused(x, drop, weight, bias, A, B, scale):
    with torch.autocast(x.device.type, enabled=False):
        return LowRank.apply(x, drop, weight, bias, A, B, scale)
