"""The rooms of the package import one way, as their ``__init__`` files say."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "inspose_d2"
# From the top: a room may import those below it, and modules of its own.
LAYERS = (
    ("cli",),
    ("public",),
    ("engine",),
    ("export", "visualization", "evaluation", "tracking"),
    ("model_zoo",),
    ("checkpoint", "data"),
    ("modeling",),
    ("config", "workers", "install_detectron2"),
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# Images and files are no business of the network.
NOT_IN_MODELING = {"cv2", "PIL", "yaml", "tqdm", "matplotlib", "gradio"}
# What each folder of the repository may import of the others.
FOLDERS = {
    "inspose_d2": set(),
    "benchmarks": {"inspose_d2"},
    "experiments": {"inspose_d2", "benchmarks"},
    "examples": {"inspose_d2"},
    "tools": set(),
}
FILES = sorted(x for x in PACKAGE.rglob("*.py") if x.parent != PACKAGE or x.stem in LAYER)


def imports_of(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, late ones too."""
    parts = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level + 1]
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{x.name}" for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{x.name}" for x in node.names)


def test_imports_point_downwards() -> None:
    for path in FILES:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports_of(path):
            top, _, rest = name.partition(".")
            if own == "modeling":
                assert top not in NOT_IN_MODELING, (path, name)
            room = rest.partition(".")[0]
            if top == "inspose_d2" and room in LAYER and room != own:
                assert LAYER[room] > LAYER[own], (path, name)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_product_imports_no_benchmark_and_no_experiment(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    tops = {name.partition(".")[0] for path in files for name in imports_of(path)}
    assert tops & {*FOLDERS, "tests"} <= FOLDERS[folder] | {folder}


def test_every_room_is_known_and_introduces_itself() -> None:
    rooms = {x.parent.name for x in PACKAGE.glob("*/__init__.py")}
    assert rooms <= LAYER.keys()
    for room in rooms:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert "May import" in text, room
