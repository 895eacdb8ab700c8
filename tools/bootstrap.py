"""Make .venv and install everything into it; return at once when that is done already.

`make` calls this before anything else. It needs only the standard library, writes only below this
project, and each thing that can go wrong ends in one plain sentence.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

# No newer syntax than Python 3.6 below: an old Python has to get as far as check_python.
OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 13)
DISK_GB = 11  # 3.2 or a little more to download and 6.8 to keep, both at once

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
INPUTS = ("setup.py", "constraints.txt", "tools/bootstrap.py", "inspose_d2/install_detectron2.py")


def main() -> None:
    """Install, unless the stamp of the last complete installation is still true."""
    stamp = fingerprint()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == stamp:
        return
    try:
        install()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from here.")
    STAMP.write_text(stamp)


def fingerprint() -> str:
    """Return a text that changes with the inputs of the installation and with its place."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest() + "\n"


def install() -> None:
    """Run every step; each may find its work done, by itself or by an interrupted run before."""
    check_python(sys.version_info[:2])
    check_venv_module()
    has_venv = PYTHON.exists() and run("-m", "pip", "--version", quiet=True)[0]
    shutil.rmtree(VENV / "tmp", ignore_errors=True)
    check_disk(VENV if VENV.exists() else ROOT, DISK_GB - size_gb(VENV))

    if not has_venv:
        say("1/4 Virtual environment .venv with Python {}.{}".format(*sys.version_info))
        if subprocess.call([sys.executable, "-m", "venv", "--clear", VENV]) != 0:
            sys.exit("The virtual environment could not be made: the reason stands above.")
    STAMP.unlink(missing_ok=True)
    (VENV / "tmp").mkdir(exist_ok=True)
    forget_half_installed(VENV)

    say("2/4 Package tools")
    update_pip()
    say("3/4 PyTorch and the other packages (3 GB to download, 7 GB installed)")
    # Only fvcore and antlr4 have no wheel; they are pure Python, so no compiler is ever called.
    source = "fvcore,antlr4-python3-runtime"
    pip_install("--only-binary=:all:", "--no-binary=" + source, "--editable", str(ROOT) + "[dev]")
    repair_opencv()
    say("4/4 Detectron2")
    if not run(str(ROOT / "inspose_d2" / "install_detectron2.py"))[0]:
        sys.exit(1)
    shutil.rmtree(VENV / "tmp")
    say("Installed.")


def check_python(version: "tuple[int, int]") -> None:
    """Stop on a Python that is too old, warn about one that is untested."""
    name = "{}.{}".format(*version)
    if version < OLDEST_PYTHON:
        sys.exit(f"Python {name} is too old, 3.10 to 3.13 are needed: make PYTHON=python3.12 ...")
    if version > NEWEST_PYTHON:
        say(f"Python {name} is newer than the versions tested (3.10 to 3.13); trying it.")


def check_venv_module() -> None:
    """Stop where Debian's python3-venv is missing."""
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        sys.exit("Python cannot make virtual environments here: apt install python3-venv")


def check_disk(folder: Path, needed_gb: float) -> None:
    """Stop when the file system of `folder` has less than `needed_gb` free."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        sys.exit(f"The disk is short: {free_gb:.1f} GB free at {folder}, {needed_gb:.1f} needed.")


def size_gb(folder: Path) -> float:
    """Return what the files below `folder` take, in GB; 0 when there is no such folder."""
    return sum(f.lstat().st_size for f in folder.rglob("*")) / 1e9


def forget_half_installed(venv: Path) -> None:
    """Let pip install again what an interrupted pip had begun.

    pip writes INSTALLER after a distribution's last file; without it, pip would take the metadata
    that is there for a complete installation. Folders named ~ are what pip moved out of the way.
    """
    for info in venv.glob("lib/python*/site-packages/*.dist-info"):
        if not (info / "INSTALLER").exists():
            shutil.rmtree(info)
    for leftover in venv.glob("lib/python*/site-packages/~*"):
        shutil.rmtree(leftover)


def update_pip() -> None:
    """Install the pinned pip and setuptools: the first download, so the index is tried here."""
    done, output = run(
        *("-m", "pip", "install", "--retries=2", "--timeout=20", "pip", "setuptools", "wheel"),
        *("--constraint", str(ROOT / "constraints.txt")),
        quiet=True,
    )
    if not done:
        index = os.environ.get("PIP_INDEX_URL", "https://pypi.org or the one in pip's settings")
        broken = [line for line in output.splitlines() if "broken by" in line]
        if not broken:
            sys.exit(f"pip could not install pip and setuptools. It says:\n{output}")
        sys.exit(f"The package index cannot be reached ({index}). pip says:\n{broken[-1]}")


def repair_opencv() -> None:
    """Take OpenCV without windows where the system has no libGL, as a bare server has none.

    It is written over opencv-python, which stays registered: setup.py asks for it by that name.
    """
    done, output = run("-c", "import cv2", quiet=True)
    if not done:
        say(output.splitlines()[-1] + ": taking opencv-python-headless in place of opencv-python")
        pip_install("--force-reinstall", "--no-deps", "opencv-python-headless")


def pip_install(*arguments: str) -> None:
    """Run pip install in the tested versions, with pip's own progress."""
    constraints = str(ROOT / "constraints.txt")
    pip = ("-m", "pip", "install", "--no-build-isolation", "--constraint", constraints)
    if not run(*pip, *arguments)[0]:
        sys.exit("pip failed: its reason stands above. The same command goes on from here.")


def run(*arguments: str, quiet: bool = False) -> "tuple[bool, str]":
    """Run the environment's Python; pip keeps its temporary files in .venv and no cache.

    Returns:
        Whether it succeeded, and what it printed (when `quiet`).
    """
    env = dict(os.environ, TMPDIR=str(VENV / "tmp"))
    env.update(PIP_NO_CACHE_DIR="1", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_USER="0")
    done = subprocess.run(
        [str(PYTHON), *arguments],
        env=env,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
    )
    return done.returncode == 0, (done.stdout or "").strip()


def say(text: str) -> None:
    """Print a heading at once, before the output of the programs that follow."""
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:  # --help, or something that is not understood
        print("usage: bootstrap.py\n\n" + (__doc__ or ""))
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    main()
