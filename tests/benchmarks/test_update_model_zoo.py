"""The script that counts for MODEL_ZOO.md; tests/config/test_configs.py reads the file itself."""

from benchmarks import update_model_zoo


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
