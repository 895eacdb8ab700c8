"""The package as an app meets it: one import, no compiled operators, configs inside."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from inspose_d2 import list_configs

ROOT = Path(__file__).parents[2]

APP = """
import sys
# Importing these now fails, whether they are there or not.
sys.modules["detectron2._C"] = None
sys.modules["triton"] = None  # PyTorch for CPUs alone is without it

import numpy as np
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from inspose_d2 import add_inspose_config

cfg = get_cfg()
add_inspose_config(cfg)
cfg.merge_from_file("configs/quick/synthetic_people.yaml")
cfg.MODEL.DEVICE = "cpu"
cfg.MODEL.INSPOSE.SCORE_THRESH_TEST = 0.0
image = np.random.default_rng(0).integers(0, 255, (120, 200, 3), dtype=np.uint8)
poses = DefaultPredictor(cfg)(image)["instances"]
assert poses.image_size == (120, 200)
assert poses.pred_keypoints.shape == (len(poses), 17, 3) and len(poses) > 0
try:
    import detectron2._C
except ImportError:
    print("no compiled operators")
assert "detectron2.model_zoo" not in sys.modules  # it needs pkg_resources
"""


def test_predictor_runs_after_one_import_without_compiled_operators_and_triton() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", APP], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "no compiled operators"


NAMES = """
import site, sys
site.addsitedir(sys.argv[1])
import inspose_d2
from inspose_d2.config import files as config_files
cfg = inspose_d2.get_cfg("InsPose_R50_3x")
assert cfg.SOLVER.MAX_ITER == 127350 and cfg.MODEL.META_ARCHITECTURE == "InsPose"
assert isinstance(inspose_d2.model_zoo.list_checkpoints(), dict)
print(config_files.CONFIGS)
print(*inspose_d2.list_configs())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "sdist", "editable"])
def test_installed_package_has_the_configs(tmp_path: Path, how: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("inspose_d2", "configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build, end = [sys.executable, "-m", "pip", "-q"], ["--no-deps", "--no-build-isolation"]
    if how == "sdist":
        command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar"]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
        (archive,) = (source / "dist").iterdir()
        subprocess.run([*build, "wheel", *end, "-w", tmp_path, archive], check=True)
    elif how == "wheel":
        subprocess.run([*build, "wheel", *end, "-w", tmp_path, source], check=True)
    installed = ["-e", source] if how == "editable" else list(tmp_path.glob("*.whl"))
    place = ["--ignore-installed", "--prefix", target]
    subprocess.run([*build, "install", *end, *place, *installed], check=True, capture_output=True)

    paths = {"base": str(target), "platbase": str(target)}
    site_packages = Path(sysconfig.get_path("purelib", "posix_prefix", paths))
    libraries = sysconfig.get_path("purelib")
    # Without -S the checkout itself, installed for editing, might be found instead.
    result = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", NAMES, site_packages],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{site_packages}{os.pathsep}{libraries}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    folder, names = result.stdout.splitlines()
    inside = site_packages / "inspose_d2" / "model_zoo" / "configs"
    assert Path(folder) == (source / "configs" if how == "editable" else inside)
    assert names.split() == list_configs()
