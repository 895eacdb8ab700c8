"""Synthetic people: images of articulated figures with the 17 COCO keypoints, made from a seed.

A figure is posed in three dimensions by forward kinematics, projected, and painted from far to
near as `Blob`s (convex hulls of a few discs): once in colour, once into a label map from which
visibility, area and box are read. Left limbs are blue, right limbs orange, in many shades.

Coordinates are pixel indices, as in COCO's json and in `cv2`: the first pixel's centre is (0, 0).
Image i of a split is a function of (seed, split, i, image size) alone. Nothing here needs
Detectron2, and the file runs as a script: so it uses several processors.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from iopath.common.file_io import file_lock
from tqdm import tqdm

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 3  # raise it when the pictures change, so that older sets are made again
SPLITS = {"train": 4000, "val": 300, "holdout": 300}  # default number of images
IMAGE_SIZE = 320  # longer side, pixels
ASPECT_RATIOS = (1.0, 1.0, 0.8, 1.25)  # width / height
MAX_PEOPLE = 6
SIZE_RANGE = (0.15, 0.9)  # longer side of a whole figure over the image height
MIN_VISIBLE_KEYPOINTS = 6  # a figure that would show fewer is left out of the picture

KEYPOINT_NAMES = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)
SKELETON = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8)),
    *((7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)

# Points of a body, (left, right) where there are two. The first 17 are the keypoints.
NOSE, EYES, EARS, SHOULDERS, ELBOWS, WRISTS = 0, (1, 2), (3, 4), (5, 6), (7, 8), (9, 10)
HIPS, KNEES, ANKLES = (11, 12), (13, 14), (15, 16)
HANDS, TOES, SKULL, FACE, NECK = (17, 18), (19, 20), 21, 22, 23
NUM_KEYPOINTS, NUM_POINTS = 17, 24

# Parts of a body in the label map, and for every keypoint the parts on which it is seen.
HEAD, TORSO, UPPER_ARM, FOREARM, THIGH, SHIN = 0, 1, (2, 3), (4, 5), (6, 7), (8, 9)
NUM_PARTS = 10
CARRIERS = (
    *[(HEAD,)] * 5,
    *zip((TORSO, TORSO), UPPER_ARM, strict=True),
    *zip(UPPER_ARM, FOREARM, strict=True),
    *zip(FOREARM, strict=True),
    *zip((TORSO, TORSO), THIGH, strict=True),
    *zip(THIGH, SHIN, strict=True),
    *zip(SHIN, strict=True),
)
CLUTTER = 255  # label of what stands in front of people; 0 is the background

# Lengths over stature; a figure's own differ by up to 10 %.
LENGTHS = {"torso": 0.28, "shoulder": 0.115, "hip": 0.07}
LENGTHS |= {"upper_arm": 0.17, "forearm": 0.15, "thigh": 0.23, "shin": 0.23}
NECK_LENGTH, SKULL_RADIUS = 0.1, 0.08
FACE_SHAPE = np.array(  # nose, eyes, ears: (left, up, front) over the radius of the skull
    [(0, -0.15, 1), (0.42, 0.2, 0.85), (-0.42, 0.2, 0.85), (1, 0, 0), (-1, 0, 0)]
)

# Degrees, uniform in (low, high). Swing raises a hanging limb forward, spread raises it sideways.
LEG_POSES = {  # trunk bend, stride (fore and aft), swing, spread, knee
    "stand": ((-5, 10), (0, 5), (-3, 8), (2, 12), (0, 12)),
    "walk": ((0, 15), (15, 38), (-3, 5), (0, 6), (5, 40)),
    "sit": ((-5, 25), (0, 8), (70, 95), (3, 25), (65, 110)),
    "wide": ((-5, 10), (0, 10), (-5, 10), (15, 42), (0, 25)),
    "bend": ((40, 85), (0, 10), (-5, 10), (2, 15), (0, 20)),
    "crouch": ((10, 45), (0, 20), (75, 110), (5, 35), (90, 140)),
}
LEG_POSE_CHANCES = (0.4, 0.25, 0.15, 0.1, 0.05, 0.05)
ARM_POSES = {  # swing, spread, elbow (swing of the forearm), spread of the forearm
    "down": ((-20, 25), (5, 25), (0, 50), (-10, 10)),
    "forward": ((40, 110), (0, 20), (0, 70), (-20, 10)),
    "side": ((-10, 20), (55, 110), (0, 40), (-15, 60)),
    "up": ((-10, 20), (125, 178), (0, 20), (-20, 50)),
    "akimbo": ((-15, 10), (35, 55), (0, 20), (-95, -60)),
}
ARM_POSE_CHANCES = (0.4, 0.15, 0.15, 0.15, 0.15)

# Hues as OpenCV counts them, 0..179. Blue is left, orange is right.
BLUE, ORANGE, SKIN = (100, 118), (8, 18), (5, 15)
GREEN, PURPLE, MAGENTA, ANY_HUE = (40, 85), (130, 160), (148, 152), (0, 179)
# People wear suits with markers, as for motion capture: shoulder, elbow, wrist, hip, knee, ankle.
JOINT_HUES = (28, 68, 163, 46, 92, 176)

JPEG_QUALITY = (  # colour at full resolution: a nose has few pixels
    *(cv2.IMWRITE_JPEG_QUALITY, 92),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
)
CIRCLE = np.array([(np.cos(t), np.sin(t)) for t in np.arange(20) * np.pi / 10])

Colour = tuple[int, int, int]  # BGR, 0..255
Range = tuple[float, float]
Size = tuple[int, int]  # width, height
Random = np.random.Generator


@dataclass(frozen=True)
class Blob:
    """The convex hull of discs, in one colour: a ball, a tapered limb, a torso, a box.

    Attributes:
        centres: (n, 2) pixels.
        radii: (n,) pixels.
        colour: its paint.
        part: the body part it shows, below `NUM_PARTS`; of no meaning in clutter.
    """

    centres: np.ndarray
    radii: np.ndarray
    colour: Colour
    part: int = 0

    @cached_property
    def polygon(self) -> np.ndarray:
        """Its outline, (M, 1, 2) int32, in sixteenths of a pixel."""
        points = (self.centres[:, None] + self.radii[:, None, None] * CIRCLE).reshape(-1, 2)
        return np.rint(16 * cv2.convexHull(points.astype(np.float32))).astype(np.int32)

    def paint(self, canvas: np.ndarray, value: Colour | int, line_type: int = cv2.LINE_8) -> None:
        """Fill the hull on `canvas`, (H, W) or (H, W, 3) uint8, in place."""
        cv2.fillConvexPoly(canvas, self.polygon, value, line_type, shift=4)


@dataclass(frozen=True)
class Figure:
    """A person in the image.

    Attributes:
        keypoints: (17, 2) pixels.
        exposed: (17,) bool, False for a nose, eye or ear on the far side of its own head.
        blobs: its body, from far to near.
    """

    keypoints: np.ndarray
    exposed: np.ndarray
    blobs: list[Blob]


@dataclass(frozen=True)
class Scene:
    """What stands in an image of `height` x `width` pixels, from far to near in each list."""

    height: int
    width: int
    figures: list[Figure]
    behind: list[Blob]
    in_front: list[Blob]


def sample_body(rng: np.random.Generator) -> np.ndarray:
    """Pose a body by forward kinematics.

    Returns:
        (24, 3) points as (left, up, front) over stature, the pelvis at the origin.
    """
    trunk_bend, stride, *leg_ranges = LEG_POSES[rng.choice(list(LEG_POSES), p=LEG_POSE_CHANCES)]
    bend, stride_angle = rng.uniform(*trunk_bend), rng.uniform(*stride) * rng.choice([-1, 1])
    trunk = _rotation(2, rng.normal(0, 6)) @ _rotation(0, bend)
    head = trunk @ _rotation(1, rng.normal(0, 20)) @ _rotation(0, rng.normal(0, 8) - 0.7 * bend)
    length = {name: mean * rng.uniform(0.9, 1.1) for name, mean in LENGTHS.items()}

    body = np.zeros((NUM_POINTS, 3))
    body[NECK] = trunk @ [0, length["torso"], 0]
    body[SKULL] = body[NECK] + trunk @ [0, NECK_LENGTH, 0]
    body[: len(FACE_SHAPE)] = body[SKULL] + SKULL_RADIUS * FACE_SHAPE @ head.T
    body[FACE] = body[SKULL] + SKULL_RADIUS * head @ [0, -0.12, 0.35]
    for side, sign in enumerate((1, -1)):
        arm_ranges = ARM_POSES[rng.choice(list(ARM_POSES), p=ARM_POSE_CHANCES)]
        swing, spread, elbow, elbow_spread = (rng.uniform(*angles) for angles in arm_ranges)
        swing += rng.uniform(0, 1) * bend - 0.7 * stride_angle * sign
        forearm = trunk @ _direction(sign, swing + elbow, spread + elbow_spread)
        body[SHOULDERS[side]] = body[NECK] + trunk @ [sign * length["shoulder"], -0.02, 0]
        upper_arm = trunk @ _direction(sign, swing, spread)
        body[ELBOWS[side]] = body[SHOULDERS[side]] + upper_arm * length["upper_arm"]
        body[WRISTS[side]] = body[ELBOWS[side]] + forearm * length["forearm"]
        body[HANDS[side]] = body[WRISTS[side]] + forearm * 0.035

        swing, spread, knee = (rng.uniform(*angles) for angles in leg_ranges)
        swing += stride_angle * sign
        body[HIPS[side]] = sign * length["hip"], 0, 0
        thigh, shin = _direction(sign, swing, spread), _direction(sign, swing - knee, spread)
        foot = _direction(sign, swing - knee + 75, spread + 10)
        body[KNEES[side]] = body[HIPS[side]] + thigh * length["thigh"]
        body[ANKLES[side]] = body[KNEES[side]] + shin * length["shin"]
        body[TOES[side]] = body[ANKLES[side]] + foot * 0.07
    return body


def sample_view(rng: np.random.Generator) -> np.ndarray:
    """Sample how a body is seen.

    Returns:
        Rotation (3, 3) from its (left, up, front) to the image's (right, down, towards the viewer).
    """
    front, any_side, back = rng.normal(0, 25), rng.uniform(-110, 110), rng.normal(180, 25)
    upright, upside_down = rng.normal(0, 10), rng.normal(180, 20)
    lying = rng.normal(90, 15) * rng.choice([-1, 1])
    yaw = rng.choice([front, any_side, back], p=(0.7, 0.15, 0.15))
    roll = rng.choice([upright, lying, upside_down], p=(0.9, 0.05, 0.05))
    pitch = rng.normal(0, 8)
    return _rotation(2, roll) @ np.diag([1, -1, 1]) @ _rotation(0, pitch) @ _rotation(1, yaw)


def dress(rng: np.random.Generator, body: np.ndarray, stature: float) -> Figure:
    """Give a posed body its girth and colours.

    Args:
        rng: source of girth and colours.
        body: (24, 3) pixels: right, down, towards the viewer.
        stature: in pixels.
    """
    girth = stature * rng.uniform(0.9, 1.15)
    skin = _colour(rng, SKIN, (50, 140), (120, 245))
    hair = _colour(rng, ANY_HUE, (30, 160), (15, 100))
    shirt = _colour(rng, GREEN if rng.random() < 0.5 else PURPLE, (20, 200), (60, 240))
    layers: list[tuple[float, Blob]] = []

    def add(
        points: Sequence[int],
        radii: Sequence[float],
        colour: Colour,
        part: int,
        lift: float = 0.02,
        markers: Sequence[Colour] = (),
    ) -> float:
        """Add a blob, radii and lift (towards the viewer) over stature; return its depth."""
        depth = float(body[list(points), 2].mean() + lift * stature)
        discs = body[list(points), :2], np.array(radii) * girth
        layers.append((depth, Blob(*discs, colour, part)))
        for centre, radius, marker in zip(*discs, markers, strict=False):
            layers.append((depth, Blob(centre[None], 0.75 * radius[None], marker, part)))
        return depth

    add((*SHOULDERS, *HIPS), (0.035, 0.035, 0.045, 0.045), shirt, TORSO, lift=0)
    add((NECK, SKULL), (0.03, 0.03), skin, TORSO, lift=0)
    skull = add((SKULL,), (SKULL_RADIUS,), hair, HEAD)
    face = add((FACE,), (0.85 * SKULL_RADIUS,), skin, HEAD)
    magenta = _colour(rng, MAGENTA, (200, 255), (180, 255))
    exposed = np.ones(NUM_KEYPOINTS, bool)
    exposed[NOSE] = add((NOSE,), (0.018,), magenta, HEAD, lift=0.04) > max(skull, face)
    for side, hue in enumerate((BLUE, ORANGE)):
        dark = _colour(rng, hue, (220, 255), (60, 130))
        bright = _colour(rng, hue, (180, 255), (150, 255))
        exposed[EYES[side]] = add((EYES[side],), (0.019,), dark, HEAD) > max(skull, face)
        exposed[EARS[side]] = add((EARS[side],), (0.027,), bright, HEAD, lift=0.05) > skull

        shoulder, elbow, wrist, hip, knee, ankle = (
            _colour(rng, (hue - 3, hue + 3), (180, 255), (190, 255)) for hue in JOINT_HUES
        )
        sleeve, lift = _colour(rng, hue, (150, 255), (110, 220)), rng.normal(0.02, 0.02)
        upper, lower = (SHOULDERS[side], ELBOWS[side]), (ELBOWS[side], WRISTS[side])
        add(upper, (0.036, 0.029), sleeve, UPPER_ARM[side], lift, (shoulder, elbow))
        add((WRISTS[side], HANDS[side]), (0.018, 0.025), skin, FOREARM[side], lift)
        add(lower, (0.028, 0.021), _shade(sleeve, 1.25), FOREARM[side], lift, (elbow, wrist))

        trouser, lift = _colour(rng, hue, (150, 255), (90, 200)), rng.normal(0.01, 0.01)
        upper, lower = (HIPS[side], KNEES[side]), (KNEES[side], ANKLES[side])
        add(upper, (0.048, 0.036), trouser, THIGH[side], lift, (hip, knee))
        add((ANKLES[side], TOES[side]), (0.026, 0.018), _shade(trouser, 0.3), SHIN[side], lift)
        add(lower, (0.034, 0.025), _shade(trouser, 1.25), SHIN[side], lift, (knee, ankle))

    blobs = [blob for _, blob in sorted(layers, key=lambda layer: layer[0])]
    return Figure(body[:NUM_KEYPOINTS, :2], exposed, blobs)


def sample_figure(
    rng: np.random.Generator, image_wh: np.ndarray, size: float, boxes: list[np.ndarray]
) -> Figure | None:
    """Sample a person and a place for it, mostly inside the image and mostly clear of others.

    Args:
        rng: source of everything.
        image_wh: (2,) width and height of the image, pixels.
        size: longer side of the whole figure over the image height.
        boxes: (4,) x0 y0 x1 y1 of the people already placed; the new one is appended.

    Returns:
        The figure, or None where no such place was found.
    """
    body = sample_body(rng) @ sample_view(rng).T
    low = np.minimum(body[:, :2].min(axis=0), body[SKULL, :2] - SKULL_RADIUS) - 0.02
    high = np.maximum(body[:, :2].max(axis=0), body[SKULL, :2] + SKULL_RADIUS) + 0.02
    stature = min(size * image_wh[1] / (high - low).max(), (0.97 * image_wh / (high - low)).min())
    extent = (high - low) * stature
    overhang = extent * (0.45 if rng.random() < 0.25 else 0)  # beyond the border
    max_overlap = 0.6 if rng.random() < 0.35 else 0.1
    for _ in range(12):
        corner = rng.uniform(-overhang, image_wh - extent + overhang)
        box = np.concatenate([corner, corner + extent])
        if all(_overlap(box, other) <= max_overlap for other in boxes):
            boxes.append(box)
            body[:, :2] += corner / stature - low
            return dress(rng, body * stature, stature)
    return None


def sample_clutter(rng: np.random.Generator, image_wh: np.ndarray, size: Range) -> list[Blob]:
    """Sample one thing that is not a person: a ball, box, stick, limb or head without a face.

    Args:
        rng: source of everything.
        image_wh: (2,) width and height of the image, pixels.
        size: range of its length over the image's longer side.
    """
    length = rng.uniform(*size) * image_wh.max()
    turn = _rotation(2, rng.uniform(0, 360))[:2, :2]
    place = rng.uniform(0, image_wh)
    colour = _colour(rng, ANY_HUE, (0, 255), (30, 255))
    kind = rng.choice(["ball", "box", "stick", "limb", "head"])
    if kind == "ball":
        return [Blob(place[None], np.array([length / 3]), colour)]
    if kind == "box":
        corners = (
            np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * length * rng.uniform(0.15, 0.5, 2)
        )
        return [Blob(place + corners @ turn, np.full(4, 1.0), colour)]
    if kind == "stick":
        ends = np.array([(-0.5, 0), (0.5, 0)]) * length
        return [Blob(place + ends @ turn, np.full(2, length * rng.uniform(0.02, 0.06)), colour)]
    if kind == "limb":
        colour = _colour(rng, BLUE if rng.random() < 0.5 else ORANGE, (150, 255), (90, 230))
        joints = (
            place + np.array([(-0.5, 0), (0, rng.uniform(-0.4, 0.4)), (0.5, 0)]) * length @ turn
        )
        upper = Blob(joints[:2], length * np.array([0.11, 0.09]), colour)
        lower = Blob(joints[1:], length * np.array([0.09, 0.07]), _shade(colour, 1.25))
        return [upper, lower, Blob(joints[1:2], np.array([length * 0.05]), _shade(colour, 0.5))]
    skull, face = np.array([length / 4]), place + [[0.05 * length, 0]] @ turn
    skin = _colour(rng, SKIN, (50, 140), (120, 245))
    return [Blob(place[None], skull, _shade(colour, 0.4)), Blob(face, 0.8 * skull, skin)]


def sample_scene(rng: np.random.Generator, image_size: int) -> Scene:
    """Sample the people and things of an image whose longer side has `image_size` pixels."""
    aspect_ratio = rng.choice(ASPECT_RATIOS)
    image_wh = np.rint(image_size * np.array([min(1, aspect_ratio), min(1, 1 / aspect_ratio)]))
    num_people = int(rng.integers(1, MAX_PEOPLE + 1))
    smallest, largest = SIZE_RANGE
    sizes = rng.uniform(smallest, largest / max(1, num_people / 2) ** 0.5, num_people)
    boxes: list[np.ndarray] = []
    placed = [sample_figure(rng, image_wh, size, boxes) for size in sorted(sizes, reverse=True)]
    figures = [figure for figure in reversed(placed) if figure is not None]  # small ones are far
    if rng.random() < 0.3:
        figures = [figures[i] for i in rng.permutation(len(figures))]
    behind = [sample_clutter(rng, image_wh, (0.1, 0.6)) for _ in range(rng.integers(3, 11))]
    in_front = [sample_clutter(rng, image_wh, (0.05, 0.3)) for _ in range(rng.integers(0, 3))]
    width, height = image_wh.astype(int).tolist()
    things = (list(itertools.chain.from_iterable(blobs)) for blobs in (behind, in_front))
    return Scene(height, width, figures, *things)


def paint_labels(scene: Scene) -> np.ndarray:
    """Paint who is where.

    Returns:
        (H, W) uint8: 1 + `NUM_PARTS` * figure + part, `CLUTTER` in front of people, else 0.
    """
    labels = np.zeros((scene.height, scene.width), np.uint8)
    for index, figure in enumerate(scene.figures):
        for blob in figure.blobs:
            blob.paint(labels, 1 + NUM_PARTS * index + blob.part)
    for blob in scene.in_front:
        blob.paint(labels, CLUTTER)
    return labels


def paint_picture(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Picture (H, W, 3) uint8, BGR, on a textured background and with noise."""
    picture = paint_background(rng, scene.height, scene.width)
    figures = (blob for figure in scene.figures for blob in figure.blobs)
    for blob in (*scene.behind, *figures, *scene.in_front):
        blob.paint(picture, blob.colour, cv2.LINE_AA)
    strength = int(rng.integers(1, 10))
    noise = rng.integers(0, 2 * strength + 1, picture.shape, dtype=np.uint8)
    return cv2.subtract(cv2.add(picture, noise), np.full_like(picture, strength))


def paint_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Background (H, W, 3) uint8, BGR: patches of three sizes, sometimes striped."""
    cells = int(rng.integers(20, 90))
    texture = np.full((cells, cells, 3), rng.uniform(40, 215), np.float32)
    for size, strength in ((2, 40), (7, 20), (cells, rng.uniform(2, 20))):
        patches = rng.normal(0, strength, (size, size, 3)) * 0.5 + rng.normal(
            0, strength, (size, size, 1)
        )
        texture += cv2.resize(patches.astype(np.float32), (cells, cells))
    background = cv2.resize(texture.clip(0, 255).astype(np.uint8), (width, height))
    if rng.random() < 0.3:
        slope, period, shade = rng.uniform(-2, 2), rng.uniform(8, 60), rng.integers(10, 50)
        stripes = (np.arange(width) + slope * np.arange(height)[:, None]) % period < period / 2
        background = cv2.subtract(background, cv2.merge([stripes * np.uint8(shade)] * 3))
    return background


def visibility(scene: Scene, labels: np.ndarray) -> np.ndarray:
    """COCO's v of every keypoint, (N, 17): 0 outside the image, 1 covered by anything, 2 seen."""
    flags = np.zeros((len(scene.figures), NUM_KEYPOINTS), int)
    for index, figure in enumerate(scene.figures):
        inside = (figure.keypoints >= 0) & (figure.keypoints <= (scene.width - 1, scene.height - 1))
        for k in np.flatnonzero(inside.all(axis=1)):
            x, y = np.rint(figure.keypoints[k]).astype(int)
            part = int(labels[y, x]) - 1 - NUM_PARTS * index
            flags[index, k] = 2 if figure.exposed[k] and part in CARRIERS[k] else 1
    return flags


def annotate(scene: Scene, labels: np.ndarray) -> list[dict[str, Any]]:
    """COCO annotations of a scene's figures, without ids."""
    annotations = []
    for index, (figure, flags) in enumerate(
        zip(scene.figures, visibility(scene, labels), strict=True)
    ):
        first = 1 + NUM_PARTS * index
        mask = ((labels >= first) & (labels < first + NUM_PARTS)).view(np.uint8)
        keypoints = np.column_stack([figure.keypoints.round(2), flags]) * (flags > 0)[:, None]
        annotations.append(
            {
                "category_id": 1,
                "iscrowd": 0,
                "area": cv2.countNonZero(mask),
                "bbox": list(cv2.boundingRect(mask)),
                "num_keypoints": int((flags > 0).sum()),
                "keypoints": keypoints.ravel().tolist(),
            }
        )
    return annotations


def make_image(
    seed: int, split: str, index: int, image_size: int = IMAGE_SIZE
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Make one image of a split.

    Returns:
        The picture, (H, W, 3) uint8 BGR, and its COCO annotations without ids.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    scene = sample_scene(rng, image_size)
    while True:
        labels = paint_labels(scene)
        clear = (visibility(scene, labels) == 2).sum(axis=1) >= MIN_VISIBLE_KEYPOINTS
        if clear.all() and scene.figures:
            return paint_picture(rng, scene), annotate(scene, labels)
        figures = list(itertools.compress(scene.figures, clear))
        scene = replace(scene, figures=figures) if figures else sample_scene(rng, image_size)


def build_synthetic_people(
    root: str | os.PathLike[str],
    split: str,
    num_images: int | None = None,
    image_size: int = IMAGE_SIZE,
    seed: int = 0,
    num_workers: int | None = None,
) -> Path:
    """Write a split as a COCO folder, unless the very same is there already.

    The images are `<root>/synthetic_people/<split>/*.jpg`. They are made in a folder beside it, and
    the json is put in place last: a json that exists describes a whole set. Processes that ask at
    the same time wait for the first.

    Args:
        root: folder of data sets, made where missing.
        split: "train"; "val", for figures to report; "holdout", for choices to make.
        num_images: None for the split's default.
        image_size: longer side in pixels.
        seed: other seeds give other images; the splits of a seed never share one.
        num_workers: processes; None for one per processor. It does not change the images.

    Returns:
        `<root>/synthetic_people/annotations/person_keypoints_<split>.json`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    info = {
        "description": "synthetic people",
        "version": GENERATOR_VERSION,
        "num_images": SPLITS[split] if num_images is None else num_images,
        "image_size": image_size,
        "seed": seed,
    }
    folder = Path(root) / "synthetic_people"
    json_file = folder / "annotations" / f"person_keypoints_{split}.json"
    with file_lock(str(json_file)):
        if not (json_file.exists() and json.loads(json_file.read_text())["info"] == info):
            _write_split(folder, split, json_file, info, num_workers or os.cpu_count() or 1)
    return json_file


def build_noisy_people(root: str | os.PathLike[str]) -> Path:
    """Write the annotations of "train" once more, as imprecise as those of COCO's annotators.

    COCO's OKS sigmas are how far annotators of the same picture are apart: sigma^2 = E[d^2 / area].
    So each labelled keypoint is moved by a normal distribution of that width, a few pixels, but
    stays inside the image. Pictures, boxes and areas are those of "train", which is built if need
    be.

    Args:
        root: folder of data sets.

    Returns:
        `<root>/synthetic_people/annotations/person_keypoints_train_noisy.json`.
    """
    from pycocotools.cocoeval import Params

    sigmas = Params("keypoints").kpt_oks_sigmas

    def change(keypoints: np.ndarray, person: dict[str, Any], size: Size, rng: Random) -> None:
        width = sigmas * (person["area"] / 2) ** 0.5  # of x and of y, pixels
        xy = keypoints[:, :2] + rng.normal(size=(NUM_KEYPOINTS, 2)) * width[:, None]
        xy = xy.clip(0, np.subtract(size, 1)).round(2)
        keypoints[:, :2] = np.where(keypoints[:, 2:] > 0, xy, 0)

    return _write_variant(root, "noisy", change)


def build_partial_people(root: str | os.PathLike[str]) -> Path:
    """Write the annotations of "train" once more, with gaps as in COCO's.

    A third of the labelled keypoints of each person lose their label: those that lie farthest in a
    direction of its own, as if the person were cut there. Pictures, boxes and areas are those of
    "train", which is built if need be.

    Args:
        root: folder of data sets.

    Returns:
        `<root>/synthetic_people/annotations/person_keypoints_train_partial.json`.
    """

    def change(keypoints: np.ndarray, _: dict[str, Any], __: Size, rng: Random) -> None:
        direction = rng.normal(size=2)  # before the next line: as many numbers for each person
        labelled = np.flatnonzero(keypoints[:, 2])
        order = labelled[np.argsort(keypoints[labelled, :2] @ direction)]
        keypoints[order[len(order) - len(order) // 3 :]] = 0

    return _write_variant(root, "partial", change)


def _write_variant(
    root: str | os.PathLike[str],
    name: str,
    change: Callable[[np.ndarray, dict[str, Any], Size, Random], None],
) -> Path:
    """Write "train" with other keypoints.

    Args:
        root: folder of data sets.
        name: of the variant.
        change: changes the keypoints (17, 3) of a person in an image of a size (width, height).
    """
    json_file = build_synthetic_people(root, "train")
    coco = json.loads(json_file.read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    rng = np.random.default_rng(coco["info"]["seed"])
    for person in coco["annotations"]:
        keypoints = np.array(person["keypoints"]).reshape(NUM_KEYPOINTS, 3)
        change(keypoints, person, sizes[person["image_id"]], rng)
        person["keypoints"] = keypoints.ravel().tolist()
        person["num_keypoints"] = int((keypoints[:, 2] > 0).sum())
    json_file = json_file.with_name(f"person_keypoints_train_{name}.json")
    with file_lock(str(json_file)):
        _write_json(json_file, coco)
    return json_file


def _write_json(path: Path, coco: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(coco))
    partial.replace(path)


def _write_split(
    folder: Path, split: str, json_file: Path, info: dict[str, Any], num_workers: int
) -> None:
    partial_folder = folder / f".{split}.partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    category = {"id": 1, "name": "person", "supercategory": "person"}
    category |= {"keypoints": KEYPOINT_NAMES, "skeleton": [[i + 1, j + 1] for i, j in SKELETON]}
    coco: dict[str, Any] = {"info": info, "images": [], "annotations": [], "categories": [category]}
    job = Job(str(partial_folder), split, info["num_images"], info["image_size"], info["seed"])
    records = job.run() if num_workers == 1 else _run_in_processes(job, num_workers)
    for image, people in tqdm(records, f"synthetic people, {split}", job.num_images, unit="image"):
        coco["images"].append(image)
        for annotation in people:
            ids = {"id": len(coco["annotations"]) + 1, "image_id": image["id"]}
            coco["annotations"].append({**ids, **annotation})
    json_file.unlink(missing_ok=True)
    shutil.rmtree(folder / split, ignore_errors=True)
    partial_folder.replace(folder / split)
    _write_json(json_file, coco)
    logger.info(
        "Wrote %d images with %d people to %s",
        len(coco["images"]),
        len(coco["annotations"]),
        folder / split,
    )


@dataclass(frozen=True)
class Job:
    """Images `first`, `first + step`, ... of a split, to be written to a folder."""

    folder: str
    split: str
    num_images: int
    image_size: int
    seed: int
    first: int = 0
    step: int = 1

    def run(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Write the images; yield the COCO record and annotations of each."""
        for index in range(self.first, self.num_images, self.step):
            picture, annotations = make_image(self.seed, self.split, index, self.image_size)
            path = Path(self.folder, f"{index:06d}.jpg")
            if not cv2.imwrite(str(path), picture, JPEG_QUALITY):
                raise OSError(f"could not write {path}")
            height, width = picture.shape[:2]
            image = {"id": index + 1, "file_name": path.name, "height": height, "width": width}
            yield image, annotations


def _run_in_processes(job: Job, num_workers: int) -> Iterator[Any]:
    """Run a job in processes that take turns; yield what `Job.run` yields, in the same order.

    Each runs this file and prints a line of json per image. Unlike `multiprocessing` this neither
    imports the caller's script again (one without a main guard would then wait for our own lock)
    nor forks a process that has threads.
    """
    processes = []
    try:
        for first in range(num_workers):
            share = json.dumps(asdict(replace(job, first=first, step=num_workers)))
            command = [sys.executable, __file__, "--job", share]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for index in range(job.num_images):
            process = processes[index % num_workers]
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise RuntimeError(f"a process that makes images ended with code {process.wait()}")
            yield json.loads(line)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _colour(rng: np.random.Generator, hue: Range, saturation: Range, value: Range) -> Colour:
    hsv = [[[rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value)]]]
    blue, green, red = cv2.cvtColor(np.array(hsv, np.uint8), cv2.COLOR_HSV2BGR)[0, 0].tolist()
    return blue, green, red


def _shade(colour: Colour, factor: float) -> Colour:
    blue, green, red = (min(255, int(channel * factor)) for channel in colour)
    return blue, green, red


def _direction(sign: int, swing: float, spread: float) -> np.ndarray:
    """Unit vector (left, up, front) of a limb; `sign` 1 is left, -1 right; angles in degrees."""
    swing, spread = np.deg2rad(swing), np.deg2rad(spread)
    forward = np.cos(spread) * np.array([0, -np.cos(swing), np.sin(swing)])
    return np.array([sign * np.sin(spread), 0, 0]) + forward


def _rotation(axis: int, degrees: float) -> np.ndarray:
    """Rotation matrix (3, 3) about a coordinate axis."""
    return cv2.Rodrigues(np.deg2rad(degrees) * np.eye(3)[axis])[0]


def _overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Intersection over the smaller area of two boxes (x0, y0, x1, y1)."""
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    areas = [np.prod(b[2:] - b[:2]) for b in (box, other)]
    return float(np.prod(sides.clip(min=0)) / min(areas))


def main() -> None:
    """Build a split from the command line."""
    if sys.argv[1:2] == ["--job"]:  # one of our own processes
        for record in Job(**json.loads(sys.argv[2])).run():
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()
        return
    parser = argparse.ArgumentParser(description="Make a set of synthetic people.")
    parser.add_argument("--output", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--split", choices=list(SPLITS), default="train")
    parser.add_argument("--num-images", type=int, help="default: 4000 for train, 300 for val")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build_synthetic_people(args.output, args.split, args.num_images)


if __name__ == "__main__":
    main()
