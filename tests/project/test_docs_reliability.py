"""docs/reliability.md has every fault, each with tests that exist and bear the mark."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reliability.md").read_text()
NUM_ROWS = 75
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def functions(path: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_named_tests_exist() -> None:
    tests = TEST.findall(TEXT)
    assert len(tests) == TEXT.count(".py::") > NUM_ROWS
    assert [(path, name) for path, name in tests if name not in functions(path)] == []


def test_every_fault_has_tests_with_the_mark() -> None:
    rows = {int(row[1]): row[0] for row in re.finditer(r"^\| (\d+) \|.*$", TEXT, re.MULTILINE)}
    assert rows.keys() == set(range(1, NUM_ROWS + 1))
    for number, row in rows.items():
        assert TEST.search(row), number
        for path, name in TEST.findall(row):
            marks = [ast.unparse(x) for x in functions(path)[name].decorator_list]
            own = "\npytestmark = pytest.mark.fault\n" in (ROOT / path).read_text()
            assert own or "pytest.mark.fault" in marks, (number, name)
