"""Configs from names, files and command lines: what they become, and how mistakes are told."""

import re
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_get_cfg

import inspose_d2
from inspose_d2 import ConfigError, add_inspose_config, get_cfg, list_configs

CONFIGS = Path(__file__).parents[2] / "configs"


def detectron2_way(path: Path) -> CfgNode:
    cfg = detectron2_get_cfg()
    add_inspose_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", list_configs())
def test_packaged_config_equals_detectron2s_own_reading(name: str) -> None:
    theirs = detectron2_way(CONFIGS / f"{name}.yaml")
    ours = get_cfg(name, ["MODEL.DEVICE", theirs.MODEL.DEVICE])
    assert ours == theirs
    assert ours == get_cfg(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", theirs.MODEL.DEVICE])


def test_names_are_all_files_but_the_base() -> None:
    files = {p.relative_to(CONFIGS).as_posix().removesuffix(".yaml") for p in CONFIGS.rglob("*.*")}
    assert set(inspose_d2.list_configs()) == files - {"Base-InsPose"}
    assert {"InsPose_R50_3x", "quick/synthetic_people"} < files


def test_without_a_file_it_is_detectron2s_defaults_and_ours() -> None:
    cfg = detectron2_get_cfg()
    add_inspose_config(cfg)
    assert get_cfg(opts=["MODEL.DEVICE", cfg.MODEL.DEVICE]) == cfg
    assert not get_cfg().is_frozen()


@pytest.mark.parametrize("there", [True, False])
def test_device_is_what_the_machine_has_unless_set(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    device = get_cfg().MODEL.DEVICE
    assert device == ("cuda" if there else "cpu")
    assert get_cfg(opts=["MODEL.DEVICE", "cuda"]).MODEL.DEVICE == "cuda"


def test_dump_is_read_back(tmp_path: Path) -> None:
    cfg = get_cfg("quick/synthetic_people", ["SOLVER.STEPS", "(3, 5)"])
    dumped = write(tmp_path / "config.yaml", cfg.dump())
    again = get_cfg(dumped)
    assert again == detectron2_way(dumped)
    assert (again.MODEL.INSPOSE, again.SOLVER, again.INPUT) == (
        cfg.MODEL.INSPOSE,
        cfg.SOLVER,
        cfg.INPUT,
    )


def test_file_wins_over_its_bases_and_options_win_over_both(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "SOLVER: {BASE_LR: 0.5, MAX_ITER: 5, GAMMA: 0.5}\n")
    write(tmp_path / "b.yaml", "SOLVER: {BASE_LR: 0.25, MAX_ITER: 6}\n")
    child = "_BASE_: [a.yaml, b.yaml]\nSOLVER:\n  MAX_ITER: 7\nMODEL:\n"
    cfg = get_cfg(write(tmp_path / "c.yaml", child), ["SOLVER.CHECKPOINT_PERIOD", "8"])
    solver = cfg.SOLVER
    assert (solver.GAMMA, solver.BASE_LR) == (0.5, 0.25)
    assert (solver.MAX_ITER, solver.CHECKPOINT_PERIOD) == (7, 8)


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-3", 0.001),
        ("SOLVER.STEPS", [3, 5], (3, 5)),
        ("MODEL.PIXEL_MEAN", "(1., 2., 3.)", [1.0, 2.0, 3.0]),
        ("OUTPUT_DIR", "2024", "2024"),
        ("DATASETS.TEST", "('a', 'b')", ("a", "b")),
        ("TEST.AUG.ENABLED", "True", True),
        ("SOLVER.WEIGHT_DECAY_BIAS", "0.5", 0.5),
        ("SOLVER.WEIGHT_DECAY_BIAS", None, None),
    ],
)
def test_values_get_the_type_of_their_key(key: str, given: Any, value: Any) -> None:
    node = get_cfg(opts=[key, given])
    for name in key.split("."):
        node = node[name]
    assert node == value
    assert type(node) is type(value)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["SOLVER.BASE_RL", 0.1], ["SOLVER.BASE_RL", "'SOLVER.BASE_LR'"]),
        (["solver.base_lr", 0.1], ["'SOLVER.BASE_LR'"]),
        (["MODEL.NUM_KEYPOINTS", 17], ["MODEL.NUM_KEYPOINTS", "NUM_KEYPOINTS'"]),
        (["INSPOSE.NMS_THRESH_TEST", 1], ["'MODEL.INSPOSE.NMS_THRESH_TEST'"]),
        (["QWERTY", 1], ["there is no key QWERTY."]),
        (["SOLVER.BASE_LR.X", 1], ["there is no key SOLVER.BASE_LR.X."]),
        (["SOLVER", 1], ["SOLVER is a group of keys such as SOLVER."]),
        (["_BASE_", "x.yaml"], ["there is no key _BASE_"]),
        (["SOLVER.BASE_LR"], ["pairs KEY VALUE", "SOLVER.BASE_LR"]),
        (["SOLVER.BASE_LR=1"], ["separated by a space", "SOLVER.BASE_LR=1"]),
        (["SOLVER.BASE_LR", "fast"], ["SOLVER.BASE_LR is 'fast'", "float", "0.01"]),
        (["SOLVER.MAX_ITER", 1.5], ["SOLVER.MAX_ITER is 1.5", "int", "127350"]),
        (["SOLVER.MAX_ITER", True], ["SOLVER.MAX_ITER is True", "int"]),
        (["SOLVER.MAX_ITER", None], ["SOLVER.MAX_ITER is None", "int"]),
        (["TEST.AUG.ENABLED", 1], ["TEST.AUG.ENABLED is 1", "bool", "False"]),
        (["DATASETS.TEST", "val"], ["DATASETS.TEST is 'val'", "tuple", "('val',)"]),
        (["INPUT.MIN_SIZE_TEST", "(800,)"], ["INPUT.MIN_SIZE_TEST is '(800,)'", "int", "800"]),
        (["INPUT.MIN_SIZE_TRAIN", 640], ["INPUT.MIN_SIZE_TRAIN is 640", "tuple", "(640,)"]),
        (["INPUT.MIN_SIZE_TRAIN", "x"], ["INPUT.MIN_SIZE_TRAIN is 'x'", "tuple", "(640, 800)"]),
        (["MODEL.WEIGHTS", 3], ["MODEL.WEIGHTS is 3", "str"]),
    ],
)
def test_wrong_option_is_told_by_key_and_cure(opts: list[Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        get_cfg("InsPose_R50_3x", opts)
    assert [x for x in words if x not in str(error.value)] == []


@pytest.mark.fault
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SOLVER:\n  BASE_RL: 0.1\n", ["SOLVER.BASE_RL", "'SOLVER.BASE_LR'"]),
        ("SOLVER:\n  BASE_LR: fast\n", ["SOLVER.BASE_LR", "'fast'", "float"]),
        ("SOLVER: 3\n", ["SOLVER is a group"]),
        ("MODEL:\n  WEIGHTS:\n", ["MODEL.WEIGHTS is None", "str"]),
        ("A: [1\nB: 2\n", ["line 2", "plain YAML"]),
        ("- 1\n- 2\n", ["KEY: VALUE", "[1, 2]"]),
        ("", ["KEY: VALUE", "nothing"]),
        ("_BASE_: no.yaml\n", ["_BASE_ 'no.yaml' is no file", "/no.yaml"]),
        ("_BASE_: 3\n", ["_BASE_ 3 is no file"]),
        ("_BASE_: https://localhost/x.yaml\n", ["_BASE_ 'https://localhost/x.yaml' is no file"]),
    ],
)
def test_bad_file_is_told_by_its_name_and_what_is_wrong(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = write(tmp_path / "my.yaml", text)
    with pytest.raises(ConfigError) as error:
        get_cfg(path)
    assert [x for x in [str(path), *words] if x not in str(error.value)] == []


@pytest.mark.fault
def test_bytes_that_are_no_text_are_told_by_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    for data in (b"\xff\xfe\x00\x80", b"A: \x00\x01"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            get_cfg(path)


@pytest.mark.fault
def test_unknown_key_of_a_base_names_the_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "SOLVER:\n  LR: 1\n")
    child = write(tmp_path / "child.yaml", "_BASE_: base.yaml\n")
    with pytest.raises(ConfigError, match=re.escape(f"{base}: there is no key SOLVER.LR")):
        get_cfg(child)


@pytest.mark.fault
@pytest.mark.parametrize("last", ["a.yaml", "b.yaml", "../tmp/../{folder}/b.yaml"])
def test_cycle_of_bases_lists_the_chain(tmp_path: Path, last: str) -> None:
    a = write(tmp_path / "a.yaml", "_BASE_: b.yaml\n")
    b = write(tmp_path / "b.yaml", f"_BASE_: {last.format(folder=tmp_path.name)}\n")
    if "tmp" in last:
        b.write_text(f"_BASE_: ../{tmp_path.name}/b.yaml\n")
    chain = [a, b, a] if last == "a.yaml" else [b, b]
    with pytest.raises(ConfigError, match=re.escape(": " + " -> ".join(map(str, chain))) + "$"):
        get_cfg(a)


def test_base_may_be_a_name_of_the_package(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "_BASE_: quick/synthetic_people\nSEED: 3\n")
    expected = get_cfg("quick/synthetic_people", ["SEED", 3])
    assert get_cfg(path) == expected
    write(tmp_path / "InsPose_R50_3x", "SEED: 5\n")  # a file goes before a name
    path = write(tmp_path / "mine.yaml", "_BASE_: InsPose_R50_3x\n")
    assert get_cfg(path) == get_cfg(None, ["SEED", 5])
    path = write(tmp_path / "mine.yaml", "_BASE_: InsPose_R50_3y\n")
    with pytest.raises(ConfigError, match=r"no name of a config.* Did you mean 'InsPose_R50_3x'"):
        get_cfg(path)


def test_two_bases_with_one_base_are_no_cycle(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", "SEED: 3\n")
    for name in ("left", "right"):
        write(tmp_path / f"{name}.yaml", "_BASE_: root.yaml\n")
    assert get_cfg(write(tmp_path / "top.yaml", "_BASE_: [left.yaml, right.yaml]\n")).SEED == 3


@pytest.mark.fault
@pytest.mark.parametrize(
    "text",
    [
        "OUTPUT_DIR: !!python/object/apply:os.mkdir ['{target}']\n",
        "OUTPUT_DIR: !!python/object/new:os.mkdir ['{target}']\n",
        "OUTPUT_DIR: !!python/name:os.mkdir\n",
    ],
)
def test_python_in_a_file_does_not_run(tmp_path: Path, text: str) -> None:
    target = tmp_path / "made"
    path = write(tmp_path / "my.yaml", text.format(target=target))
    base = write(tmp_path / "child.yaml", "_BASE_: my.yaml\n")
    for file in (path, base):
        with pytest.raises(ConfigError, match=r"my\.yaml, line 1, .* not plain YAML"):
            get_cfg(file)
    assert not target.exists()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("InsPose_R50_3", ["'InsPose_R50_3' is no file", "'InsPose_R50_3x'"]),
        ("configs/InsPose_R50_3y.yaml", ["'InsPose_R50_3x'"]),
        ("InsPose_R50_3x_depth2", ["'ablations/InsPose_R50_3x_depth2'"]),
        ("my.py", ["'my.py' is no file", "list_configs()"]),
        (str(CONFIGS), ["is a folder"]),
        ("", ["list_configs()"]),
    ],
)
def test_wrong_name_of_a_config_suggests_the_nearest(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        get_cfg(name)
    assert [x for x in words if x not in str(error.value)] == []


def test_python_files_are_no_configs(tmp_path: Path) -> None:
    path = write(tmp_path / "lazy.py", "raise SystemExit\n")
    with pytest.raises(ConfigError, match=r"lazy\.py"):
        get_cfg(path)
