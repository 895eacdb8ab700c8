"""Fixtures that several test files share."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Without a CUDA device Triton's own interpreter runs the kernels. Triton reads this variable while
# it is imported, and Detectron2 below imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances, Keypoints
from hypothesis import settings
from torch import Tensor

from inspose_d2 import add_inspose_config
from inspose_d2.geometry import enclosing_boxes

ROOT = Path(__file__).parent.parent

# The same few examples in every run, with no time limit: machines differ, results must not.
settings.register_profile("inspose_d2", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("inspose_d2")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Load numbers that the authors' code computed, by file name without ``.npz``."""
    folder = os.environ.get("INSPOSE_GOLDEN")
    if not folder:
        pytest.skip("$INSPOSE_GOLDEN, the folder of the authors' numbers (*.npz), is not set")
    if not Path(folder).is_dir():
        pytest.skip(f"$INSPOSE_GOLDEN is {folder}, which is not a folder")

    def load(name: str) -> dict[str, Tensor]:
        with np.load(Path(folder) / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays}

    return load


@pytest.fixture(scope="session")
def coco_root() -> Path:
    """Folder of data sets with real COCO photographs, as Detectron2 expects it."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if not root:
        pytest.skip("$DETECTRON2_DATASETS, the folder that holds coco/, is not set")
    annotations = Path(root) / "coco" / "annotations" / "person_keypoints_val2017.json"
    if not annotations.is_file():
        pytest.skip(f"$DETECTRON2_DATASETS has no COCO: {annotations} is missing")
    return Path(root)


@pytest.fixture
def tiny_cfg(tmp_path: Path) -> Callable[..., CfgNode]:
    """Make the config of a whole InsPose that is as small as it can be, on the CPU.

    ``tiny_cfg(["SOLVER.MAX_ITER", 3])`` and ``tiny_cfg(**{"SOLVER.MAX_ITER": 3})`` override.
    """
    small = {
        "MODEL.DEVICE": "cpu",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.FPN.OUT_CHANNELS": 32,  # GroupNorm wants multiples of 32
        "MODEL.INSPOSE.NUM_CONVS": 1,
        "MODEL.INSPOSE.CONV_DIM": 64,  # 32 groups of one channel would fail on a map of one cell
        "MODEL.INSPOSE.KEYPOINT_BRANCH.NUM_CONVS": 1,
        "MODEL.INSPOSE.KEYPOINT_BRANCH.CONV_DIM": 32,
        "MODEL.INSPOSE.DISK_OFFSET.NUM_CONVS": 1,
        "MODEL.INSPOSE.DISK_OFFSET.CONV_DIM": 32,
        "MODEL.INSPOSE.HEATMAP.NUM_CONVS": 1,
        "MODEL.INSPOSE.HEATMAP.CONV_DIM": 32,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (96, 96),
        "INPUT.MAX_SIZE_TRAIN": 128,
        "INPUT.MIN_SIZE_TEST": 96,
        "INPUT.MAX_SIZE_TEST": 128,
        "SOLVER.IMS_PER_BATCH": 2,
        "OUTPUT_DIR": str(tmp_path / "output"),
        "SEED": 0,
    }

    def make(overrides: Sequence[Any] = (), **named: Any) -> CfgNode:
        cfg = get_cfg()
        add_inspose_config(cfg)
        cfg.merge_from_file(str(ROOT / "configs" / "quick" / "synthetic_people.yaml"))
        for values in (small, named):
            cfg.merge_from_list([x for item in values.items() for x in item])
        cfg.merge_from_list(list(overrides))
        return cfg

    return make


@pytest.fixture(scope="session")
def make_instances() -> Callable[..., Instances]:
    """Make annotated persons: keypoints (n, K, 3), image size (H, W), boxes or pseudo-boxes."""

    def make(keypoints: Any, image_size: tuple[int, int], boxes: Tensor | None = None) -> Instances:
        keypoints = torch.as_tensor(keypoints, dtype=torch.float32)
        if boxes is None:
            boxes = enclosing_boxes(keypoints, keypoints[..., 2] > 0)
        return Instances(
            image_size,
            gt_boxes=Boxes(boxes),
            gt_classes=torch.zeros(len(keypoints), dtype=torch.int64),
            gt_keypoints=Keypoints(keypoints),
        )

    return make
