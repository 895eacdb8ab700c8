#!/usr/bin/env python
"""Poses of a picture with ONNX Runtime, NumPy and OpenCV alone: no PyTorch, no Detectron2."""

import argparse

import cv2
import numpy as np
import onnxruntime

# COCO's keypoints: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left, right.
BONES = [
    *[(0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10)],
    *[(5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16)],
]


def predict(
    session: onnxruntime.InferenceSession, picture: np.ndarray, short: int, longest: int
) -> list[np.ndarray]:
    """Find the poses of a picture (H, W, 3), colours as in INPUT.FORMAT.

    Returns:
        boxes (N, 4), scores (N,) and keypoints (N, K, 3) in pixels of the picture.
    """
    height, width = picture.shape[:2]
    scale = min(short / min(height, width), longest / max(height, width))
    size = round(width * scale), round(height * scale)
    resized = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else 1)
    image = np.ascontiguousarray(resized.transpose(2, 0, 1))
    boxes, scores, keypoints = session.run(["boxes", "scores", "keypoints"], {"image": image})
    back = np.array([width / size[0], height / size[1]], np.float32)
    boxes, keypoints[..., :2] = boxes * np.tile(back, 2), keypoints[..., :2] * back
    return [boxes, scores, keypoints]


def main() -> None:
    """Print the poses and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="of tools/export.py --format onnx")
    parser.add_argument("picture")
    parser.add_argument("--output", help="file for the picture with the poses drawn")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("MIN", "MAX"))
    parser.add_argument("--score", type=float, default=0.4, help="lowest score of a pose")
    args = parser.parse_args()
    picture = cv2.imread(args.picture)  # BGR; turn it round where INPUT.FORMAT is RGB
    if picture is None:
        raise SystemExit(f"{args.picture} is no picture that OpenCV can read")
    _, scores, keypoints = predict(onnxruntime.InferenceSession(args.model), picture, *args.size)
    for score, pose in zip(scores, keypoints, strict=True):
        if score >= args.score:
            print(f"{score:.3f}", " ".join(f"{x:.1f},{y:.1f},{s:.2f}" for x, y, s in pose))
            for a, b in BONES:
                ends = pose[[a, b], :2].astype(int).tolist()
                cv2.line(picture, *ends, (0, 165, 255), 2, cv2.LINE_AA)
    if args.output and not cv2.imwrite(args.output, picture):
        raise SystemExit(f"{args.output} cannot be written")


if __name__ == "__main__":
    main()
