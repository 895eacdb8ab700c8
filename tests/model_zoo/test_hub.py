"""Models as folders of the Hugging Face hub: written, read, fetched; no net is needed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from huggingface_hub import ModelCard

from inspose_d2 import InsPosePredictor, cli, get_cfg, get_model, list_checkpoints
from inspose_d2.checkpoint import CheckpointError, save_safetensors
from inspose_d2.cli import predict
from inspose_d2.cli.parsers import make_parser
from inspose_d2.model_zoo import config_of, find_weights, score_threshold_of, write_folder

NAME = "synthetic_people_tiny"
IMAGE = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model of photographs as the program writes it."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    assert cli.main(["models", "folder", "people_lite0", "--output", str(folder)]) == 0
    return folder


def test_folder_has_the_files_of_the_hub_and_the_weights_of_the_package(folder: Path) -> None:
    files = {"README.md", "config.yaml", "model.safetensors"}
    assert {x.name for x in folder.iterdir()} == files
    packaged = torch.load(find_weights("people_lite0"), weights_only=True)["model"]
    written = pytest.importorskip("safetensors.torch").load_file(folder / "model.safetensors")
    # Frozen batch norms count no batches.
    assert {x for x in packaged if not x.endswith("num_batches_tracked")} == written.keys()
    assert all(written[x].equal(packaged[x]) for x in written)
    assert all(written[x].dtype == packaged[x].dtype for x in written)  # half stays half


def test_card_has_the_front_matter_of_the_hub_and_the_figures_of_the_manifest(folder: Path) -> None:
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.pipeline_tag) == ("apache-2.0", "keypoint-detection")
    figures = {
        f"{x.dataset_name}/keypoints/{x.metric_type}": x.metric_value for x in data.eval_results
    }
    assert figures == list_checkpoints()["people_lite0"].metrics


def test_config_is_whole_and_of_no_machine(folder: Path) -> None:
    values = yaml.safe_load((folder / "config.yaml").read_text())
    assert "DEVICE" not in values["MODEL"]
    cfg = get_cfg(folder / "config.yaml")
    expected = get_cfg("people/InsPose_Lite0_people")
    assert cfg.MODEL.INSPOSE == expected.MODEL.INSPOSE
    assert cfg.INPUT == expected.INPUT
    assert cfg.MODEL.TIMM == expected.MODEL.TIMM


def test_own_checkpoint_gets_a_folder_without_paths(
    tiny_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    cfg = tiny_cfg()
    cfg.DATASETS.REGISTER = [["mine", "/home/me/mine.json", "/home/me"]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mine",)
    (tmp_path / "mine.yaml").write_text(cfg.dump())
    state = build_model(cfg).state_dict()
    save_safetensors(state, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match="give --config-file"):
        write_folder(tmp_path / "mine.safetensors", tmp_path / "out")
    write_folder(tmp_path / "mine.safetensors", tmp_path / "out", tmp_path / "mine.yaml")
    written = (tmp_path / "out" / "config.yaml").read_text()
    assert "/home/me" not in written
    assert str(tmp_path) not in written
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license is None
    loaded = get_model(tmp_path / "out" / "config.yaml", tmp_path / "out").state_dict()
    assert all(loaded[x].equal(state[x]) for x in state)


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit the model"):
        write_folder(NAME, tmp_path / "out", "people/InsPose_Lite0_people")
    assert not (tmp_path / "out").exists()


def test_predictor_of_a_folder_finds_what_that_of_the_package_finds(folder: Path) -> None:
    settings = {"device": "cpu", "score_threshold": 0.0}
    of_folder = InsPosePredictor(weights=folder, **settings)(IMAGE)["instances"]
    of_package = InsPosePredictor(weights="people_lite0", **settings)(IMAGE)["instances"]
    assert len(of_package) > 0
    torch.testing.assert_close(of_folder.pred_keypoints, of_package.pred_keypoints)
    torch.testing.assert_close(of_folder.scores, of_package.scores)


def test_program_takes_config_and_threshold_of_the_folder(folder: Path) -> None:
    words = ["predict", "--input", "a", "--output", "o", "--weights", str(folder)]
    args = make_parser().parse_args(words)
    assert predict.make_config(args).MODEL.TIMM.NAME == "tf_efficientnet_lite0"
    assert predict.threshold_of(args) == list_checkpoints()["people_lite0"].score_threshold
    assert predict.threshold_of(args) != 0.4


def test_repository_is_fetched_without_files_that_could_run_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_weights("some-one/people.1") == folder / "model.safetensors"
    assert config_of("some-one/people.1") == str(folder / "config.yaml")
    shown = list_checkpoints()["people_lite0"].score_threshold
    assert score_threshold_of("some-one/people.1") == shown
    assert set(map(json.dumps, asked)) == {
        json.dumps(("some-one/people.1", ["config.yaml", "model.safetensors"]))
    }


def test_cached_repository_needs_no_net(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0" * 40
    repository = tmp_path / "models--some-one--people"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / revision).symlink_to(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **settings: real(name, cache_dir=tmp_path, local_files_only=True, **settings),
    )
    assert find_weights("some-one/people").read_bytes() == (
        (folder / "model.safetensors").read_bytes()
    )


@pytest.mark.fault
@pytest.mark.parametrize("problem", ["net", "library", "file"])
def test_what_is_missing_is_one_line_and_status_2(
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, said = "some-one/people", "cannot be fetched from the Hugging Face hub"
    if problem == "net":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elif problem == "library":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        said = "pip install 'inspose_d2[hub]'"
    else:
        name, said = str(tmp_path), "it has no config.yaml and no model.safetensors"
    assert cli.main(["models", "download", name]) == cli.USAGE
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_download_prints_the_verified_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "download", NAME]) == 0
    assert capsys.readouterr().out.splitlines() == [str(find_weights(NAME))]


def test_checkpoint_becomes_safetensors_and_is_loaded_as_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert cli.main(["export", "--weights", NAME, "--output", str(path)]) == 0
    config = list_checkpoints()[NAME].config
    expected = get_model(config, NAME, device="cpu").state_dict()
    loaded = get_model(config, path, device="cpu").state_dict()
    assert all(loaded[x].equal(expected[x]) for x in expected)
    cfg = get_cfg(config, ["MODEL.WEIGHTS", str(path), "MODEL.DEVICE", "cpu"])
    assert all(
        value.equal(expected[name])
        for name, value in InsPosePredictor(cfg).model.state_dict().items()
    )
