#!/usr/bin/env python
"""Train or evaluate InsPose: ``python train_net.py --config-file configs/InsPose_R50_3x.yaml``."""

import sys

from inspose_d2.cli import told
from inspose_d2.engine.launch import launch_workers, main, run, setup  # noqa: F401

if __name__ == "__main__":
    sys.exit(told("train_net.py", run))
