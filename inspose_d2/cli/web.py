"""``inspose web``: a page that finds the poses in pictures."""

import argparse
import contextlib
import functools
import html
import ipaddress
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from detectron2.structures import Instances
from matplotlib.cbook import get_sample_data

from ..data.images import ImageError, read_image
from ..data.synthetic import make_image
from ..evaluation.results import PERSON, ResultsFile, to_coco
from .pictures import write_picture
from .predict import Demo, make_config, threshold_of


@contextlib.contextmanager
def without_proxies() -> Iterator[None]:
    """Let no request of this process go through a proxy.

    gradio asks its own page whether it is there, and nothing else of anybody; it reads the
    variables of proxies, and may stumble over them, when it is imported too.
    """
    names = ("no_proxy", "NO_PROXY")
    former = {name: os.environ.get(name) for name in names}
    os.environ |= dict.fromkeys(names, "*")
    try:
        yield
    finally:
        for name, value in former.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


try:
    with without_proxies():
        import gradio as gr
except ImportError as error:
    missing = f"gradio is not installed, or cannot be imported ({error})"
    raise OSError(f"{missing}: pip install 'inspose_d2[web]'") from error

POSES = -1  # the view of all poses; others are numbers of persons, from 0
PHOTOGRAPH = "grace_hopper.jpg"  # of Matplotlib's examples, in the public domain (US Navy)
EXAMPLES = (14, 10)  # numbers of synthetic pictures with people of several sizes
EXAMPLE_SEED = 7  # of no set that is trained or evaluated on
EXAMPLE_SIZE = 640  # pixels
MAX_FILE_SIZE = "20mb"
MAX_WAITING = 32  # requests; more are told to come back later
KEPT, CLEANED_EVERY = 3600, 600  # seconds: pictures on disk and in memory
MAX_SESSIONS = 16  # whose last picture is kept in memory
# Screen readers would call them "button".
NAME_EXAMPLES = """() => document.querySelectorAll(".gallery-item").forEach(
    (button, i) => button.setAttribute("aria-label", `Example ${i + 1}`)
)"""

T = TypeVar("T")
# Picture, summary, view and download: what changes with the picture or the threshold.
Shown = tuple[Any, str, Any, Any]


@dataclass(frozen=True)
class Found:
    """A picture and all its poses."""

    name: str  # of the file
    image: np.ndarray  # (H, W, 3) BGR uint8
    poses: Instances
    milliseconds: float  # from the picture's pixels to the poses

    def above(self, threshold: float) -> Instances:
        """The poses with at least this score; they are the first ones."""
        return self.poses[self.poses.scores >= threshold]


def told_plainly(handler: Callable[..., T]) -> Callable[..., T]:
    """Tell the client that an event failed; why is for the server's log."""

    @functools.wraps(handler)
    def run(*args: Any) -> T:
        try:
            return handler(*args)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error("This did not work; the server's log says why.") from error

    return run


class Page:
    """What the page does; the functions know nothing of its layout."""

    def __init__(self, demo: Demo, folder: Path, threshold: float = 0.4) -> None:
        """Keep the model.

        Args:
            demo: with a threshold of 0: the page has its own.
            folder: of files for the page.
            threshold: where the slider stands at first.
        """
        self.demo = demo
        self.threshold = threshold
        self.folder = folder

    @told_plainly
    def find(self, file: dict[str, Any] | None, threshold: float) -> tuple[Any, ...]:
        """Find the poses in a file.

        Args:
            file: gradio's words on it, for gradio's own decoding knows less than ours.
            threshold: least score of a pose.

        Returns:
            What was found, and what is shown of it.

        Raises:
            gr.Error: it cannot be read; without the folder it lies in.
        """
        if file is None:
            return self.clear()
        path = file["path"]
        name = Path(path).name
        try:
            image = read_image(path, "BGR", self.demo.max_pixels)
        except ImageError as error:
            message = html.escape(str(error).replace(path, name))
            raise gr.Error(message, print_exception=False) from error
        start = time.perf_counter()
        poses = self.demo.predict([image])[0]
        found = Found(name, image, poses, 1000 * (time.perf_counter() - start))
        return found, *self.show(found, threshold)

    def clear(self) -> tuple[Any, ...]:
        """Nothing was found, and nothing is shown."""
        return None, *self.show(None, 0.0)

    @told_plainly
    def show(self, found: Found | None, threshold: float, view: int = POSES) -> Shown:
        """Draw what was found without running the network.

        Args:
            found: None empties the page.
            threshold: least score of a pose.
            view: what is on the page. A KP-Net stays there while its person is above the threshold.
        """
        if found is None:
            only = gr.update(choices=[("All poses", POSES)], value=POSES)
            return None, "", only, gr.update(value=None, interactive=False)
        poses = found.above(threshold)
        people = [(f"KP-Net of person {i + 1} ({x:.2f})", i) for i, x in enumerate(poses.scores)]
        stays = POSES < view < len(poses)
        results = self._new_file(f"{Path(found.name).stem}.json")
        with ResultsFile(results) as file:
            file.add(to_coco(poses, 0, category_id=PERSON, file_name=found.name))
        return (
            gr.skip() if stays else self.draw(found, threshold, POSES),
            summary(found, len(poses), threshold),
            gr.update(choices=[("All poses", POSES), *people], value=view if stays else POSES),
            gr.update(value=str(results), interactive=True),
        )

    @told_plainly
    def draw(self, found: Found | None, threshold: float, view: int) -> str | None:
        """Draw all poses, or run the network again for the KP-Net of one person."""
        if found is None:
            return None
        if view == POSES:
            picture = self.demo.draw(found.image, found.above(threshold))
        else:
            picture = self.demo.draw_kp_net(found.image, view)
        kind = "poses" if view == POSES else f"kp_net_{view + 1}"
        path = self._new_file(f"{Path(found.name).stem}_{kind}.jpg")
        write_picture(path, picture)
        return str(path)

    def _new_file(self, name: str) -> Path:
        """A path that nobody can guess."""
        return self.folder / secrets.token_hex(16) / name


def summary(found: Found, number: int, threshold: float) -> str:
    """Say how many persons there are, and how long it took."""
    height, width = found.image.shape[:2]
    persons = {0: f"No person scores {threshold:.2f} or more", 1: "1 person"}
    return (
        f"**{persons.get(number, f'{number} persons')}** · network {found.milliseconds:.0f} ms · "
        f"{width} x {height} pixels"
    )


def write_examples(folder: Path) -> list[list[str]]:
    """Write pictures of synthetic people, and before them a photograph where there is one."""
    paths = [folder / f"people_{number}.jpg" for number in EXAMPLES]
    for path, number in zip(paths, EXAMPLES, strict=True):
        write_picture(path, make_image(EXAMPLE_SEED, "val", number, EXAMPLE_SIZE)[0])
    with contextlib.suppress(OSError):  # some distributions of Matplotlib have no examples
        photograph = get_sample_data(PHOTOGRAPH, asfileobj=False)
        paths.insert(0, Path(shutil.copy(photograph, folder)))
    return [[str(path)] for path in paths]


def build(page: Page) -> gr.Blocks:
    """Lay the page out."""
    blocks = gr.Blocks(title="InsPose", analytics_enabled=False, delete_cache=(CLEANED_EVERY, KEPT))
    with blocks:
        gr.Markdown(
            "# InsPose\nFinds the people in a picture, and the keypoints of each: left limbs are "
            "blue, right limbs orange."
        )
        found = gr.State(time_to_live=KEPT)
        with gr.Row():
            with gr.Column(min_width=300):
                source = gr.Image(
                    label="Your picture",
                    sources=["upload", "webcam", "clipboard"],
                    webcam_options=gr.WebcamOptions(mirror=False),  # or left would be right
                    height=360,
                )
                examples = gr.Examples(
                    write_examples(page.folder / "examples"), source, label="Examples"
                )
            with gr.Column(min_width=300, scale=2):
                with gr.Row():
                    threshold = gr.Slider(
                        0,
                        1,
                        page.threshold,
                        step=0.01,
                        label="Threshold",
                        info="The least score of a pose",
                        min_width=280,
                    )
                    view = gr.Dropdown(
                        [("All poses", POSES)],
                        value=POSES,
                        label="View",
                        info="All poses, or the keypoint maps of one person",
                        min_width=280,
                    )
                told = gr.Markdown()
                result = gr.Image(
                    label="Result", interactive=False, buttons=["download", "fullscreen"]
                )
                download = gr.DownloadButton("Download the poses (JSON)", interactive=False)
        shown = [result, told, view, download]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress_on": result}
        # One at a time: a network takes the whole machine.
        network = {"concurrency_limit": 1, "concurrency_id": "network", **private}
        # Not source.change, which comes twice where one picture replaces another.
        for given in (source.input, examples.load_input_event.then):
            finding = given(
                page.find, [source, threshold], [found, *shown], preprocess=False, **network
            )
            finding.failure(page.clear, outputs=[found, *shown], **private)
        view.input(page.draw, [found, threshold, view], result, **network)
        threshold.change(
            page.show,
            [found, threshold, view],
            shown,
            trigger_mode="always_last",
            show_progress="hidden",
            **private,
        )
        blocks.load(js=NAME_EXAMPLES)
    return blocks.queue(max_size=MAX_WAITING)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(blocks: gr.Blocks, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        OSError: the port is taken, or the host is not this machine's.
    """
    if not is_loopback(host):
        print(
            f"inspose web: warning: whoever reaches {host} can use the page, there is no password; "
            "--host 127.0.0.1 serves this machine alone",
            file=sys.stderr,
        )
    # Fonts of the system, and explanations that are dark enough to read.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    try:
        blocks.launch(
            server_name=host,
            server_port=port or None,  # gradio takes a free one
            share=False,
            ssr_mode=False,
            pwa=False,
            run_history=False,
            footer_links=[],
            show_error=False,  # what is no gr.Error goes to the log alone
            max_file_size=MAX_FILE_SIZE,
            state_session_capacity=MAX_SESSIONS,
            theme=theme,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OSError(
            f"cannot listen at --host {host} --port {port}: is the port taken, or the host another "
            "machine's? --port 0 takes any that is free"
        ) from error
    print(f"http://{host}:{blocks.server_port} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


def run(args: argparse.Namespace) -> int:
    """Serve the page."""
    with tempfile.TemporaryDirectory(prefix="inspose_web_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        with contextlib.suppress(KeyboardInterrupt):
            demo = Demo(make_config(args), score_threshold=0.0, batch_size=1)
            with without_proxies():
                serve(build(Page(demo, Path(folder), threshold_of(args))), args.host, args.port)
    return 0
