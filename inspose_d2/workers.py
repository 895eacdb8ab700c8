"""What one worker does for all: if it fails, all of them end, and one of them says why."""

import logging
from collections.abc import Callable
from typing import TypeVar

from detectron2.utils import comm

T = TypeVar("T")
logger = logging.getLogger(__name__)


class WorkersEnd(SystemExit):
    """What one worker tried for all has failed; it has logged why. Ends the program: status 1."""

    def __init__(self) -> None:
        super().__init__(1)


def on_one_worker(action: Callable[[], T]) -> T | None:
    """Let the first worker of each machine do something, and the others wait for its end.

    All workers must call it.

    Args:
        action: calls no other worker.

    Returns:
        What the action returns; None on the other workers.

    Raises:
        WorkersEnd: on all of several workers where the action of one has failed. A single worker
            raises what the action does.
    """
    if comm.get_world_size() == 1:
        return action()
    result, said = None, ""
    if comm.get_local_rank() == 0:
        try:
            result = action()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            is_bug = not isinstance(error, OSError | ValueError | RuntimeError)
            logger.error("%s", said, exc_info=is_bug)
    if any(comm.all_gather(said)):
        raise WorkersEnd
    return result
