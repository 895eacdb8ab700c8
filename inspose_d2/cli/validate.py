"""``inspose validate``: what is wrong with annotations, and what training makes of them.

Exit status 0: no problem, 2: problems.
"""

import argparse
import re
from collections.abc import Collection, Iterable
from typing import Any

from ..data.annotations import (
    Problem,
    count_outside,
    find_problems,
    is_dropped,
    is_learned_from,
    learned_categories,
)
from ..data.coco_file import load_annotations, notes_on

MAX_LINES = 50
SHOWN = 3  # problems that differ in numbers and names alone


def summarize(coco: Any, wrong: Collection[str] = ()) -> list[str]:
    """Say what training uses and what it drops, and why.

    Args:
        coco: a loaded json whose top-level lists are there.
        wrong: entries with problems, like ``annotations[7]``; they are not counted further.

    Returns:
        Lines of text.
    """

    def sound(name: str) -> list[dict[str, Any]]:
        entries = enumerate(coco.get(name, []))
        return [entry for index, entry in entries if f"{name}[{index}]" not in wrong]

    images = {image["id"] for image in sound("images")}
    annotations = [x for x in sound("annotations") if not is_dropped(x)]
    crowds = [x for x in annotations if x.get("iscrowd")]
    persons = [x for x in annotations if not x.get("iscrowd")]
    labelled = [x for x in persons if is_learned_from(x)]
    used = {x["image_id"] for x in labelled} & images
    empty = images - {x["image_id"] for x in persons}
    without_key = sum("keypoints" not in x for x in persons)
    num_dropped = len(sound("annotations")) - len(annotations)
    lines = [
        f"images: {len(images)}, of which training uses {len(used)}",
        f"  {len(empty)} without a person: dropped in training, used in evaluation",
        f"  {len(images - used - empty)} with persons of whom none has a labelled keypoint: same",
        f"persons: {len(persons)}, of whom {len(labelled)} have labelled keypoints",
        f"  {len(persons) - len(labelled)} with no labelled keypoint ({without_key} lack the key "
        "`keypoints`): no pose is learned, their boxes count neither as person nor as background",
        f"crowds: {len(crowds)}: their boxes count neither as person nor as background",
    ]
    if outside := count_outside(persons, sound("images")):
        lines.append(f"keypoints: {outside} labelled ones outside their images: not learned")
    if num_dropped:
        lines.append(
            f"dropped: {num_dropped} annotations with neither a box nor a labelled keypoint"
        )
    if wrong:
        lines.append(f"not counted: {len(wrong)} entries with problems")
    return lines


def grouped(problems: Iterable[Problem]) -> list[str]:
    """Write problems a line each; of many that differ in numbers and names alone the first ones."""
    kinds: dict[tuple[str, ...], list[Problem]] = {}
    for problem in problems:
        what = re.sub(r"-?\d[\d.e+-]*|'[^']*'|got .*", "#", problem.what)
        kinds.setdefault((problem.entry.partition("[")[0], problem.key, what), []).append(problem)
    lines = []
    for same in kinds.values():
        lines += [str(problem) for problem in same[:SHOWN]]
        if len(same) > SHOWN:
            lines[-1] += f" (x {len(same) - SHOWN + 1}, this one and others like it)"
    return lines


def _problems_of_registration(coco: Any, num_keypoints: int | None) -> Iterable[Problem]:
    """What keeps a data set of one's own from being registered."""
    if num_keypoints is None and "annotations" in coco:
        for category in learned_categories(coco):
            if "keypoints" not in category:
                cure = "name them, or say how many they are by --num-keypoints"
                yield Problem("categories", None, None, "keypoints", "is missing", cure)


def run(args: argparse.Namespace) -> int:
    """Check a file; returns the exit status."""
    coco = load_annotations(args.input)
    problems = list(
        find_problems(coco, args.num_keypoints, args.images, evaluation=args.evaluation)
    )
    if not problems:
        problems = list(_problems_of_registration(coco, args.num_keypoints))
    lines = grouped(problems)
    for line in lines[:MAX_LINES]:
        print(f"{args.input}: {line}")
    if len(lines) > MAX_LINES:
        print(f"and {len(lines) - MAX_LINES} more kinds of problems")
    wrong = {problem.entry for problem in problems if problem.entry}
    if wrong or not problems:
        print("\n".join(summarize(coco, wrong)))
    for note in notes_on(coco, evaluation=args.evaluation) if not problems else ():
        print(f"note: {note}")
    if problems:
        print(f"{len(problems)} problems: training and evaluation refuse the file until cured")
        return 2
    print("no problem found")
    return 0
