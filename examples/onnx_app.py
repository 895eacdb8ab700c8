#!/usr/bin/env python
"""Poses of a picture with ONNX Runtime and OpenCV alone: no PyTorch, no Detectron2."""

import argparse

import cv2
import onnxruntime

# COCO's keypoints: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left, right.
BONES = [
    *[(0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10)],
    *[(5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16)],
]
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="of inspose export --preprocess")
parser.add_argument("picture")
parser.add_argument("--output", help="file for the picture with the poses drawn")
parser.add_argument("--score", type=float, default=0.5, help="lowest score of a pose")
args = parser.parse_args()
picture = cv2.imread(args.picture)
if picture is None:
    raise SystemExit(f"{args.picture} is no picture that OpenCV can read")
session = onnxruntime.InferenceSession(args.model)
if session.get_inputs()[0].shape[2] != 3:
    raise SystemExit(f"{args.model} takes no pictures as they are: export it with --preprocess")
_, scores, keypoints = session.run(["boxes", "scores", "keypoints"], {"image": picture})
for pose in keypoints[scores >= args.score]:
    print(" ".join(f"{x:.1f},{y:.1f},{score:.2f}" for x, y, score in pose))
    for bone in BONES:
        cv2.line(picture, *pose[list(bone), :2].astype(int).tolist(), (0, 165, 255), 2, cv2.LINE_AA)
if args.output and not cv2.imwrite(args.output, picture):
    raise SystemExit(f"{args.output} cannot be written")
