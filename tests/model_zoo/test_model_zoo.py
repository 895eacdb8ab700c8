"""Models by name, and weights that are what the manifest says."""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import nn

import inspose_d2
from inspose_d2 import InsPosePredictor, get_cfg, get_model
from inspose_d2.checkpoint import CheckpointError
from inspose_d2.engine.trainer import Trainer
from inspose_d2.model_zoo import find_weights, list_checkpoints, model_zoo

QUICK = "quick/synthetic_people"
# Where her keypoints are.
HOPPER = {"nose": (268, 230), "left_eye": (307, 187), "right_eye": (223, 190)}


class Handler(SimpleHTTPRequestHandler):
    """Serve files and count the requests."""

    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of the folder ``tmp_path / "web"``."""
    (tmp_path / "web").mkdir()
    Handler.requests = 0
    handler = partial(Handler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Iopath's cache folder, a new one."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "inspose_d2"


def list_it(
    monkeypatch: pytest.MonkeyPatch, folder: Path, location: str, data: bytes, config: str = QUICK
) -> str:
    """Make a manifest of one checkpoint of this content; return its sha256."""
    sha256 = hashlib.sha256(data).hexdigest()
    entry = {"config": config, "location": location, "size": len(data), "sha256": sha256}
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"tiny": {**entry, "metrics": {}, "training": {}}}))
    monkeypatch.setattr(model_zoo, "MANIFEST", manifest)
    monkeypatch.setattr(model_zoo, "CHECKPOINTS", folder)
    return sha256


def test_model_without_weights_is_random_in_evaluation_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        model = get_model(QUICK, device="cpu")
    assert type(model) is inspose_d2.InsPose
    assert not model.training
    assert model.device.type == "cpu"
    assert "random" in caplog.text
    poses = model([{"image": torch.zeros(3, 64, 96)}])[0]["instances"]
    assert poses.image_size == (64, 96)


def save_half(model: nn.Module, path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"model": state}, path)


def test_weights_of_a_file_are_in_the_model_and_half_ones_become_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = get_model(QUICK, device="cpu")
    save_half(source, tmp_path / "half.pth")
    caplog.clear()
    model = get_model(QUICK, tmp_path / "half.pth", device="cpu")
    assert "random" not in caplog.text
    for (name, value), other in zip(
        model.state_dict().items(), source.state_dict().values(), strict=True
    ):
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-7, msg=name)


def test_model_of_the_zoo_computes_what_that_of_the_predictor_does() -> None:
    models = [
        get_model("people/InsPose_Lite0_people", "people_lite0", "cpu"),
        InsPosePredictor(weights="people_lite0", device="cpu").model,
    ]
    names = [[type(x).__name__ for x in model.modules()] for model in models]
    assert names[0] == names[1]  # batch norms are folded in both


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_half(nn.Linear(2, 2), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth does not fit the model"):
        get_model(QUICK, tmp_path / "other.pth")
    for text in ("<html>", ""):
        (tmp_path / "text.pth").write_text(text)
        with pytest.raises(CheckpointError, match=r"text\.pth"):
            get_model(QUICK, tmp_path / "text.pth")


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("InsPose_R50_3x", "InsPose_R50_3x is not trained"),
        ("no.pth", r"weights 'no\.pth' are no file"),
        ("tyny", "Did you mean 'tiny'"),
    ],
)
def test_weights_that_are_not_there_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, told: str
) -> None:
    list_it(monkeypatch, tmp_path, "x.pth", b"")
    with pytest.raises(ValueError, match=told):
        get_model("InsPose_R50_3x", weights)


def test_download_once_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, cache: Path
) -> None:
    data = b"weights" * 1000
    (tmp_path / "web" / "tiny.pth").write_bytes(data)
    sha256 = list_it(monkeypatch, tmp_path, f"{server}/tiny.pth", data)
    path = find_weights("tiny")
    assert path == cache / f"tiny-{sha256[:8]}.pth"
    assert path.read_bytes() == data
    assert find_weights("tiny") == path
    assert Handler.requests == 1
    assert [x.name for x in cache.iterdir()] == [path.name]  # nothing half done is left


@pytest.mark.fault
def test_download_of_another_file_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, cache: Path
) -> None:
    (tmp_path / "web" / "tiny.pth").write_bytes(b"something else")
    list_it(monkeypatch, tmp_path, f"{server}/tiny.pth", b"weights")
    with pytest.raises(ValueError, match=r"tiny\.pth is not the file of the manifest.*By hand"):
        find_weights("tiny")
    assert list(cache.iterdir()) == []


@pytest.mark.fault
@pytest.mark.parametrize("missing", ["file", "server"])
def test_failed_download_names_the_url_and_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, cache: Path, missing: str
) -> None:
    url = f"{server}/tiny.pth" if missing == "file" else "http://127.0.0.1:1/tiny.pth"
    data = b"weights"
    sha256 = list_it(monkeypatch, tmp_path, url, data)
    with pytest.raises(OSError, match="cannot be downloaded") as error:
        find_weights("tiny")
    by_hand = cache / f"tiny-{sha256[:8]}.pth"
    assert url in str(error.value)
    assert str(by_hand) in str(error.value)
    assert list(cache.iterdir()) == []
    by_hand.write_bytes(data)
    assert find_weights("tiny") == by_hand


@pytest.mark.fault
@pytest.mark.parametrize("packaged", [True, False])
def test_flipped_bit_is_found_before_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, cache: Path, packaged: bool
) -> None:
    data = bytearray(b"weights" * 1000)
    location = "tiny.pth" if packaged else f"{server}/tiny.pth"
    sha256 = list_it(monkeypatch, tmp_path, location, bytes(data))
    path = tmp_path / "tiny.pth" if packaged else cache / f"tiny-{sha256[:8]}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    assert find_weights("tiny") == path
    data[3000] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tiny.*\.pth is damaged.*" + sha256 + ".*Delete it"):
        get_model(QUICK, "tiny")


@pytest.mark.parametrize("name", list_checkpoints())
def test_packaged_weights_are_small_and_fit_their_config(name: str) -> None:
    checkpoint = list_checkpoints()[name]
    path = find_weights(name)
    assert path.stat().st_size == checkpoint.size <= 1e7
    model = get_model(checkpoint.config, name, device="cpu")
    assert all(x.isfinite().all() for x in model.state_dict().values())
    assert 0 < checkpoint.score_threshold < 1
    assert all(0 < value < 100 for value in checkpoint.metrics.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", list_checkpoints())
def test_packaged_weights_reach_the_ap_of_the_manifest(name: str) -> None:
    checkpoint = list_checkpoints()[name]
    cfg = get_cfg(checkpoint.config)
    test_set = cfg.DATASETS.TEST[-1]
    json_file = MetadataCatalog.get(test_set).json_file
    if test_set == "people_val" and not Path(json_file).is_file():
        pytest.skip(f"the photographs of people_val are not at hand: no {json_file}")
    cfg.DATASETS.TEST = (test_set,)
    results = Trainer.test(cfg, get_model(checkpoint.config, name))["keypoints"]
    expected = checkpoint.metrics[f"{test_set}/keypoints/AP"]
    assert results["AP"] == pytest.approx(expected, abs=0.2)  # other machines


@pytest.mark.slow
def test_default_model_finds_the_person_in_a_photograph() -> None:
    """Grace Hopper's portrait, in the public domain, as Matplotlib ships it."""
    predictor = InsPosePredictor(
        "people/InsPose_Lite0_people", weights="people_lite0", device="cpu"
    )
    with get_sample_data("grace_hopper.jpg") as file:
        poses = predictor(Image.open(file))["instances"]
    names = COCO_PERSON_KEYPOINT_NAMES
    least = list_checkpoints()["people_lite0"].score_threshold
    assert int((poses.scores >= least).sum()) == 1
    xy = dict(zip(names, poses.pred_keypoints[0, :, :2].tolist(), strict=True))
    # Looked up in the picture of 512 x 600 pixels, with a fifteenth of its width of room.
    for name, (x, y) in HOPPER.items():
        assert abs(xy[name][0] - x) < 34, name
        assert abs(xy[name][1] - y) < 34, name
