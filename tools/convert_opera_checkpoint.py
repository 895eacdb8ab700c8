#!/usr/bin/env python
"""Convert the weights that the authors of InsPose published, for configs/InsPose_R50_Official.yaml.

    python tools/convert_opera_checkpoint.py inspose_r50_8x4_36e_coco.pth official.pth

docs/official.md says where to get their file, and under which terms.
"""

import argparse
import sys

from inspose_d2.checkpoint import CheckpointError
from inspose_d2.checkpoint.opera import CONFIG, convert_opera_checkpoint


def main() -> None:
    """Read the command line and convert; what cannot be converted ends with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN.pth", help="the authors' file")
    parser.add_argument("target", metavar="OUT.pth", help="file to write")
    args = parser.parse_args()
    try:
        done = convert_opera_checkpoint(args.source, args.target)
    except CheckpointError as error:
        sys.stderr.write(f"convert_opera_checkpoint.py: {error}\n")
        raise SystemExit(2) from error
    known = done.known_as or "not a file that is known by its checksum; its tensors are the model's"
    print(f"{args.source}: sha256 {done.sha256}: {known}")
    print(f"trained for {done.epoch} epochs by its own words")
    print(
        f"{args.target}: {done.num_tensors} tensors for {CONFIG}, {len(done.dropped)} counters of"
    )
    print("frozen norms left out")


if __name__ == "__main__":
    main()
