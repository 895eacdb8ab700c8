"""The table of benchmarks/analyze.py."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import analyze

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = str(CONFIGS / "quick" / "synthetic_people.yaml")


@pytest.mark.parametrize("with_boxes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parts_add_up_to_the_whole(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    with_boxes: bool,
) -> None:
    config = tmp_path / "config.yaml"
    box_head = f"MODEL: {{INSPOSE: {{BOX_HEAD: {{ENABLED: {with_boxes}}}}}}}"
    config.write_text(f"_BASE_: {QUICK}\n{box_head}\n")
    flags = ["--config-file", str(config), "--size", "256", "320", "--persons", "400"]
    monkeypatch.setattr("sys.argv", ["analyze.py", *flags])
    analyze.main()
    table = re.findall(r"^(.+?)  +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    params, macs = ({row[0]: float(row[i]) for row in table} for i in (1, 2))
    assert params.pop("total") == pytest.approx(sum(params.values()), abs=0.05)
    assert macs.pop("total") == pytest.approx(sum(macs.values()), abs=0.05)
    assert macs["heatmap branch (training only)"] == 0
    # By hand, 400 persons: 3x3x64 inputs to 313 parameters (and 4 sides of a box); layers 10 to 8,
    # 8 to 8 and 8 to 17 channels, 280 multiply-adds in each of 32 x 40 cells.
    predictions = 400 * 9 * 64 * (313 + 4 * with_boxes) / 1e9
    assert macs["KP-Net parameters (and boxes) at 400 locations"] == pytest.approx(
        predictions, abs=0.006
    )
    assert macs["400 KP-Nets"] == pytest.approx(400 * 280 * 32 * 40 / 1e9, abs=0.006)


def test_kp_nets_are_counted_to_the_last_multiplication() -> None:
    model = analyze.build(analyze.load(QUICK), 7)
    _, macs = analyze.count(model, [{"image": torch.rand(3, 64, 96) * 255}])
    assert macs["predictions at locations"] == 7 * 9 * 64 * 313
    # 280 in each of 8 x 12 cells, and two per output of layer 1 for the person's location.
    assert macs["KP-Nets"] == 7 * (280 * 8 * 12 + 2 * 8)


def test_model_finds_the_asked_number_of_persons() -> None:
    model = analyze.build(analyze.load(QUICK), 7)
    image = torch.rand(3, 64, 96) * 255
    with torch.no_grad():
        assert len(model([{"image": image}])[0]["instances"]) == 7
