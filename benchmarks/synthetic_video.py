"""Synthetic videos: the people of :mod:`inspose_d2.data.synthetic`, walking and dancing.

Who is where is known in every frame. Everything is a function of the names and seeds given.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from inspose_d2.data import synthetic as people

SIZE = (360, 640)  # height, width of the frames, pixels


@dataclass(frozen=True)
class Person:
    """A person of a video.

    Attributes:
        number: true id, also the seed of clothes.
        path: gives the middle of the hips (x, y) in pixels at a time in seconds, or None while the
            person is not there.
        stature: pixels.
        pace: steps a second, two of which are a period of the limbs; 0 stands still.
        yaw: degrees; 90 and -90 walk to the right and to the left.
        arms: degrees to which dancing raises the arms; 0 walks.
    """

    number: int
    path: Callable[[float], tuple[float, float] | None]
    stature: float = 150.0
    pace: float = 1.8
    yaw: float = 90.0
    arms: float = 0.0

    def figure(self, time: float) -> people.Figure | None:
        """The person at a time."""
        place = self.path(time)
        if place is None:
            return None
        phase = np.pi * self.pace * time + self.number
        body = _body(phase, self.arms) @ _view(self.yaw).T * self.stature
        body[:, :2] += place
        return people.dress(np.random.default_rng(self.number), body, self.stature)


@dataclass(frozen=True)
class Video:
    """A video of some people.

    Attributes:
        persons: from far to near.
        times: of the frames, seconds, rising.
        in_front: things that cover people.
    """

    persons: list[Person]
    times: np.ndarray
    in_front: list[people.Blob]

    def __iter__(self) -> Iterator[tuple[float, list[int], people.Scene]]:
        """Give time, true ids and scene of each frame."""
        for time in self.times.tolist():
            there = {x.number: x.figure(time) for x in self.persons}
            figures = {k: x for k, x in there.items() if x is not None}
            scene = people.Scene(*SIZE, list(figures.values()), [], self.in_front)
            yield time, list(figures), scene


def picture(scene: people.Scene) -> np.ndarray:
    """The frame (H, W, 3) uint8 BGR of a scene; the background stands still."""
    return people.paint_picture(np.random.default_rng(0), scene)


def videos(seed: int, fps: float = 30.0, seconds: float = 8.0) -> dict[str, Video]:
    """Make the videos of a seed, by name."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(fps * seconds)) / fps
    width = SIZE[1]

    def walk(x: float, y: float, speed: float) -> Callable[[float], tuple[float, float]]:
        return lambda t: (x + speed * t, y)

    def still(x: float, y: float) -> Callable[[float], tuple[float, float]]:
        return lambda t: (x + 8 * np.sin(1.3 * t + x), y)

    def pass_by(number: int, y: float, speed: float, start: float, size: float) -> Person:
        x = start if speed > 0 else width - start
        yaw = 90.0 if speed > 0 else -90.0
        return Person(number, walk(x, y, speed), size, yaw=yaw)

    speeds = rng.uniform(70, 110, 8)
    starts = rng.uniform(-60, 60, 8)
    ys = rng.uniform(150, 230, 8)

    def away(number: int, gap: float) -> Person:
        """Goes out of the picture at its left side and comes back after a time."""
        turn = seconds / 2

        def path(t: float) -> tuple[float, float] | None:
            # Whether any of it shows depends on the stature too: the hips are out for the gap.
            return (100 * (abs(t - turn) - gap / 2), 190.0)

        return Person(number, path, 150)

    def until_cut(number: int, x: float, after: bool) -> Person:
        path = still(x, 180)
        cut = seconds / 2
        return Person(number, lambda t: path(t) if (t >= cut) == after else None, 150, 0, yaw=0)

    pillar = people.Blob(
        np.array([(290.0, 0), (350, 0), (350, 360), (290, 360)]), np.full(4, 1.0), (90, 90, 90)
    )
    walkers = [pass_by(i, 110 + 70 * i, speeds[i], starts[i], 110 + 20 * i) for i in range(3)]
    crossing = [
        pass_by(i, ys[i], speeds[i] * (1 - 2 * (i % 2)), starts[i], 130 + 5 * i) for i in range(6)
    ]
    dancers = [
        Person(i, still(90 + 110 * i, 170 + 10 * i), 150, 2.4, yaw=20 * i - 40, arms=100)
        for i in range(5)
    ]
    behind = [
        pass_by(i, 150 + 45 * i, (70 + 25 * i) * (1 - 2 * (i % 2)), 0, 120 + 15 * i)
        for i in range(3)
    ]
    cut = [until_cut(i, 120 + 160 * (i % 3) + 40 * (i // 3), i >= 3) for i in range(6)]
    uneven = times[np.sort(rng.permutation(len(times))[: len(times) // 3])]
    return {
        "walking apart": Video(walkers, times, []),
        "crossing, six at once": Video(crossing, times, []),
        "crossing, 10 frames a second": Video(crossing, times[::3], []),
        "crossing, uneven frame rate": Video(crossing, uneven, []),
        "dancing in a group": Video(dancers, times, []),
        "behind a pillar": Video(behind, times, [pillar]),
        "out and back within a second": Video([away(0, -0.1), *walkers[1:]], times, []),
        "out for three seconds": Video([away(0, 2.0), *walkers[1:]], times, []),
        "a cut": Video(cut, times, []),
    }


def _body(phase: float, arms: float) -> np.ndarray:
    """A body (24, 3) as :func:`inspose_d2.data.synthetic.sample_body` gives it, in a step."""
    length = people.LENGTHS
    body = np.zeros((people.NUM_POINTS, 3))
    body[people.NECK, 1] = length["torso"]
    body[people.SKULL, 1] = length["torso"] + people.NECK_LENGTH
    body[: len(people.FACE_SHAPE)] = body[people.SKULL] + people.SKULL_RADIUS * people.FACE_SHAPE
    body[people.FACE] = body[people.SKULL] + people.SKULL_RADIUS * np.array([0, -0.12, 0.35])
    direction = people._direction
    for side, sign in enumerate((1, -1)):
        swing = 28 * np.sin(phase) * sign
        spread = 8 + arms * (0.5 + 0.5 * np.sin(phase + side))
        shoulder, elbow = people.SHOULDERS[side], people.ELBOWS[side]
        wrist, hip = people.WRISTS[side], people.HIPS[side]
        knee, ankle = people.KNEES[side], people.ANKLES[side]
        body[shoulder] = body[people.NECK] + [sign * length["shoulder"], -0.02, 0]
        body[elbow] = body[shoulder] + direction(sign, -swing, spread) * length["upper_arm"]
        forearm = direction(sign, 20 - swing, spread)
        body[wrist] = body[elbow] + forearm * length["forearm"]
        body[people.HANDS[side]] = body[wrist] + forearm * 0.035
        legs = swing if not arms else 0.3 * swing
        bend = 15 + 15 * np.cos(phase) * sign
        body[hip] = sign * length["hip"], 0, 0
        body[knee] = body[hip] + direction(sign, legs + 8, 4) * length["thigh"]
        body[ankle] = body[knee] + direction(sign, legs + 8 - bend, 4) * length["shin"]
        body[people.TOES[side]] = body[ankle] + direction(sign, legs + 75, 10) * 0.07
    return body


def _view(yaw: float) -> np.ndarray:
    """Rotation from (left, up, front) to (right, down, towards the viewer)."""
    return np.diag([1.0, -1.0, 1.0]) @ people._rotation(1, yaw)
