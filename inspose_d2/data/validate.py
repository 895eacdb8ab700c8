"""List what is wrong with a file of COCO keypoint annotations, and what training makes of it.

    python -m inspose_d2.data.validate --json annotations.json --images folder

Exit status 0: no problem, 2: problems.
"""

import argparse
import sys
from collections.abc import Collection
from typing import Any

from .annotations import (
    count_outside,
    find_problems,
    is_dropped,
    is_learned_from,
    load_annotations,
)

MAX_LINES = 50


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
        lines.append(f"dropped: {num_dropped} annotations with an empty box or only bad polygons")
    if wrong:
        lines.append(f"not counted: {len(wrong)} entries with problems")
    return lines


def main() -> int:
    """Check the file that the command line names.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--images", metavar="FOLDER", help="look for the image files here")
    parser.add_argument("--num-keypoints", type=int, metavar="K", help="default: what FILE says")
    parser.add_argument(
        "--evaluation", action="store_true", help="poses are to be scored by it, not learned"
    )
    args = parser.parse_args()
    say = sys.stdout.write
    try:
        coco = load_annotations(args.json)
    except (OSError, ValueError) as error:
        say(f"{error}\n")
        return 2
    problems = list(
        find_problems(coco, args.num_keypoints, args.images, evaluation=args.evaluation)
    )
    for problem in problems[:MAX_LINES]:
        say(f"{args.json}: {problem}\n")
    if len(problems) > MAX_LINES:
        say(f"and {len(problems) - MAX_LINES} more problems\n")
    wrong = {problem.entry for problem in problems if problem.entry}
    if wrong or not problems:
        say("\n".join(summarize(coco, wrong)) + "\n")
    if problems:
        say(f"{len(problems)} problems: training and evaluation refuse the file until cured\n")
        return 2
    say("no problem found\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
