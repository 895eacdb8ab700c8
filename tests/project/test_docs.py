"""Every command, link and error message of the documents: checked, and run where it is cheap.

A command is parsed by its program's own parser, its config is read, with its changes, and its files
are there. Beyond that those of users' programs are run, with stand-ins (`RUN`).
"""

import argparse
import ast
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import detectron2
import pytest
import yacs.config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import META_ARCH_REGISTRY
from torch.distributed.run import get_args_parser

import inspose_d2
from inspose_d2 import get_cfg
from inspose_d2.data.check import check_config
from inspose_d2.data.synthetic import build_synthetic_people

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "MODEL_ZOO.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Written by programs: their commands are those of their time.
RECORDED = re.compile(r"docs/(performance/(?!gpu_report)|tables/.*_small)")
PACKAGES = ("inspose_d2", "benchmarks", "experiments")
# Programs that are run here, with small stand-ins for what a command would need.
RUN = {"train_net.py", "inspose predict", "inspose browse", "inspose validate"}
# Configs that a page tells to write, and one to read in their place.
OWN_CONFIGS = {"fish.yaml", "photos.yaml", "torso.yaml"}
STAND_IN = "quick/synthetic_people_tiny"

PROGRAMS = "inspose|python|make|pip|torchrun|tensorboard|sha256sum|sbatch"
INLINE = re.compile(rf"`((?:\w+=\S+ )*(?:\.venv/bin/)?(?:{PROGRAMS}) [^`]+)`")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Parsed(BaseException):
    """What a program has read from its command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments


def is_walk(block: str) -> bool:
    """Whether the commands make what the next ones need: they are run together."""
    return "<<'END'" in block


def commands_of(path: Path) -> Iterator[str]:
    """Commands of a document's bash blocks and of its running text."""
    text = path.read_text()
    for language, block in BLOCK.findall(text):
        if language in ("bash", "sh", "console"):
            block = re.sub(r"^cat > \S+ <<'(\w+)'\n.*?^\1$", "", block, flags=re.M | re.S)
            lines = [x.strip() for x in block.replace("\\\n", " ").splitlines()]
            yield from (x for x in lines if x and not re.match(r"#|for .* do$|done$", x))
    # Paragraphs are wrapped: a command may go over two lines.
    yield from (" ".join(x.split()) for x in INLINE.findall(BLOCK.sub("", text)))


def words_of(command: str) -> list[str]:
    """Words without comments, settings of variables before and launchers of the shell."""
    command = re.sub(r"\[(--[^\]]*)\]", r"\1", command)  # [--optional]
    words = shlex.split(command.replace(" CONFIG", " InsPose_R50_3x"), comments=True)
    words = list(itertools.dropwhile(lambda x: re.match(r"[A-Z_0-9]+=[^$]", x), words))
    if words[0] == ".venv/bin/python":
        words[0] = "python"
    return words


NAMES = {d.relative_to(ROOT).as_posix(): d for d in DOCUMENTS}
ALL = sorted({(n, c) for n, d in NAMES.items() if not RECORDED.match(n) for c in commands_of(d)})
PYTHON = [
    (f"{d.relative_to(ROOT)}-{number}", block)
    for d in DOCUMENTS
    for number, (language, block) in enumerate(BLOCK.findall(d.read_text()))
    if language == "python"
    and not re.search("torch.export.load|register", block)  # run by tests of what they document
]


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Script or module of the project, and its arguments."""
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "torchrun":
        arguments = get_args_parser().parse_args(words[1:])
        return arguments.training_script, arguments.training_script_args
    if words[0] == "inspose":
        return "inspose_d2", words[1:]
    if words[:2] == ["python", "-m"] and words[2].split(".")[0] in PACKAGES:
        return words[2], words[3:]
    if words[0] == "python" and words[1].endswith(".py"):
        return words[1], words[2:]
    return None


def name_of(program: str, arguments: list[str]) -> str:
    """Name in RUN."""
    return f"inspose {arguments[0]}" if program == "inspose_d2" and arguments else program


def is_named_only(program: str, arguments: list[str]) -> bool:
    """Whether a command has no arguments: a text speaks of it."""
    subcommands = 0 if program != "inspose_d2" else 2 if arguments[:1] == ["convert"] else 1
    return len(arguments) <= subcommands


def call(program: str, arguments: list[str]) -> Any:
    """Run a program in this process; returns its exit status."""
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    where = str(ROOT / program) if program.endswith(".py") else program
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        try:
            run(where, run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def parse(program: str, arguments: list[str]) -> argparse.Namespace:
    """Let the program's own parser read the arguments."""
    read = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise Parsed(read(parser, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        for name in (program, f"{program}.__main__"):  # or runpy would warn
            patch.delitem(sys.modules, name, raising=False)
        try:
            status = call(program, arguments)
        except Parsed as parsed:
            return parsed.arguments
    pytest.fail(f"{program} refuses its command line: exit status {status}")


def check_command(command: str) -> None:
    """A command's program is there and understands it."""
    words = words_of(command)
    program = program_of(words)
    if program is not None:
        assert (ROOT / program[0]).is_file() or importlib.util.find_spec(program[0])
        if not is_named_only(*program) and "--help" not in words:
            check_arguments(*program)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[:2] == ["python", "-c"]:
        exec(compile(words[2], "command", "exec"), {})


@pytest.mark.parametrize("document", sorted({name for name, _ in ALL}))
def test_commands_are_understood(document: str) -> None:
    for command in (own for name, own in ALL if name == document):
        try:
            check_command(command)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            raise AssertionError(command) from error


def check_arguments(program: str, arguments: list[str]) -> None:
    """A command line has a config that can be read and checked, and no unknown option."""
    parsed = parse(program, arguments)
    options = getattr(parsed, "opts", [])
    config = getattr(parsed, "config_file", None)
    # With argparse.REMAINDER a misspelt option would be the first KEY.
    assert not any(x.startswith("-") for x in options[::2])
    if config in OWN_CONFIGS:
        config = STAND_IN
    if config:
        cfg = get_cfg(config if not config.startswith("configs") else ROOT / config, options)
        if program == "train_net.py":
            cfg.MODEL.DEVICE = "cpu"
            check_config(cfg, training=not parsed.eval_only)


# Running them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as the commands expect it, with stand-ins for data, config and photographs."""
    folder = tmp_path_factory.mktemp("docs")
    file = build_synthetic_people(folder, "val", 4, 64, num_workers=1)
    images = file.parents[1] / "val"
    people = MetadataCatalog.get("synthetic_people_val")
    name = "docs_people"
    DatasetCatalog.register(name, lambda: load_coco_json(str(file), str(images), name))
    MetadataCatalog.get(name).set(
        json_file=str(file),
        image_root=str(images),
        evaluator_type="coco",
        keypoint_names=people.keypoint_names,
        keypoint_flip_map=people.keypoint_flip_map,
        keypoint_connection_rules=people.keypoint_connection_rules,
    )
    small = {
        "_BASE_": str(ROOT / "configs/quick/synthetic_people_tiny.yaml"),
        "MODEL": {
            "DEVICE": "cpu",
            "INSPOSE": {"SCORE_THRESH_TEST": 0.0, "TOPK_CANDIDATES_TEST": 5},
        },
        "DATASETS": {"TRAIN": [name], "TEST": [name]},
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"MAX_ITER": 1, "IMS_PER_BATCH": 2},
        "TEST": {"EVAL_PERIOD": 0, "AUG": {"MIN_SIZES": [64]}},
        "OUTPUT_DIR": "output",
    }
    (folder / "small.yaml").write_text(json.dumps(small))
    shutil.copytree(images, folder / "photos")
    (folder / "inspose_d2").symlink_to(ROOT / "inspose_d2")
    shutil.copy(next(images.iterdir()), folder / "image.jpg")
    frame = cv2.imread(str(folder / "image.jpg"))
    size = frame.shape[1], frame.shape[0]
    dance = cv2.VideoWriter(str(folder / "dance.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, size)
    for _ in range(3):
        dance.write(frame)
    dance.release()
    coco = folder / "coco"
    shutil.copytree(images, coco / "train2017")
    shutil.copytree(file.parent, coco / "annotations")
    shutil.copy(file, coco / "annotations" / "person_keypoints_train2017.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(folder))
        patch.chdir(folder)
        assert call("train_net.py", ["--config-file", "small.yaml"]) == 0
        assert call("train_net.py", evaluation("output/model_final.pth")) == 0
        shutil.copytree("output", "output/demo")
        yield folder
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def evaluation(weights: str) -> list[str]:
    return ["--config-file", "small.yaml", "--eval-only", "MODEL.WEIGHTS", weights]


NEEDS_MORE = re.compile(
    r"--num-machines|test-dev|webcam|rtsp:|SOLVER\.REFERENCE|model_0054999|output/torso|official\.pth|rcnn_R_50|resnet50"
)
SMALL_COMMANDS = sorted(
    {
        command.partition("  #")[0].strip()
        for _, command in ALL
        if (found := program_of(words_of(command))) is not None
        and words_of(command)[0] in ("python", "inspose")
        and name_of(*found) in RUN
        and not is_named_only(*found)
        and not NEEDS_MORE.search(command)
        and "..." not in command
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("command", SMALL_COMMANDS)
def test_command_runs_with_stand_ins(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    program, arguments = program_of(words_of(os.path.expandvars(command)))
    small = {"--config-file": "small.yaml", "--num-gpus": "1", "--num": "2", "SOLVER.MAX_ITER": "1"}
    for option, value in small.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
    name = name_of(program, arguments)
    if name == "inspose predict" and not {"--weights", "--help"} & {*arguments}:
        arguments += ["--config-file", "small.yaml", "--weights", "output/demo/model_final.pth"]
    if name == "inspose validate":
        file = "coco/annotations/person_keypoints_train2017.json"
        arguments = ["validate", "--input", file, "--images", "coco/train2017", *arguments[5:]]
    assert call(program, arguments) == 0


WALKS = [b for d in DOCUMENTS for _, b in BLOCK.findall(d.read_text()) if is_walk(b)]


@pytest.mark.slow
@pytest.mark.parametrize("block", WALKS)
def test_commands_that_build_on_each_other_run(block: str, tmp_path: Path) -> None:
    for name in ("train_net.py", "configs", "inspose_d2"):
        (tmp_path / name).symlink_to(ROOT / name)
    for option, small in {"num-images 400": 12, "num-images 50": 6, "MAX_ITER 100": 2}.items():
        assert option in block
        block = block.replace(option, f"{option.split()[0]} {small}")
    python = f'"{sys.executable}"'
    script = f'python() {{ {python} "$@"; }}\ninspose() {{ {python} -m inspose_d2 "$@"; }}\n'
    script = f"set -e\n{script}{block}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": "datasets"}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, check=True)
    assert list((tmp_path / "output" / "torso" / "drawn" / "poses").iterdir())


def test_config_of_the_custom_keypoints_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "custom_keypoints.md").read_text()
    (block,) = (b for language, b in BLOCK.findall(text) if language == "yaml")
    (tmp_path / "fish.yaml").write_text(block)
    assert get_cfg(tmp_path / "fish.yaml").MODEL.INSPOSE.NUM_KEYPOINTS == 4


@pytest.mark.parametrize("block", [b for _, b in PYTHON], ids=[name for name, _ in PYTHON])
def test_python_runs_with_the_weights_of_a_stand_in(
    block: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    def small(name: str, options: Any = ()) -> Any:
        get_cfg(name, options)  # as it stands it must be one
        cfg = get_cfg("small.yaml", options)
        cfg.TEST.AUG.MIN_SIZES = (64,)
        return cfg

    monkeypatch.setattr(inspose_d2, "get_cfg", small)
    names: dict[str, Any] = {}
    exec(compile(block, "block", "exec"), names)
    assert names["poses"].pred_keypoints.shape[1:] == (17, 3)


def test_tensorboard_is_installed(folder: Path) -> None:
    assert importlib.util.find_spec("tensorboard")
    assert list((folder / "output").glob("events.out.tfevents.*"))


# Links and messages


def anchors_of(path: Path) -> set[str]:
    """Names that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = BLOCK.sub("", document.read_text())
        for link in re.findall(r"\]\(((?!https?://)[^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            assert target.exists(), (document, link)
            if anchor and target.suffix == ".md":
                assert anchor in anchors_of(target), (document, link)


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in index


def test_files_and_configs_that_are_named_exist() -> None:
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:configs|benchmarks|experiments|tools|inspose_d2|tests)/[\w/.-]+)`",
            document.read_text(),
        ):
            assert (ROOT / name).exists(), (document, name)


@cache
def messages() -> list[str]:
    """All texts in the code, with "..." for values."""
    folder = Path(detectron2.__file__).parent
    code = [ROOT / "train_net.py", *ROOT.glob("inspose_d2/**/*.py")]
    code += [folder / "data" / "build.py", Path(yacs.config.__file__)]
    texts = []
    for path in code:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"\{\}|%[sd]", "...", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "..." for x in node.values]
                texts.append("".join(map(str, parts)))
    return texts


QUOTED = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
# Of PyTorch and Python; and one that is provoked below.
FOREIGN = ("CUDA out of memory", "No such file or directory:", "No object named")


def test_messages_of_the_faq_are_those_of_the_code() -> None:
    for message in QUOTED:
        parts = [] if message.startswith(FOREIGN) else message.split("...")
        for part in filter(None, map(str.strip, parts)):
            assert any(part in text for text in messages()), message


def test_model_that_is_not_registered_is_named_as_in_the_faq() -> None:
    with pytest.raises(KeyError) as error:
        META_ARCH_REGISTRY.get("NoModel")
    assert error.value.args[0].replace("NoModel", "InsPose") in QUOTED
