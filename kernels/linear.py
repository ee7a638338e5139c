"""The affine map of every transformer layer, by the matmul library that is fastest on this CPU."""

import torch
import torch.nn.functional as F

# MKL runs AVX2 code on AMD processors, oneDNN AVX-512: 200 against 450 GFLOP/s on two cores of an
# EPYC (python -m bench.kernels --of linear). This was not measured on Intel's, where MKL uses
# AVX-512 too. Where both run AVX2 there is nothing to gain: oneDNN takes 1.03 to 1.08 times as long
# as MKL from 528 rows up (one thread, 90 to 100 GFLOP/s both). ATEN_CPU_CAPABILITY=avx2 decides
# here too.
ONEDNN = (
    torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


def linear_blas(x, weight, bias):
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N), always as one product of two
    matrices.

    If x has three dimensions and is a slice of a longer one, F.linear picks its path by whether the
    weight is trained. A frozen base would then be rounded otherwise than the same base in training,
    and step 0 of an adapter would not be its base."""
    rows = x.reshape(-1, x.shape[-1])
    return F.linear(rows, weight, bias).view(*x.shape[:-1], len(weight))


def linear_onednn(x, weight, bias):
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N), as a 1x1 convolution of an image of
    x's rows, channels last: nothing is copied."""
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, K, rows, 1)
    y = F.conv2d(rows, weight[:, :, None, None], bias)  # (1, N, rows, 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def linear_impl(x, weight):
    """What impl="auto" means for x (..., K) and weight (N, K)."""
    # below 2**26 products (rows x K x N) a convolution costs more to set up than it gains
    large = (
        ONEDNN
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * len(weight) > 2**26
    )
    return "onednn" if large and not torch.is_autocast_enabled("cpu") else "blas"


def linear_auto(x, weight, bias):
    """The faster of the two."""
    if linear_impl(x, weight) == "onednn":
        return linear_onednn(x, weight, bias)
    return linear_blas(x, weight, bias)
