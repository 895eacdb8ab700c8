#!/usr/bin/env python
"""Convert the authors' weights: the same as ``inspose convert opera IN.pth OUT.pth``."""

import sys

from inspose_d2.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "opera", *sys.argv[1:]]))
