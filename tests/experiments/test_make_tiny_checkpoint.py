"""The entry and the file that a checkpoint of the package becomes."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from experiments.make_tiny_checkpoint import CONFIG, NAME
from experiments.package_checkpoint import MAX_BYTES, half, write
from inspose_d2 import get_model
from inspose_d2.model_zoo import model_zoo


def test_file_is_small_and_the_manifest_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_model(CONFIG, device="cpu")
    file = tmp_path / f"{NAME}.pth"
    torch.save({"model": half(model.state_dict())}, file)
    assert file.stat().st_size < MAX_BYTES

    (tmp_path / "manifest.json").write_text('{"other": {"kept": 1}}')
    metrics, training = {"synthetic_people_val/keypoints/AP": 1.25}, {"steps": 3}
    entry = {"metrics": metrics, "training": training, "score_threshold": 0.3}
    write(tmp_path, file, {"config": CONFIG, **entry})
    entries = json.loads((tmp_path / "manifest.json").read_text())
    assert entries.pop("other") == {"kept": 1}
    assert entries[NAME]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()

    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    monkeypatch.setattr(model_zoo, "MANIFEST", tmp_path / "manifest.json")
    monkeypatch.setattr(model_zoo, "CHECKPOINTS", tmp_path)
    checkpoint = model_zoo.list_checkpoints()[NAME]
    assert (checkpoint.metrics, checkpoint.training) == (metrics, training)
    assert checkpoint.score_threshold == 0.3
    again = get_model(checkpoint.config, NAME, device="cpu")
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-7)


def test_half_keeps_counters() -> None:
    state = half({"weight": torch.tensor([1.5]), "num_batches_tracked": torch.tensor(70000)})
    assert state["weight"].dtype == torch.float16
    assert state["num_batches_tracked"] == 70000
