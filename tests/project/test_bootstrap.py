import importlib.util
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tools import bootstrap

ROOT = Path(bootstrap.__file__).parent.parent


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder without .venv; bootstrap works there."""
    for name in bootstrap.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    venv = tmp_path / ".venv"
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "VENV", venv)
    monkeypatch.setattr(bootstrap, "PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(bootstrap, "STAMP", venv / "installed")
    return tmp_path


def test_old_python_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"Python 3\.9 is too old"):
        bootstrap.check_python((3, 9))


def test_untested_python_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    bootstrap.check_python((3, 14))
    assert "Python 3.14 is newer than the versions tested" in capsys.readouterr().out


@pytest.mark.parametrize("version", [(3, 10), (3, 13)])
def test_supported_python_passes_silently(
    version: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    bootstrap.check_python(version)
    assert capsys.readouterr().out == ""


def test_missing_python3_venv_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "ensurepip")
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        bootstrap.check_venv_module()


def test_short_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: usage(free=9.2e9))
    bootstrap.check_disk(tmp_path, 9.1)
    with pytest.raises(SystemExit, match=r"The disk is short: 9\.2 GB free at .*, 9\.5 needed"):
        bootstrap.check_disk(tmp_path, 9.5)


def test_short_disk_stops_before_anything_is_made(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: usage(free=1e9))
    with pytest.raises(SystemExit, match="The disk is short"):
        bootstrap.main()
    assert not (project / ".venv").exists()


def test_up_to_date_environment_is_left_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installations = []
    monkeypatch.setattr(bootstrap, "install", lambda: installations.append(1))
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").touch()

    bootstrap.main()
    assert len(installations) == 1
    bootstrap.main()
    assert len(installations) == 1
    with (project / "constraints.txt").open("a") as constraints:
        constraints.write("# changed\n")
    bootstrap.main()
    assert len(installations) == 2


def test_failed_installation_is_not_taken_for_done(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap, "install", interrupt)
    with pytest.raises(SystemExit, match="The same command goes on from here"):
        bootstrap.main()
    assert not (project / ".venv" / "installed").exists()


def test_half_installed_distribution_is_forgotten(tmp_path: Path) -> None:
    site_packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("whole-1.dist-info", "half-1.dist-info", "~orch"):
        (site_packages / name).mkdir(parents=True)
        (site_packages / name / "METADATA").touch()
    (site_packages / "whole-1.dist-info" / "INSTALLER").touch()
    bootstrap.forget_half_installed(tmp_path)
    assert [path.name for path in site_packages.iterdir()] == ["whole-1.dist-info"]


@pytest.mark.slow
def test_unreachable_index_is_told_plainly(project: Path) -> None:
    env = dict(os.environ, PIP_INDEX_URL="http://127.0.0.1:9", PIP_CONFIG_FILE="/dev/null")
    env.update(PIP_FIND_LINKS="", PIP_EXTRA_INDEX_URL="")
    command = [sys.executable, str(project / "tools" / "bootstrap.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "The package index cannot be reached (http://127.0.0.1:9)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("word", "status"), [("--help", 0), ("--hlep", 2)])
def test_words_are_answered_and_nothing_is_installed(word: str, status: int) -> None:
    command = [sys.executable, "-S", bootstrap.__file__, word]  # without pip, were it asked for
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert done.stdout.startswith("usage: bootstrap.py\n\nMake .venv")
