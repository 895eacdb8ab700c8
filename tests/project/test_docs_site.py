"""The site is whole and needs no net; the notebook runs from top to bottom."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
# What a browser fetches by itself; <a href> it does not.
FETCHED = re.compile(r'(?:src="|<link [^>]*href="|url\()\s*(?:https?:)?//[^"\s)]*')


def build(config: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "-f", config, "-d", output]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is missing: pip install -e '.[docs]'")
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {x.relative_to(tmp_path / "site"): x.read_text() for x in tmp_path.rglob("*.html")}
    assert not {name: FETCHED.findall(text) for name, text in pages.items() if FETCHED.search(text)}

    public = pages[Path("reference/inspose_d2.html")]
    assert "Find the poses of one image, or of each of a list." in public
    assert 'id="inspose_d2.modeling.kp_net.KPNet"' in pages[Path("reference/modeling.html")]
    assert not [name for name, text in pages.items() if re.search(r":(func|class|meth):<", text)]
    links = re.findall(
        r'href="([^"]*getting_started.html#two-commands|[^"]*#two-commands)"',
        pages[Path("getting_started.html")],
    )
    assert links == ["repository/index.html#two-commands"]


@pytest.mark.slow
@pytest.mark.parametrize("link", ["nowhere.md", "faq.md#no-such-heading", "../nowhere.py"])
def test_link_that_leads_nowhere_fails_the_build(tmp_path: Path, link: str) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is missing: pip install -e '.[docs]'")
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "faq.md").write_text(f"# Questions\n\n[broken]({link})\n")
    text = (ROOT / "mkdocs.yml").read_text()
    validation = text[text.index("validation:") : text.index("not_in_nav")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\nstrict: true\n{validation}")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    assert link.partition("#")[2] in done.stderr


def test_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [x for x in cells if x["cell_type"] == "code"]
    assert code
    assert not [x for x in code if x["outputs"] or x["execution_count"] is not None]


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "the extra docs is missing: pip install -e '.[docs]'"
    nbformat = pytest.importorskip("nbformat", reason=why)
    nbclient = pytest.importorskip("nbclient", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check = "assert len(poses) == 1 and poses.scores[0] > 0.5 and after > before + 10"
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    nbclient.NotebookClient(notebook, timeout=3000).execute()
    outputs = [x for cell in notebook.cells for x in cell.get("outputs", [])]
    assert sum("image/png" in x.get("data", {}) for x in outputs) == 3
