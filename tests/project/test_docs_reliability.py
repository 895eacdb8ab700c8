"""docs/reliability.md names tests that exist, and every fault."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reliability.md").read_text()
NUM_ROWS = 74
ROWS = {int(row[1]): row[0] for row in re.finditer(r"^\| (\d+) \|.*$", TEXT, re.MULTILINE)}
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)


@cache
def functions(path: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", sorted({path for path, _ in TESTS}))
def test_named_tests_exist(path: str) -> None:
    names = {name for own_path, name in TESTS if own_path == path}
    assert names <= functions(path).keys()


def test_all_faults_are_there_and_each_has_tests_with_the_mark() -> None:
    assert ROWS.keys() == set(range(1, NUM_ROWS + 1))
    for number, row in ROWS.items():
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, number
        for path, name in tests:
            marks = [ast.unparse(x) for x in functions(path)[name].decorator_list]
            own = "\npytestmark = pytest.mark.fault\n" in (ROOT / path).read_text()
            assert own or "pytest.mark.fault" in marks, (number, name)


def test_nothing_looks_like_a_test_and_is_not_checked() -> None:
    assert len(re.findall(r"test_\w+\.py::", TEXT)) == len(TESTS)
