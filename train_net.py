#!/usr/bin/env python
"""Train or evaluate InsPose: ``python train_net.py --config-file configs/InsPose_R50_3x.yaml``."""

from detectron2.engine import default_argument_parser

from inspose_d2.engine.launch import launch_workers, main, run, setup  # noqa: F401

if __name__ == "__main__":
    run(default_argument_parser().parse_args())
