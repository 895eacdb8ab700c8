"""Pictures of poses, and of what the KP-Nets see, drawn with OpenCV.

Points are continuous (x, y) image pixels as everywhere here; OpenCV counts from the first pixel's
centre, so half a pixel is taken off where it is called.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances

from ..data.keypoint_names import side_of

# BGR. The paper's figure 2: left body blue, right body orange, the nose magenta.
LEFT, RIGHT, MIDDLE = (255, 130, 40), (0, 140, 255), (255, 0, 255)
ACROSS = (230, 230, 230)  # connections between left and right
DARK, WHITE = (25, 25, 25), (255, 255, 255)
# Connections that COCO's skeleton has and Detectron2's rules leave out.
TRUNK = (("left_shoulder", "left_hip"), ("right_shoulder", "right_hip"))
LIMBS_PER_SIZE = 60  # longer side of a pose over the thickness of its limbs
SIZE_ALONE = 120  # pixels, taken for a person of whom one keypoint is drawn
COVER = 0.6  # opacity of a map's peak over the picture
PANEL_WIDTH, MIN_COLUMNS = 150, 6  # of the maps below the picture, pixels, at least
FONT = cv2.FONT_HERSHEY_SIMPLEX
SHIFT = 4  # OpenCV takes points in 1/16 pixel
FAR = 1e5  # pixels; points beyond would not fit into OpenCV's integers

Color = tuple[int, int, int]


def draw_poses(
    image: np.ndarray,
    instances: Instances,
    *,
    metadata: Metadata,
    keypoint_threshold: float = 0.05,
    boxes: bool = False,
    scores: bool = False,
) -> np.ndarray:
    """Draw poses in the colours of the paper's figure 2.

    Limbs and joints grow with the person. Their opacity is the square root of the keypoint's
    score, of a limb the lower one of its ends: a good peak often shares its probability with the
    cells beside it. The first pose is on top. The limbs of tracked poses have one colour a track.
    Hidden keypoints are hollow: white with a coloured rim.

    Args:
        image: (H, W, 3) BGR uint8; not changed.
        instances: N poses with pred_keypoints (N, K, 3): x, y in pixels of the image and a score
            in [0, 1]; points that are not finite are left out. pred_boxes and scores if asked for;
            pred_track_ids (N,) and pred_visibility (N, K) if there: below 0.5 is hidden.
        metadata: of the data set, with keypoint_names and keypoint_connection_rules (Detectron2's;
            the rules' own colours are not used). The side in a name (:func:`side_of`) decides the
            colour; where no name has one, each keypoint and limb has its own.
            Without names the keypoints alone are drawn.
        keypoint_threshold: keypoints with a lower score are not drawn.
        boxes: whether to draw pred_boxes.
        scores: whether to write scores, and before them the numbers of tracks, at a side of
            pred_boxes where they cover no keypoint if there is one.

    Returns:
        (H, W, 3) BGR uint8, a new image.

    Raises:
        ValueError: the image or the keypoints have another form, or as many names as keypoints
            there are not.
    """
    _check_image(image)
    canvas = np.ascontiguousarray(image).copy()
    keypoints = instances.pred_keypoints.detach().cpu().numpy().astype(np.float64)
    if keypoints.ndim != 3 or keypoints.shape[2] != 3:
        raise ValueError(f"pred_keypoints: expected (N, K, 3), got {keypoints.shape}")
    names = keypoint_names(metadata, keypoints.shape[1])
    hidden = np.zeros(keypoints.shape[:2], dtype=bool)
    if instances.has("pred_visibility"):
        hidden = instances.pred_visibility.detach().cpu().numpy() < 0.5
    limbs = _limbs(metadata, names)
    tracks = instances.pred_track_ids.tolist() if instances.has("pred_track_ids") else None
    colors = [_color_of(name) for name in names]
    if MIDDLE in colors and set(colors) == {MIDDLE}:  # no name has a side: each in its own colour
        colors = _distinct(len(names))
        own = _distinct(len(limbs))
        limbs = [(a, b, color) for (a, b, _), color in zip(limbs, own, strict=True)]
    for i in reversed(range(len(keypoints))):
        drawn = np.isfinite(keypoints[i]).all(axis=1) & (keypoints[i, :, 2] >= keypoint_threshold)
        if boxes:
            _draw_box(canvas, instances.pred_boxes.tensor[i].tolist())
        if tracks is not None:
            limbs = [(first, second, _color_of_track(tracks[i])) for first, second, _ in limbs]
        _draw_pose(canvas, keypoints[i], drawn, hidden[i], colors, limbs)
    if scores:  # after all persons, lest limbs cover them
        drawn = np.isfinite(keypoints).all(axis=2) & (keypoints[..., 2] >= keypoint_threshold)
        taken = [*keypoints[drawn][:, :2]]
        for i, box in enumerate(instances.pred_boxes.tensor.tolist()):
            if np.isfinite(box).all():
                number = "" if tracks is None else f"#{tracks[i]} "
                taken += _write(canvas, f"{number}{instances.scores[i].item():.2f}", box, taken)
    return canvas


def keypoint_names(metadata: Metadata, num_keypoints: int) -> list[str]:
    """Names of the K keypoints; their numbers where the metadata has none.

    Raises:
        ValueError: there are names, but not K.
    """
    names = list(metadata.get("keypoint_names") or map(str, range(num_keypoints)))
    if len(names) != num_keypoints:
        raise ValueError(
            f"the poses have {num_keypoints} keypoints, but the data set {metadata.get('name')!r} "
            f"names {len(names)}: take the metadata of the data set that the model was trained on"
        )
    return names


def _check_image(image: np.ndarray) -> None:
    """Refuse what is no (H, W, 3) uint8 array."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")


def _color_of(name: str) -> Color:
    """Colour of a keypoint by the side in its name."""
    return {"left": LEFT, "right": RIGHT, "": MIDDLE}[side_of(name)[0]]


def _color_of_track(number: int) -> Color:
    """Colour of a track by its number, far from those of the numbers beside it."""
    blue, green, red = _hues(number + 1)[-1].astype(int).tolist()
    return blue, green, red


def _limbs(metadata: Metadata, names: list[str]) -> list[tuple[int, int, Color]]:
    """Connections as numbers of two keypoints and a colour.

    A connection has the colour of its side; one from the middle, as from the nose to an eye, that
    of its other end.
    """
    rules = [rule[:2] for rule in metadata.get("keypoint_connection_rules") or ()]
    limbs = []
    for first, second in dict.fromkeys((*TRUNK, *rules)):
        if first in names and second in names:
            colors = {_color_of(first), _color_of(second)}
            sides = colors - {MIDDLE} or colors
            color = sides.pop() if len(sides) == 1 else ACROSS
            limbs.append((names.index(first), names.index(second), color))
    return limbs


def _draw_pose(
    canvas: np.ndarray,
    keypoints: np.ndarray,
    drawn: np.ndarray,
    hidden: np.ndarray,
    colors: list[Color],
    limbs: list[tuple[int, int, Color]],
) -> None:
    """Draw a pose: its limbs, then its joints.

    Args:
        canvas: (H, W, 3) uint8; changed.
        keypoints: (K, 3) x, y in pixels, score.
        drawn: (K,) bool, the keypoints to draw.
        hidden: (K,) bool, those to draw hollow.
        colors: of each keypoint.
        limbs: pairs of keypoints with a colour.
    """
    if not drawn.any():
        return
    points = np.clip(keypoints[:, :2], -FAR, FAR)
    opacity = np.sqrt(np.clip(keypoints[:, 2], 0, 1))
    size = np.ptp(points[drawn], axis=0).max() if drawn.sum() > 1 else SIZE_ALONE
    scale = max(min(size, *canvas.shape[:2]) / LIMBS_PER_SIZE, 0.8)  # points may lie far outside
    thickness = round(scale)
    radius = 0.75 * scale + 0.8
    rim = 0.25 * scale + 0.4

    for first, second, color in limbs:
        if drawn[first] and drawn[second]:
            strokes = ((DARK, thickness + 2), (color, thickness))
            _draw_limb(
                canvas, points[[first, second]], strokes, min(opacity[first], opacity[second])
            )
    for k in drawn.nonzero()[0]:
        discs = [(DARK, radius + rim + 0.7), (WHITE, radius + rim), (colors[k], radius)]
        if hidden[k]:
            discs[1:] = [(colors[k], radius + rim), (WHITE, 0.7 * radius)]
        _draw_joint(canvas, points[k], discs, opacity[k])


def _draw_limb(
    canvas: np.ndarray, ends: np.ndarray, strokes: Sequence[tuple[Color, int]], opacity: float
) -> None:
    """Lay lines of some colours and thicknesses over the canvas between two points (2, 2)."""
    part, origin = _part(canvas, ends, strokes[0][1])
    if part.size:
        layer = part.copy()
        a, b = (_fixed(point - origin) for point in ends)
        for color, thickness in strokes:
            cv2.line(layer, a, b, color, thickness, cv2.LINE_AA, SHIFT)
        cv2.addWeighted(layer, opacity, part, 1 - opacity, 0, dst=part)


def _draw_joint(
    canvas: np.ndarray, point: np.ndarray, discs: Sequence[tuple[Color, float]], opacity: float
) -> None:
    """Lay discs of some colours and radii over the canvas around a point (2,)."""
    part, origin = _part(canvas, point[None], math.ceil(discs[0][1]) + 1)
    if part.size:
        layer = part.copy()
        centre = _fixed(point - origin)
        for color, radius in discs:
            cv2.circle(layer, centre, round(radius * 2**SHIFT), color, -1, cv2.LINE_AA, SHIFT)
        cv2.addWeighted(layer, opacity, part, 1 - opacity, 0, dst=part)


def _part(canvas: np.ndarray, points: np.ndarray, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of the canvas around points (n, 2), a view, and its first pixel (x, y)."""
    size = canvas.shape[1::-1]
    low = np.clip(points.min(axis=0) - margin, 0, size).astype(int)
    high = np.clip(points.max(axis=0) + margin + 1, 0, size).astype(int)
    return canvas[low[1] : high[1], low[0] : high[0]], low


def _fixed(point: np.ndarray) -> tuple[int, int]:
    """A point as OpenCV takes it with ``SHIFT``."""
    x, y = np.rint((point - 0.5) * 2**SHIFT).astype(int).tolist()
    return x, y


def _draw_box(canvas: np.ndarray, box: Sequence[float]) -> None:
    """Draw the sides of a box x0, y0, x1, y1."""
    ends = np.clip(np.array(box).reshape(2, 2), -FAR, FAR)
    if np.isfinite(ends).all():
        thickness = max(1, round(max(canvas.shape[:2]) / 1600))
        low, high = map(_fixed, ends)
        for color, width in ((DARK, 3 * thickness), (WHITE, thickness)):
            cv2.rectangle(canvas, low, high, color, width, cv2.LINE_AA, SHIFT)


def _write(
    canvas: np.ndarray, text: str, box: Sequence[float], taken: Sequence[np.ndarray] = ()
) -> list[np.ndarray]:
    """Write white on a dark plate, moved so far that it lies inside the canvas.

    Args:
        canvas: (H, W, 3) uint8; changed.
        text: ASCII.
        box: x0, y0, x1, y1: the plate lies at that one of its sides where it covers the fewest of
            the points; below it if that is as good as another.
        taken: points (x, y), such as keypoints.

    Returns:
        The corners and the middle of the plate, which the next one had better not cover.
    """
    scale = max(0.35, max(canvas.shape[:2]) / 1500)
    thickness = max(1, round(1.5 * scale))
    (width, height), below = cv2.getTextSize(text, FONT, scale, thickness)
    width, height = width + 6, height + below + 4
    x0, y0, x1, y1 = box
    left, right = (x0 + x1 - width) / 2, x1 - width
    places = [(left, y1), (x0, y1), (right, y1), (left, y0 - height), (x1, y1 - height)]
    places += [(x0 - width, y1 - height), (x0, y0 - height), (right, y0 - height)]
    most = np.maximum([canvas.shape[1] - width, canvas.shape[0] - height], 0)
    corners = np.clip(places, 0, most).astype(int)
    points = np.reshape(taken, (-1, 2))
    inside = (points >= corners[:, None]) & (points <= corners[:, None] + (width, height))
    x, y = corners[inside.all(axis=2).sum(axis=1).argmin()].tolist()
    plate = canvas[y : y + height, x : x + width]
    plate[:] = plate // 4
    place = x + 3, y + height - below - 1
    cv2.putText(canvas, text, place, FONT, scale, WHITE, thickness, cv2.LINE_AA)
    grid = np.mgrid[0:3, 0:3].reshape(2, 9).T / 2
    return [*(grid * (width, height) + (x, y))]


def draw_keypoint_maps(
    image: np.ndarray,
    maps: np.ndarray,
    *,
    cell: tuple[float, float],
    metadata: Metadata,
    panels_of: Sequence[float] | None = None,
) -> np.ndarray:
    """Draw what the KP-Net of one person sees, as in the paper's figure 1.

    All maps lie over the darkened grey picture, each in its own hue, relative to its own peak: a
    map whose mass is spread over many cells would stay dark beside one with a sharp peak.

    Args:
        image: (H, W, 3) BGR uint8; not changed.
        maps: (K, h, w) softmax probabilities of
            :func:`inspose_d2.modeling.keypoint_maps.keypoint_maps_of`.
        cell: (width, height) of a map's cell in pixels of the image: that in column i and row j
            covers [i * width, (i + 1) * width) x [j * height, (j + 1) * height).
        metadata: of the data set, with keypoint_names.
        panels_of: box x0, y0, x1, y1 in pixels. Below the picture a panel for each map shows it
            alone in this part and a margin, with its name and its probability at the peak. None
            draws no panels.

    Returns:
        (H, W, 3) BGR uint8, a new image. With panels a small picture is enlarged so that six fit
        into a row, and the width is a multiple of theirs.

    Raises:
        ValueError: the image or the maps have another form, or as many names as maps there are
            not.
    """
    _check_image(image)
    if maps.ndim != 3 or not maps.size:
        raise ValueError(f"maps: expected (K, h, w), got {maps.shape}")
    names = keypoint_names(metadata, len(maps))
    hues = _hues(len(maps))
    peaks = maps.max(axis=(1, 2))
    light = (maps / np.maximum(peaks, 1e-12)[:, None, None]).astype(np.float32)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    frame = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
    columns = max(MIN_COLUMNS, image.shape[1] // PANEL_WIDTH)
    width = image.shape[1]
    if panels_of is not None:
        width = max(width, MIN_COLUMNS * PANEL_WIDTH) // columns * columns
    # Enlarging is linear: the sum of all maps in their hues is enlarged, not each of them.
    picture = _lit(grey, np.einsum("khw,kc->hwc", light, hues), cell, frame, width)
    if panels_of is None:
        return picture
    part = _with_margin(panels_of, frame)
    panels = []
    for one, hue, name, peak in zip(light, hues, names, peaks, strict=True):
        panel = _lit(grey, one[..., None] * hue, cell, part, width // columns)
        _write(panel, f"{name} {peak:.2f}", (0, 0, 0, 0))
        panels.append(panel)
    panels += [np.zeros_like(panels[0])] * (-len(panels) % columns)
    rows = [np.hstack(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    return np.vstack([picture, *rows])


def _hues(number: int) -> np.ndarray:
    """Colours (number, 3) BGR in [0, 255], neighbours far apart on the wheel (golden section)."""
    hue = (np.arange(number) * 0.618034 % 1 * 180).astype(np.uint8)
    hsv = np.stack([hue, np.full_like(hue, 200), np.full_like(hue, 255)], axis=1)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2BGR)[0].astype(np.float32)


def _distinct(number: int) -> list[Color]:
    """As many colours, BGR."""
    return [(int(b), int(g), int(r)) for b, g, r in _hues(max(number, 1))[:number]]


def _with_margin(box: Sequence[float], frame: tuple[float, float, float, float]) -> np.ndarray:
    """Widen a box by a fifth of its longer side, within the frame, to a pixel at least."""
    x0, y0, x1, y1 = box
    margin = 0.2 * max(x1 - x0, y1 - y0) + 1
    low = np.clip([x0 - margin, y0 - margin], 0, np.array(frame[2:]) - 1)
    return np.concatenate([low, np.clip([x1 + margin, y1 + margin], low + 1, frame[2:])])


def _lit(
    grey: np.ndarray,
    light: np.ndarray,
    cell: tuple[float, float],
    part: Sequence[float] | np.ndarray,
    width: int,
) -> np.ndarray:
    """Lay light over a part of a darkened picture.

    Args:
        grey: (H, W, 3) uint8.
        light: (h, w, 3) float32, of maps.
        cell: (width, height) of the maps' cells in pixels of the picture.
        part: x0, y0, x1, y1 in pixels of the picture.
        width: of the result.

    Returns:
        (height in proportion, width, 3) uint8.
    """
    x0, y0, x1, y1 = part
    step = (x1 - x0) / width  # pixels of the picture per pixel of the result
    size = (width, max(1, round((y1 - y0) / step)))

    def enlarged(source: np.ndarray, cell: tuple[float, float]) -> np.ndarray:
        # A pixel's centre x + 0.5 of the result lies at index (x0 + (x + 0.5) * step) / cell - 0.5.
        scale_x, scale_y = step / cell[0], step / cell[1]
        shift = (x0 + 0.5 * step) / cell[0] - 0.5, (y0 + 0.5 * step) / cell[1] - 0.5
        matrix = np.array([[scale_x, 0, shift[0]], [0, scale_y, shift[1]]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(source, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)

    shown = enlarged(light, cell).clip(0, 255)
    # The person is seen through the light.
    cover = COVER * shown.max(axis=2, keepdims=True) / 255
    lit = (1 - cover) * 0.6 * enlarged(grey, (1, 1)) + COVER * shown
    return lit.clip(0, 255).astype(np.uint8)
