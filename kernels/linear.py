"""The affine map of every transformer layer, by the matmul library that is fastest on this CPU."""

import torch
import torch.nn.functional as F

# MKL runs AVX2 code on AMD processors, oneDNN AVX-512: 200 against 450 GFLOP/s on two cores of an
# EPYC (python -m bench.linear). Not measured on Intel's, where MKL uses AVX-512 too.
ONEDNN = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


def linear_onednn(x, weight, bias):
    """x (..., K), weight (N, K), bias (N,) -> (..., N), as a 1x1 convolution of an image of x's
    rows, channels last: nothing is copied."""
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, K, rows, 1)
    return (
        F.conv2d(rows, weight[:, :, None, None], bias)
        .permute(0, 2, 3, 1)
        .reshape(*x.shape[:-1], -1)
    )
