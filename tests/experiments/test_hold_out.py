import json
import sys
from pathlib import Path

import pytest

from experiments import hold_out


def test_parts_share_nothing_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {
        "info": {"year": 2017},
        "images": [{"id": i} for i in (5, 1, 4, 2, 3)],
        "annotations": [{"id": 10 * i + j, "image_id": i} for i in range(1, 6) for j in range(i)],
        "categories": [{"id": 1}],
    }
    path = tmp_path / "person_keypoints_train.json"
    path.write_text(json.dumps(data))
    monkeypatch.setattr(sys, "argv", ["hold_out.py", str(path), "--every", "2"])
    hold_out.main()
    fit, holdout = (
        json.loads((tmp_path / f"person_keypoints_{x}.json").read_text())
        for x in ("fit", "holdout")
    )
    assert sorted(x["id"] for x in holdout["images"]) == [1, 3, 5]
    assert sorted(x["id"] for x in fit["images"]) == [2, 4]
    for part in (fit, holdout):
        ids = {x["id"] for x in part["images"]}
        assert {x["image_id"] for x in part["annotations"]} == ids
        assert part["categories"] == data["categories"]
    assert len(fit["annotations"]) + len(holdout["annotations"]) == 15
    assert "3 images, 9 annotations" in capsys.readouterr().out
