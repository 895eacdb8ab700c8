"""What names of keypoints tell: sides, pairs that a mirror exchanges, colours of limbs."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

Pairs = Sequence[Sequence[str]]
SIDES = {"l": "left", "r": "right", "left": "left", "right": "right"}
SIDE_WORDS = (
    *(("left", "right"), ("l", "r"), ("links", "rechts"), ("izq", "der"), ("izquierd", "derech")),
    *(("gauche", "droit"), ("gauche", "droite"), ("sinistr", "destr"), ("esquerd", "direit")),
    *(("lewy", "prawy"), ("lewa", "prawa"), ("左", "右"), ("лев", "прав"), ("왼", "오른")),
)
OPPOSITE = {"left": "right", "right": "left"}
# Detectron2's Visualizer wants RGB; draw_poses has its own.
RULE_COLORS = {"left": (40, 130, 255), "right": (255, 140, 0), "": (230, 230, 230)}


def side_of(name: str) -> tuple[str, str]:
    """Side of a keypoint, "left", "right" or "", and what remains of its name.

    The side is a word of its own (``left_eye``, ``Eye-Left``, ``leftEye``, ``lefteye``), or an L or
    R at an end (``l_eye``, ``LEye``, ``eye_r``).
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    parts = re.sub(r"^(left|right)", r"\1_", words)
    found = [x for x in re.split(r"[\W_]+", parts) if x]
    for i, word in enumerate(found):
        is_letter = len(word) == 1
        if word in SIDES and not (is_letter and (0 < i < len(found) - 1 or len(found) == 1)):
            return SIDES[word], " ".join(found[:i] + found[i + 1 :])
    return "", " ".join(found)


def infer_flip_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (left, right) of names that differ in the side alone."""
    by_side = {side_of(name): name for name in names}
    return [
        (name, by_side["right", rest])
        for (side, rest), name in by_side.items()
        if side == "left" and ("right", rest) in by_side
    ]


def look_like_pair(names: Sequence[str], pairs: Pairs) -> Iterator[tuple[str, str]]:
    """Names in no pair that differ in a word for left and right alone, or in one letter L and R.

    Such as ``lsho`` and ``rsho``, ``wheel_fl`` and ``wheel_fr``, ``links`` and ``rechts``.
    """
    paired = {name for pair in pairs for name in pair}
    free = {name.lower(): name for name in names if name not in paired}
    for lowered, name in free.items():
        for left, right in SIDE_WORDS:
            others = {
                lowered[: x.start()] + right + lowered[x.end() :]
                for x in re.finditer(re.escape(left), lowered)
            }
            for other in sorted(others & free.keys()):
                yield name, free[other]


def wrong_flip_pairs(names: Sequence[str], pairs: Pairs) -> Iterator[str]:
    """What makes pairs no map that leads back to each keypoint when it is applied twice."""
    odd = [pair for pair in pairs if isinstance(pair, str) or len(set(pair)) != 2]
    if odd:
        yield f"{odd} are no pairs of two different keypoints"
        return
    in_pairs = Counter(name for pair in set(map(frozenset, pairs)) for name in pair)
    unknown = sorted(in_pairs.keys() - set(names))
    if unknown:
        yield f"{unknown} are no keypoint_names"
    several = sorted(name for name, count in in_pairs.items() if count > 1)
    if several:
        yield f"{several} are in several pairs: a keypoint changes places with one other"


def unmirrored_keypoints(names: Sequence[str], pairs: Pairs) -> Iterator[str]:
    """Which left and right keypoints the pairs do not exchange with their counterparts."""
    partner = {a: b for pair in pairs for a, b in (pair, reversed(pair))}
    by_side = {side_of(name): name for name in names}
    for name in names:
        side, rest = side_of(name)
        if not side:
            continue
        other, counterpart = partner.get(name), by_side.get((OPPOSITE[side], rest))
        if other is None:
            cure = f"pair it with {counterpart!r}" if counterpart else "it has no counterpart"
            yield f"{name!r} is in no flip pair: {cure}"
        elif counterpart and other != counterpart:
            yield f"{name!r} is paired with {other!r} instead of {counterpart!r}"
        elif side_of(other)[0] == side:
            yield f"{name!r} is paired with {other!r}, which is {side} too"


def connection_rules(
    names: Sequence[str], skeleton: Sequence[Sequence[int]]
) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Detectron2's form of a skeleton of pairs of indices from 0, coloured by side."""
    rules = []
    for i, j in skeleton:
        sides = {side_of(names[k])[0] for k in (i, j)} - {""}
        color = RULE_COLORS[sides.pop() if len(sides) == 1 else ""]
        rules.append((names[i], names[j], color))
    return rules
