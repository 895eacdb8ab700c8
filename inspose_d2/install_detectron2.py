"""Install Detectron2, which is on no package index, without GitHub and without a compiler.

A Detectron2 that can be imported is kept. Otherwise its Python source (Apache-2.0) is taken from
the one wheel on PyPI that carries it, LabGym's: the folder `LabGym/detectron2`, where the imports
were prefixed with `LabGym.`. LabGym itself is not installed. Without the prefix each file equals,
byte for byte, the one of Detectron2's commit 864913f (8 January 2024).

The compiled operators (`detectron2._C`) are not included; InsPose needs none of them.
"""

import base64
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "LabGym==3.1.2"
SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
SOURCE = "LabGym/detectron2/"
VERSION = "0.6+labgym3.1.2"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
ROOT = Path(__file__).resolve().parents[1]  # in a checkout

# Detectron2's own requirements, and setuptools for the pkg_resources that model_zoo imports.
METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: Detectron2's Python source, without its compiled operators
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
License-File: LICENSE
License-File: NOTICE
Requires-Python: >=3.7
Requires-Dist: Pillow>=7.1
Requires-Dist: matplotlib
Requires-Dist: pycocotools>=2.0.2
Requires-Dist: termcolor>=1.1
Requires-Dist: yacs>=0.1.8
Requires-Dist: tabulate
Requires-Dist: cloudpickle
Requires-Dist: tqdm>4.29.0
Requires-Dist: tensorboard
Requires-Dist: fvcore>=0.1.5,<0.1.6
Requires-Dist: iopath>=0.1.7,<0.1.10
Requires-Dist: omegaconf>=2.1,<2.4
Requires-Dist: hydra-core>=1.1
Requires-Dist: black
Requires-Dist: packaging
Requires-Dist: setuptools<81
"""

WHEEL = """\
Wheel-Version: 1.0
Generator: InsPose-D2 install_detectron2.py
Root-Is-Purelib: true
Tag: py3-none-any
"""

NOTICE = """\
Detectron2
Copyright (c) Facebook, Inc. and its affiliates.
Licensed under the Apache License, Version 2.0 (see LICENSE).
https://github.com/facebookresearch/detectron2

This distribution was made by install_detectron2.py of InsPose-D2 from the folder
LabGym/detectron2 of the wheel LabGym 3.1.2 on PyPI (https://github.com/umyelab/LabGym).
LabGym changed these files: it prefixed the name "detectron2" with "LabGym.".
InsPose-D2 changed them back: "LabGym.detectron2" became "detectron2" in every file.
Detectron2's compiled operators (detectron2._C) are not included.
"""

# Prints the version and the place of a working Detectron2. A folder in site-packages that belongs
# to no distribution is what an interrupted installation leaves behind.
PROBE = """
import importlib.metadata, os, sysconfig
import detectron2
folder = os.path.dirname(detectron2.__file__)
try:
    version = importlib.metadata.version("detectron2")
except importlib.metadata.PackageNotFoundError:
    if os.path.dirname(folder) == sysconfig.get_path("purelib"):
        raise
    version = detectron2.__version__
print(version, "from", folder)
"""


def main(wheel: Path | None = None) -> None:
    """Keep a working Detectron2, or install one.

    Args:
        wheel: LabGym's; None downloads it.
    """
    print("Looking for a Detectron2 that can be imported", flush=True)
    found, _ = find_installed()
    if found:
        print(f"Detectron2 {found} is kept.")
        return
    with tempfile.TemporaryDirectory() as folder:
        labgym_wheel = wheel or download(Path(folder))
        check_sha256(labgym_wheel, SHA256)
        install(build_wheel(labgym_wheel, Path(folder)))
    found, reason = find_installed()
    if not found:
        sys.exit(f"Detectron2 is installed but cannot be imported: {reason}")
    print(f"Detectron2 {found} is installed (its Python source, taken from {REQUIREMENT}).")


def find_installed() -> tuple[str, str]:
    """Look for a Detectron2 that this Python can import.

    Returns:
        Its version and place, or an empty string; and in that case the reason.
    """
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if probe.returncode == 0:
        return probe.stdout.strip(), ""
    return "", probe.stderr.strip().split("\n")[-1]


def download(folder: Path) -> Path:
    """Download LabGym's wheel, and nothing that it depends on, into `folder`."""
    print(f"Downloading Detectron2's Python source (in {REQUIREMENT}'s wheel, 2 MB)", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps"]
    # LabGym declares Python < 3.11; Detectron2's source does not mind.
    pip += ["--ignore-requires-python", "--only-binary=:all:", "--retries=2"]
    pip += ["--dest", str(folder), REQUIREMENT]
    if subprocess.run(pip).returncode != 0:
        sys.exit(f"{REQUIREMENT} could not be downloaded: is the package index reachable?")
    return next(folder.glob("*.whl"))


def check_sha256(path: Path, expected: str) -> None:
    """Stop unless the file at `path` is the expected one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        sys.exit(f"{path.name} is refused: its sha256 is {found}, expected {expected}.")


def build_wheel(labgym_wheel: Path, folder: Path) -> Path:
    """Make a wheel of Detectron2 from LabGym's, the same bytes each time.

    Args:
        labgym_wheel: wheel that holds `LabGym/detectron2`.
        folder: where the new wheel is written.

    Returns:
        The path of the new wheel.
    """
    with zipfile.ZipFile(labgym_wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(SOURCE) and n[-1] != "/")
        files = {
            n.removeprefix("LabGym/"): restore_name(n, archive.read(n).decode()) for n in names
        }
    if not files:
        sys.exit(f"{labgym_wheel.name} holds no folder {SOURCE}")
    files[f"{DIST_INFO}/LICENSE"] = licence()
    files[f"{DIST_INFO}/NOTICE"] = NOTICE
    files[f"{DIST_INFO}/METADATA"] = METADATA
    files[f"{DIST_INFO}/WHEEL"] = WHEEL
    files[f"{DIST_INFO}/RECORD"] = record(files)

    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name)  # dated 1980: the same bytes each time
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
    return wheel


def licence() -> str:
    """The Apache licence, which is this project's too: in a checkout, or as it was installed."""
    if (ROOT / "LICENSE").is_file():
        return (ROOT / "LICENSE").read_text()
    own = importlib.metadata.files("inspose_d2") or ()
    return next(x for x in own if x.name == "LICENSE").read_text()


def restore_name(path: str, text: str) -> str:
    """Turn `LabGym.detectron2` back into `detectron2`, in imports and in strings alike."""
    text = re.sub(r"\bLabGym\.detectron2\b", "detectron2", text)
    if "labgym" in text.lower():
        sys.exit(f"{path} still mentions LabGym: this is not the wheel that the tool knows.")
    return text


def record(files: dict[str, str]) -> str:
    """List all files with hash and size, as a wheel's RECORD does."""
    lines = []
    for name, text in files.items():
        data = text.encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    return "".join(lines) + f"{DIST_INFO}/RECORD,,\n"


def install(wheel: Path) -> None:
    """Install the wheel and what it requires, in the tested versions."""
    pip = [sys.executable, "-m", "pip", "install", "--no-cache-dir"]
    tested = ROOT / "constraints.txt"
    pip += [*(("--constraint", str(tested)) if tested.is_file() else ()), str(wheel)]
    if subprocess.run(pip).returncode != 0:
        sys.exit("pip could not install Detectron2: its reason stands above.")


if __name__ == "__main__":
    main()
