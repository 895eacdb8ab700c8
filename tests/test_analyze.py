"""The tables of tools/analyze.py."""

import re
from pathlib import Path

import analyze
import pytest
from detectron2.config import get_cfg

from inspose_d2 import add_inspose_config

QUICK = str(Path(__file__).parent.parent / "configs" / "quick" / "synthetic_people.yaml")


def test_parts_add_up_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config-file", QUICK, "--size", "256", "320", "--persons", "40", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["analyze.py", *flags])
    analyze.main()
    table = re.findall(r"^(.+?)  +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    params, macs = ({row[0]: float(row[i]) for row in table} for i in (1, 2))
    assert params.pop("total") == pytest.approx(sum(params.values()), abs=0.05)
    assert macs.pop("total") == pytest.approx(sum(macs.values()), abs=0.05)
    assert macs["heatmap branch (training only)"] == 0
    # 40 persons x (3x3x64 inputs to 313 parameters + 280 multiply-adds in 32 x 40 cells).
    kp_nets = 40 * (9 * 64 * 313 + 280 * 32 * 40) / 1e9
    assert macs["40 KP-Nets and their parameters"] == pytest.approx(kp_nets, abs=0.01)


def test_model_finds_the_asked_number_of_persons() -> None:
    cfg = get_cfg()
    add_inspose_config(cfg)
    cfg.merge_from_file(QUICK)
    cfg.MODEL.DEVICE = "cpu"
    model = analyze.build(cfg, 7)
    image = analyze.torch.rand(3, 64, 96) * 255
    with analyze.torch.no_grad():
        assert len(model([{"image": image}])[0]["instances"]) == 7
