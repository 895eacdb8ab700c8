"""MODEL_ZOO.md and the script that counts for it."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from benchmarks import update_model_zoo
from benchmarks.analyze import load

ROOT = Path(__file__).parents[2]
ZOO = (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8")
CONFIGS = [
    path.relative_to(ROOT)
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if not path.name.startswith("Base") and path.parent.name not in ("quick", "peer")
]


def rows() -> list[dict[str, str]]:
    """Rows of all tables of MODEL_ZOO.md, each from the heads of its columns to its cells."""
    found, header = [], []
    for line in ZOO.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "Name":
            header = cells
        elif line.startswith("| "):
            found.append(dict(zip(header, cells, strict=True)))
    return found


def test_script_fills_the_named_columns_and_links_the_config() -> None:
    zoo = (
        "| Name | AP | params (M) | GMACs |\n|---|---|---|---|\n"
        "| InsPose_R50_3x | not measured | ? | ? |\n| InsPose_none | 1 | ? | ? |\n\n"
        "GMACs of InsPose_R50_3x.\n\n"
        "| Name | GMACs | params (M) |\n|---|---|---|\n| [InsPose_R50_3x](old) | 9 | 9 |\n"
    )
    filled, missing = update_model_zoo.fill(zoo, lambda path: (len(path.stem), 0.125))
    link = "[InsPose_R50_3x](configs/InsPose_R50_3x.yaml)"
    assert filled == zoo.replace(
        "| InsPose_R50_3x | not measured | ? | ? |", f"| {link} | not measured | 14.00 | 0.12 |"
    ).replace("| [InsPose_R50_3x](old) | 9 | 9 |", f"| {link} | 0.12 | 14.00 |")
    assert missing == ["InsPose_none"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_full_config_has_a_row_with_its_parameters(config: Path) -> None:
    if "HRNet" in config.stem or "Lite0" in config.stem:
        pytest.importorskip("timm")
    cfg = load(str(ROOT / config))
    cfg.MODEL.DEVICE = "meta"  # shapes alone: no memory, no time
    with torch.device("meta"):
        model = build_model(cfg)
    training_alone = re.compile("heatmap_branch|regression_pred|heatmap_pred|tag_pred")
    parameters = model.named_parameters()
    at_inference = [p for name, p in parameters if not training_alone.search(name)]
    millions = sum(p.numel() for p in at_inference) / 1e6
    own = [row for row in rows() if row["Name"] == f"[{config.stem}]({config.as_posix()})"]
    assert own, f"MODEL_ZOO.md does not link {config}: run python -m benchmarks.update_model_zoo"
    for row in own:
        assert float(row["params (M)"]) == pytest.approx(millions, abs=0.006)
        assert float(row["GMACs"]) > 0
