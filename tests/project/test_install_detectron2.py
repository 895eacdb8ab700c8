import base64
import csv
import hashlib
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from inspose_d2 import install_detectron2
from inspose_d2.install_detectron2 import (
    DIST_INFO,
    VERSION,
    build_wheel,
    check_sha256,
    find_installed,
)

CONFIG = "MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n"
# LabGym's folder in small, with every way in which it writes the name.
LABGYM = {
    "LabGym/__init__.py": "import tensorflow\n",
    "LabGym/detectron2/__init__.py": (
        "from LabGym.detectron2.utils import env\n__version__ = '0.6'\n"
    ),
    "LabGym/detectron2/utils/__init__.py": "",
    "LabGym/detectron2/utils/env.py": (
        "import LabGym.detectron2 as package\nname = 'LabGym.detectron2.utils'\nletter = 'é'\n"
    ),
    "LabGym/detectron2/model_zoo/configs/Base.yaml": CONFIG,
    "labgym-3.1.2.dist-info/METADATA": "Name: LabGym\n",
}


@pytest.fixture
def labgym_wheel(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "labgym-3.1.2-py3-none-any.whl", LABGYM)


def write_zip(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def read_zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def make_venv(folder: Path) -> Path:
    """A bare environment; the tests' own pip installs into it."""
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--python", str(python), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_wheel_holds_detectron2_under_its_own_name(labgym_wheel: Path, tmp_path: Path) -> None:
    files = read_zip(build_wheel(labgym_wheel, tmp_path))

    code = {name: data.decode() for name, data in files.items() if name.startswith("detectron2/")}
    assert code == {
        "detectron2/__init__.py": "from detectron2.utils import env\n__version__ = '0.6'\n",
        "detectron2/utils/__init__.py": "",
        "detectron2/utils/env.py": (
            "import detectron2 as package\nname = 'detectron2.utils'\nletter = 'é'\n"
        ),
        "detectron2/model_zoo/configs/Base.yaml": CONFIG,
    }
    assert {name for name in files if name not in code} == {
        f"{DIST_INFO}/{name}" for name in ("LICENSE", "NOTICE", "METADATA", "WHEEL", "RECORD")
    }


def test_record_has_the_hash_and_size_of_every_file(labgym_wheel: Path, tmp_path: Path) -> None:
    files = read_zip(build_wheel(labgym_wheel, tmp_path))

    rows = {
        row[0]: row[1:] for row in csv.reader(files[f"{DIST_INFO}/RECORD"].decode().splitlines())
    }
    assert rows.pop(f"{DIST_INFO}/RECORD") == ["", ""]
    assert rows.keys() == files.keys() - {f"{DIST_INFO}/RECORD"}
    for name, (digest, size) in rows.items():
        sha256 = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode()
        assert digest == "sha256=" + sha256.rstrip("=")
        assert int(size) == len(files[name])


def test_wheel_says_where_it_is_from_and_under_which_licence(
    labgym_wheel: Path, tmp_path: Path
) -> None:
    files = read_zip(build_wheel(labgym_wheel, tmp_path))

    assert "Apache License" in files[f"{DIST_INFO}/LICENSE"].decode()
    notice = files[f"{DIST_INFO}/NOTICE"].decode()
    assert "Copyright (c) Facebook" in notice
    assert "LabGym 3.1.2" in notice
    metadata = files[f"{DIST_INFO}/METADATA"].decode()
    assert f"Name: detectron2\nVersion: {VERSION}\n" in metadata
    assert "Requires-Dist: iopath>=0.1.7,<0.1.10\n" in metadata


def test_wheel_is_the_same_bytes_each_time(labgym_wheel: Path, tmp_path: Path) -> None:
    first = build_wheel(labgym_wheel, tmp_path).read_bytes()
    assert build_wheel(labgym_wheel, tmp_path).read_bytes() == first


def test_unknown_use_of_the_name_is_refused(tmp_path: Path) -> None:
    files = {**LABGYM, "LabGym/detectron2/new.py": "import LabGym.mywx\n"}
    wheel = write_zip(tmp_path / "labgym.whl", files)
    with pytest.raises(SystemExit, match=r"LabGym/detectron2/new\.py still mentions LabGym"):
        build_wheel(wheel, tmp_path)


def test_wrong_sha256_is_refused(labgym_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_detectron2, "find_installed", lambda: ("", "absent"))
    with pytest.raises(SystemExit, match="is refused: its sha256 is"):
        install_detectron2.main(labgym_wheel)


def test_right_sha256_is_accepted(labgym_wheel: Path) -> None:
    check_sha256(labgym_wheel, hashlib.sha256(labgym_wheel.read_bytes()).hexdigest())


def test_existing_detectron2_is_kept(tmp_path: Path) -> None:
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("__version__ = '0.7'\n")
    done = subprocess.run(
        [make_venv(tmp_path / "venv"), install_detectron2.__file__],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "Looking for a Detectron2 that can be imported",
        f"Detectron2 0.7 from {tmp_path / 'detectron2'} is kept.",
    ]


def test_remains_of_an_interrupted_installation_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = make_venv(tmp_path / "venv")
    site_packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site_packages / "detectron2").mkdir()
    (site_packages / "detectron2" / "__init__.py").write_text("__version__ = '0.6'\n")
    monkeypatch.setattr(sys, "executable", str(python))
    found, reason = find_installed()
    assert found == ""
    assert reason.endswith("PackageNotFoundError: No package metadata was found for detectron2")


def test_unreachable_index_is_told_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="is the package index reachable"):
        install_detectron2.download(tmp_path)


def test_pip_shows_and_uninstalls_the_distribution(
    labgym_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = make_venv(tmp_path / "venv")
    wheel = build_wheel(labgym_wheel, tmp_path)
    assert pip(python, "install", "--no-deps", "--no-index", str(wheel)).returncode == 0

    monkeypatch.setattr(sys, "executable", str(python))
    assert find_installed()[0].startswith(f"{VERSION} from {tmp_path / 'venv'}")
    monkeypatch.undo()
    assert f"Version: {VERSION}\n" in pip(python, "show", "detectron2").stdout
    assert pip(python, "uninstall", "--yes", "detectron2").returncode == 0
    assert not list((tmp_path / "venv").glob("lib/python*/site-packages/detectron2*"))


@pytest.mark.slow
def test_real_wheel_converts(tmp_path: Path) -> None:
    try:
        labgym_wheel = install_detectron2.download(tmp_path)
    except SystemExit as reason:
        pytest.skip(str(reason))
    check_sha256(labgym_wheel, install_detectron2.SHA256)
    files = read_zip(build_wheel(labgym_wheel, tmp_path))

    # 155 Python files of Detectron2, 59 of its Python configs and projects; 92 yaml configs.
    assert sum(name.endswith(".py") for name in files) == 214
    assert sum(name.endswith(".yaml") for name in files) == 92
    python = make_venv(tmp_path / "venv")
    wheel = next(tmp_path.glob("detectron2-*.whl"))
    assert pip(python, "install", "--no-deps", "--no-index", str(wheel)).returncode == 0
    assert "Name: detectron2" in pip(python, "show", "detectron2").stdout
