"""What the site needs beside docs/: pages of the API, of the repository's files, of the notebook.

MkDocs calls the ``on_`` functions (``hooks`` in mkdocs.yml), Griffe the class.
"""

import json
import os
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "inspose_d2"
DOCUMENTS = ("README.md", "MODEL_ZOO.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")  # no URL
PUBLIC = "# inspose_d2\n\nWhat `from inspose_d2 import ...` gives.\n\n::: inspose_d2.public\n"
ROLE = re.compile(r":[a-z]+:`(?:[^`<]*<)?[~.]*([\w.]+)>?`")  # Sphinx: :func:`name`


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are no files of docs/."""

    def add(uri: str, content: str) -> None:
        files.append(File.generated(config, uri, content=content))

    for name in DOCUMENTS:
        add(f"repository/{name}", (ROOT / name).read_text())
    documents = [*(ROOT / name for name in DOCUMENTS), *(ROOT / "docs").rglob("*.md")]
    for path in sorted({x for document in documents for x in linked_from(document)}):
        if site_uri(path).startswith("repository/") and path.name not in DOCUMENTS:
            add(site_uri(path), page_of(path))
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    add("notebook.md", page_of_notebook(notebook))
    add("reference/inspose_d2.md", PUBLIC)
    for room in PACKAGE.glob("*/__init__.py"):
        add(f"reference/{room.parent.name}.md", f"::: inspose_d2.{room.parent.name}\n")
    modules = [f"::: inspose_d2.{x.stem}\n" for x in sorted(PACKAGE.glob("[a-z]*.py"))]
    add("reference/modules.md", "\n".join(x for x in modules if ".public" not in x))


def linked_from(document: Path) -> list[Path]:
    """Files and folders of the repository that a document links to."""
    return [(document.parent / x).resolve() for x in LINK.findall(document.read_text())]


def site_uri(path: Path) -> str:
    """Where a file of the repository stands in the site."""
    inside = path.relative_to(ROOT).as_posix()
    if inside.startswith("docs/"):
        return inside[len("docs/") :]
    return f"repository/{inside}" + ("" if path.suffix == ".md" else ".md")


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let links that are true in the repository be true in the site."""
    uri = page.file.src_uri
    in_repository = uri.startswith("repository/")
    folder = (ROOT / uri[len("repository/") :] if in_repository else ROOT / "docs" / uri).parent

    def moved(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / link[1]))
        if not path.exists():
            return link[0]
        return "](" + os.path.relpath(site_uri(path), os.path.dirname(uri))

    return LINK.sub(moved, markdown)


def page_of(path: Path) -> str:
    """Show a file as code, a folder as the names in it."""
    title = f"# `{path.relative_to(ROOT)}`\n\n"
    if path.is_dir():
        return title + "".join(f"- `{x.name}`\n" for x in sorted(path.iterdir()))
    language = {".py": "python", ".yaml": "yaml", ".cff": "yaml"}.get(path.suffix, "text")
    return f"{title}````{language}\n{path.read_text().rstrip()}\n````\n"


def page_of_notebook(notebook: dict) -> str:
    """Texts and code of the notebook, without results, which it does not hold."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


class Roles(griffe.Extension):
    """Make links of Sphinx's roles, which docstrings are written with."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Rewrite every docstring, now that all names are known."""
        self.paths = [x.path for x in members(pkg)]
        for one in members(pkg):
            if one.docstring:
                text = one.docstring.value
                one.docstring.value = ROLE.sub(lambda x, one=one: self.link(one, x[1]), text)

    def link(self, one: griffe.Object, name: str) -> str:
        """Link to the object with this name that is nearest, or only name it."""
        ending = [x for x in self.paths if f".{x}".endswith(f".{name}")]
        if not ending:
            return f"`{name}`"
        nearest = max(ending, key=lambda x: one.path.startswith(x.rpartition(".")[0]))
        return f"[`{name}`][{nearest}]"


def members(parent: griffe.Object) -> list[griffe.Object]:
    """List an object and all that is defined in it and has a page entry."""
    shown = [parent] if parent.docstring and not re.search(r"\._[^_]", parent.path) else []
    for x in parent.members.values():
        if not x.is_alias:
            shown += members(x)
    return shown
