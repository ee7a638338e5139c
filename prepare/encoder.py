"""Make of a trained encoder the small file that the repository ships: half precision, and nothing
but the weights.

    python -m prepare.encoder out/encoder encoders/doom_tiny.safetensors

Reads the newest checkpoint of a run of train_lewm.py or train_vjepa.py (or any file that --encoder
takes). Prints how large the file is, and how far rounding moves the features."""

import argparse
import os
import sys

import torch
from safetensors.torch import save as safetensors_bytes

from checkpoint import short_excepthook
from files.disk import write_atomically
from weights import load_encoder

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("run", help="run folder, checkpoint or weight file")
parser.add_argument("file", help="file to write, NAME.safetensors")


def rounding_error(encoder, rounded, frames=2, side=64):
    """Relative error of the features (mean |difference| / mean |feature|) on random pictures."""
    pictures = torch.randn(4, 3, frames, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = encoder(pictures)
        changed = rounded(pictures)
    return ((changed - exact).abs().mean() / exact.abs().mean()).item()


if __name__ == "__main__":
    sys.excepthook = short_excepthook
    args = parser.parse_args()
    if not args.file.endswith(".safetensors"):
        parser.error(f"{args.file}: the file is written as NAME.safetensors")

    encoder = load_encoder(args.run)
    state = {name: value.half() for name, value in encoder.state_dict().items()}
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{args.run}: some weights are too large for half precision (65,504)")
    write_atomically(args.file, safetensors_bytes(state, {"format": "pt"}))

    # read back as later stages will, in single precision
    rounded = load_encoder(args.file).float()
    frames = encoder.tubelet_size
    side = 4 * encoder.patch_size
    error = rounding_error(encoder, rounded, frames, side)
    size = os.path.getsize(args.file) / 1e6
    print(f"{args.file}: {size:.2f} MB, features within {error:.2%} of those of {args.run}")
    print(f"next: python encode.py --encoder {args.file} --data SHARDS --out features")
