"""The web page: its functions with a made-up network, and all of it in a real browser."""

import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from inspose_d2 import InsPosePredictor
from inspose_d2.data.synthetic import make_image

gr = pytest.importorskip("gradio", reason="the web page needs gradio: pip install -e '.[web]'")
import httpx  # noqa: E402  gradio needs it

from inspose_d2 import cli  # noqa: E402
from inspose_d2.cli import web  # noqa: E402
from inspose_d2.cli.parsers import make_parser  # noqa: E402

CHROMIUM = Path("/usr/bin/chromium")
ROOT = Path(__file__).parents[2]
IMAGE = make_image(7, "val", 6, 320)[0]


class MadeUpDemo:
    """Three poses of known scores, and a count of the network's runs."""

    max_pixels = 10_000

    def __init__(self) -> None:
        self.runs = 0
        self.metadata = MetadataCatalog.get("synthetic_people_val")

    def predict(self, images: list[np.ndarray]) -> list[Instances]:
        self.runs += 1
        return [
            Instances(
                images[0].shape[:2],
                pred_boxes=Boxes(torch.tensor([[10.0, 20.0, 30.0, 50.0]] * 3)),
                scores=torch.tensor([0.9, 0.5, 0.2]),
                pred_classes=torch.zeros(3, dtype=torch.int64),
                pred_keypoints=torch.full((3, 17, 3), 0.5),
            )
        ]

    def draw(self, image: np.ndarray, poses: Instances) -> np.ndarray:
        return np.full_like(image, len(poses))

    def draw_kp_net(self, image: np.ndarray, number: int) -> np.ndarray:
        self.runs += 1
        return np.full_like(image, 100 + number)


@pytest.fixture
def page(tmp_path: Path) -> web.Page:
    return web.Page(MadeUpDemo(), tmp_path / "served")


def upload(folder: Path, name: str = "a.png", size: tuple[int, int] = (60, 80)) -> dict[str, Any]:
    """Give a file as gradio does."""
    path = folder / name
    assert cv2.imwrite(str(path), np.zeros((*size, 3), np.uint8))
    return {"path": str(path), "orig_name": name}


def results_of(download: dict[str, Any]) -> list[dict[str, Any]]:
    return json.loads(Path(download["value"]).read_text())


def test_picture_gives_poses_summary_people_and_results(page: web.Page, tmp_path: Path) -> None:
    found, picture, told, view, download = page.find(upload(tmp_path), 0.4)
    assert found.image.shape == (60, 80, 3)
    assert re.fullmatch(r"\*\*2 persons\*\* · network \d+ ms · 80 x 60 pixels", told)
    assert Path(picture).name == "a_poses.jpg"
    assert abs(cv2.imread(picture).astype(int) - 2).max() <= 1  # drawn from two poses
    assert view["choices"] == [
        ("All poses", web.POSES),
        ("KP-Net of person 1 (0.90)", 0),
        ("KP-Net of person 2 (0.50)", 1),
    ]
    assert view["value"] == web.POSES
    results = results_of(download)
    assert [x["score"] for x in results] == pytest.approx([0.9, 0.5])
    assert results[0]["file_name"] == "a.png"
    assert results[0]["bbox"] == [10, 20, 20, 30]
    assert results[0]["keypoints"] == [0, 0, 0.5] * 17


def test_threshold_redraws_without_the_network(page: web.Page, tmp_path: Path) -> None:
    found = page.find(upload(tmp_path), 0.4)[0]
    for threshold, number, words in (
        (0.0, 3, "3 persons"),
        (0.9, 1, "1 person"),
        (0.95, 0, "No person scores 0.95 or more"),
    ):
        picture, told, view, download = page.show(found, threshold)
        assert abs(cv2.imread(picture).astype(int) - number).max() <= 1
        assert told.startswith(f"**{words}**")
        assert len(view["choices"]) == 1 + number
        assert len(results_of(download)) == number
    assert page.demo.runs == 1


def test_kp_net_stays_until_its_person_falls_below(page: web.Page, tmp_path: Path) -> None:
    found = page.find(upload(tmp_path), 0.4)[0]
    picture = page.draw(found, 0.4, 1)
    assert Path(picture).name == "a_kp_net_2.jpg"
    assert abs(cv2.imread(picture).astype(int) - 101).max() <= 1
    assert page.demo.runs == 2
    kept, _, view, _ = page.show(found, 0.3, 1)
    assert kept == gr.skip()
    assert view["value"] == 1
    picture, _, view, _ = page.show(found, 0.6, 1)
    assert Path(picture).name == "a_poses.jpg"
    assert view["value"] == web.POSES


def test_no_picture_empties_the_page(page: web.Page) -> None:
    for found, picture, told, view, download in (page.find(None, 0.4), page.clear()):
        assert (found, picture, told) == (None, None, "")
        assert view["choices"] == [("All poses", web.POSES)]
        assert not download["interactive"]
    assert page.draw(None, 0.4, web.POSES) is None
    assert page.demo.runs == 0


@pytest.mark.fault
def test_bad_picture_is_told_without_its_folder(page: web.Page, tmp_path: Path) -> None:
    text = tmp_path / "<b>text.jpg"
    text.write_text("this is no picture")
    with pytest.raises(gr.Error) as error:
        page.find({"path": str(text)}, 0.4)
    assert error.value.message.startswith("&lt;b&gt;text.jpg: no image that Pillow knows")
    assert not error.value.print_exception
    with pytest.raises(gr.Error, match=r"^'large\.png: 101 x 100 pixels are more than"):
        page.find(upload(tmp_path, "large.png", (100, 101)), 0.4)
    assert page.demo.runs == 0


@pytest.mark.fault
def test_failure_of_the_server_is_not_explained_to_the_client(
    page: web.Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page.demo, "predict", lambda _: 1 / 0)
    with pytest.raises(gr.Error) as error:
        page.find(upload(tmp_path), 0.4)
    assert error.value.message == "This did not work; the server's log says why."
    assert error.value.print_exception
    assert isinstance(error.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.7", False),
        ("example.org", False),
    ],
)
def test_other_hosts_than_loopback_are_warned_of(
    host: str, expected: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    class Blocks:
        server_port = 1234

        def launch(self, **arguments: Any) -> None:
            self.arguments = arguments

        def block_thread(self) -> None:
            pass

    blocks = Blocks()
    web.serve(blocks, host, 1234)
    assert blocks.arguments["server_name"] == host
    assert blocks.arguments["share"] is False
    assert ("there is no password" in capsys.readouterr().err) is not expected
    assert make_parser().parse_args(["web"]).host == "127.0.0.1"


def test_examples_show_people(tmp_path: Path) -> None:
    examples = [cv2.imread(path) for (path,) in web.write_examples(tmp_path)]
    photograph, *drawn = examples
    assert photograph.shape == (600, 512, 3)
    assert [max(x.shape) for x in drawn] == [web.EXAMPLE_SIZE] * len(web.EXAMPLES)
    predictor = InsPosePredictor("people/InsPose_Lite0_people", weights="people_lite0")
    found = [len(predictor(x)["instances"]) for x in examples]
    assert all(found), found


def test_missing_gradio_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "inspose_d2.cli.web")
    assert cli.main(["web"]) == cli.USAGE
    said = capsys.readouterr().err
    assert "gradio is not installed" in said
    assert "pip install 'inspose_d2[web]'" in said


@pytest.mark.fault
def test_page_is_asked_for_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as asked:
        threading.Thread(target=asked.handle_request, daemon=True).start()
        with web.without_proxies():
            answer = httpx.get(f"http://127.0.0.1:{asked.server_port}")
    assert answer.status_code == 204
    assert os.environ["NO_PROXY"] == "example.org"
    assert "no_proxy" not in os.environ


@pytest.mark.fault
def test_port_that_is_taken_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Blocks:
        def launch(self, **_: Any) -> None:  # as gradio does
            raise OSError("Cannot find empty port in range: 7860-7860. Set GRADIO_SERVER_PORT")

    status = cli.told("inspose web", lambda: web.serve(Blocks(), "127.0.0.1", 7860))
    assert status == cli.USAGE
    said = capsys.readouterr().err
    assert said.startswith(
        "inspose web: cannot listen at --host 127.0.0.1 --port 7860: is the port"
    )
    assert len(said.splitlines()) == 1


@pytest.fixture
def model(tiny_cfg: Callable[..., CfgNode], tmp_path: Path) -> CfgNode:
    """Config with weights, random ones whose scores on IMAGE differ much; both are files too."""
    test = {"SCORE_THRESH_TEST": 0.0, "KEYPOINT_SCORE_WEIGHT_TEST": 0.0}
    cfg = tiny_cfg(
        **{f"MODEL.INSPOSE.{key}": value for key, value in test.items()},
        **{"TEST.DETECTIONS_PER_IMAGE": 10, "INPUT.MAX_PIXELS": 5_000_000},
    )
    cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
    torch.manual_seed(0)
    network = build_model(cfg)
    torch.nn.init.normal_(network.head.cls_score.weight, std=0.3)
    torch.save({"model": network.state_dict()}, cfg.MODEL.WEIGHTS)
    scores = InsPosePredictor(cfg, device="cpu")(IMAGE)["instances"].scores
    # The same poses, but the logits of their scores reach from -2 to 2.
    best, worst = scores.logit()[[0, -1]].tolist()
    scale = 4 / (best - worst)
    with torch.no_grad():
        network.head.cls_score.weight *= scale
        network.head.cls_score.bias *= scale
        network.head.cls_score.bias += 2 - scale * best
    torch.save({"model": network.state_dict()}, cfg.MODEL.WEIGHTS)
    (tmp_path / "c.yaml").write_text(cfg.dump())
    return cfg


@pytest.fixture
def server(model: CfgNode, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server's address and its log."""
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["TMPDIR"] = str(tmp_path / "tmp")
    command = [sys.executable, "-m", "inspose_d2", "web", "--config-file", str(tmp_path / "c.yaml")]
    command += ["--weights", model.MODEL.WEIGHTS, "--port", "0"]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=file
        )
        try:
            line = process.stdout.readline()
            assert re.match(r"http://127\.0\.0\.1:\d+ ", line), log.read_text()
            yield line.split()[0], log
        finally:
            process.terminate()
            process.communicate(timeout=600)
    assert process.returncode == 0
    assert not list((tmp_path / "tmp").glob("inspose_web_*"))  # no picture stays


@pytest.fixture
def chromium() -> Iterator[Any]:
    """Debian's Chromium, with a camera that shows a test picture."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is missing: apt install chromium")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield browser
        browser.close()


class Tab:
    """A page in the browser, with all that it asked for and complained of."""

    def __init__(self, browser: Any, url: str) -> None:
        self.hosts: set[str | None] = set()
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(120_000)  # the machine may be busy
        self.page.on("request", lambda x: self.hosts.add(urlsplit(x.url).hostname))
        self.page.on("websocket", lambda x: self.hosts.add(urlsplit(x.url).hostname))
        self.page.on("pageerror", lambda x: self.complaints.append(str(x)))
        self.page.on(
            "console", lambda x: self.complaints.append(x.text) if x.type == "error" else None
        )
        self.page.goto(url)

    def upload(self, name: str, content: bytes) -> None:
        file = {"name": name, "mimeType": "image/jpeg", "buffer": content}
        self.page.locator("input[type=file]").first.set_input_files(file)

    def wait_for(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for()

    def wait_for_picture(self, name: str) -> tuple[int, int]:
        """Wait for the result of that name; returns its width and height."""
        picture = self.page.locator(f'img[src*="/{name}"]')
        picture.wait_for()
        size = "x => x.decode().then(() => [x.naturalWidth, x.naturalHeight])"
        width, height = picture.evaluate(size)
        return width, height


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.fault
def test_page_in_a_browser(chromium: Any, server: tuple[str, Path], model: CfgNode) -> None:
    url, log = server
    content = cv2.imencode(".png", IMAGE)[1].tobytes()
    poses = InsPosePredictor(model, device="cpu")(IMAGE)["instances"]
    num_shown = int((poses.scores >= 0.4).sum())
    # The slider's step is 0.01: it stands in the widest gap of the scores after the second.
    gap, index = (poses.scores[1 : num_shown - 1] - poses.scores[2:num_shown]).max(dim=0)
    assert gap > 0.02, poses.scores
    num_above = int(index) + 2
    least = round(poses.scores[num_above - 1].item() - gap.item() / 2, 2)

    tab = Tab(chromium, url)
    tab.upload("people.png", content)
    tab.wait_for(f"{num_shown} persons")
    tab.wait_for("320 x 320 pixels")
    assert tab.wait_for_picture("people_poses.jpg") == (320, 320)

    tab.page.get_by_role("slider").fill(str(least))
    tab.wait_for(f"{num_above} persons")
    tab.page.get_by_label("View").click()
    tab.page.get_by_role("option", name="KP-Net of person 2").click()
    width, height = tab.wait_for_picture("people_kp_net_2.jpg")
    assert width == 900  # enlarged for the panels
    assert height > 900  # which are below

    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Download the poses").click()
    assert download.value.suggested_filename == "people.json"
    results = json.loads(Path(download.value.path()).read_text())
    assert [x["score"] for x in results] == pytest.approx(poses.scores[:num_above].tolist())
    assert {(x["file_name"], x["image_id"], x["category_id"]) for x in results} == {
        ("people.png", 0, 1)
    }
    expected = poses.pred_keypoints[:num_above].clone()
    expected[..., :2] -= 0.5  # COCO's pixels
    found = torch.tensor([x["keypoints"] for x in results]).view(-1, 17, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)

    tab.page.get_by_role("slider").press("End")  # 1: nobody is so certain; also ends the KP-Net
    tab.wait_for("No person scores 1.00 or more")
    tab.wait_for_picture("people_poses.jpg")
    tab.page.get_by_role("slider").fill("0")

    tab.upload("text.jpg", b"this is no picture")
    tab.wait_for("text.jpg: no image that Pillow knows")
    tab.page.locator('img[src*="/people_poses.jpg"]').wait_for(state="detached")
    assert tab.page.get_by_role("button", name="Download the poses").is_disabled()
    large = io.BytesIO()
    Image.new("1", (2501, 2000)).save(large, "png")
    tab.upload("pixels.png", large.getvalue())
    tab.wait_for("pixels.png: 2501 x 2000 pixels are more than")

    tab.page.get_by_role("button", name="Example 2").click()
    tab.wait_for_picture("people_14_poses.jpg")
    tab.page.get_by_label("Remove Image").click()
    tab.page.get_by_label("Capture from camera").click()
    tab.page.get_by_text("Click to Access Webcam").click()
    tab.page.wait_for_function("document.querySelector('video')?.videoWidth > 0")
    tab.page.get_by_label("capture photo").click()
    tab.wait_for_picture("image_poses.jpg")

    tab.page.set_viewport_size({"width": 400, "height": 800})
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 400

    assert tab.complaints == []  # of what comes, gradio's own request for progress fails
    tab.upload("bytes.png", bytes(25_000_000))
    tab.wait_for("File(s) exceed the maximum allowed size of 20.0 Mb")
    file = {"name": "bytes.png", "mimeType": "image/png", "buffer": bytes(25_000_000)}
    answer = tab.page.request.post(f"{url}/gradio_api/upload", multipart={"files": file})
    assert answer.status == 413  # too large

    assert "Traceback" not in tab.page.content()
    assert tab.hosts <= {"127.0.0.1", None}  # None: data and blobs
    assert "Traceback" not in log.read_text()
