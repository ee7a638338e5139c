"""A frozen linear layer with a low-rank update (LoRA) as one autograd node: one pass over the
output, one over the input's gradient."""

import torch

import kernels


class LowRank(torch.autograd.Function):
    """Keeps A's input and the r numbers a token for the backward pass, no input of W: it is frozen.
    Weights are cast to x's dtype in both passes and never kept twice, as autocast would."""

    @staticmethod
    def forward(ctx, x, drop, weight, bias, A, B, scale):
        ctx.scale, low_in = scale, x if drop is None else drop
        h = low_in @ A.to(x.dtype).t()
        ctx.save_for_backward(low_in, weight, A, B, h)
        return kernels.linear(x, weight.to(x.dtype), bias.to(x.dtype)).addmm_(
            h, B.to(x.dtype).t(), alpha=scale
        )

    @staticmethod
    def backward(ctx, g):
        low_in, weight, A, B, h = ctx.saved_tensors
        low = (g @ B.to(g.dtype)).mul_(ctx.scale)
        gx = kernels.linear(g, weight.to(g.dtype).t(), None) if ctx.needs_input_grad[0] else None
        gdrop = low @ A.to(g.dtype) if ctx.needs_input_grad[1] else None
        if gx is not None and gdrop is None:
            gx.addmm_(low, A.to(g.dtype))
        return (
            gx,
            gdrop,
            None,
            None,
            (low.t() @ low_in).to(A.dtype),
            (g.t() @ h).mul_(ctx.scale).to(B.dtype),
            None,
        )


def low_rank_fused(x, drop, weight, bias, A, B, scale):
    with torch.autocast(x.device.type, enabled=False):
        return LowRank.apply(x, drop, weight, bias, A, B, scale)
