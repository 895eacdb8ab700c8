"""The package as an app meets it: one import, no compiled operators."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

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
