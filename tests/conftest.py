"""Fixtures that several test files share."""

import contextlib
import functools
import importlib.util
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

# One thread each, here and in the processes that tests start: results do not depend on the number
# of cores, and threads do not spin for each other. NumPy and torch read this while imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# Tests change their folder; the data sets stay where they are.
os.environ["INSPOSE_D2_CACHE"] = os.path.abspath(os.environ.get("INSPOSE_D2_CACHE", "datasets"))

# A shell lets its programs in the background ignore Ctrl-C, and these the programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import cv2
import numpy as np
import pytest
import torch

# Without a CUDA device Triton's own interpreter runs the kernels. Triton reads this variable while
# it is imported, and Detectron2 below imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils import logger as d2_logger
from hypothesis import settings
from torch import Tensor

from inspose_d2 import add_inspose_config, register_coco_keypoints
from inspose_d2.data.synthetic import build_synthetic_people
from inspose_d2.modeling.geometry import enclosing_boxes

ROOT = Path(__file__).parent.parent
cv2.setNumThreads(0)

# The same few examples in every run, with no time limit: machines differ, results must not.
settings.register_profile("inspose_d2", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("inspose_d2")


class Golden:
    """A folder of numbers that the authors' code computed, and how its inputs were made."""

    def __init__(self, variable: str) -> None:
        folder = os.environ.get(variable)
        if not folder:
            pytest.skip(f"${variable}, a folder of the authors' numbers (*.npz), is not set")
        if not Path(folder).is_dir():
            pytest.skip(f"${variable} is {folder}, which is not a folder")
        self.folder = Path(folder)

    def __call__(self, name: str) -> dict[str, Any]:
        """Load arrays by file name without ``.npz``: as tensors, text as it is."""
        with np.load(self.folder / f"{name}.npz") as arrays:
            return {
                key: torch.from_numpy(arrays[key]) if arrays[key].dtype.kind != "U" else arrays[key]
                for key in arrays
            }

    def recipe(self, name: str) -> ModuleType:
        """Import the file that draws inputs and weights."""
        spec = importlib.util.spec_from_file_location(name, self.folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


LOGGERS = ("detectron2", "detectron2.data", "fvcore", "inspose_d2")


@pytest.fixture(autouse=True)
def restored_loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what Detectron2's ``setup_logger`` does for good: each run would log to all later ones.

    It also remembers the loggers that it has set up, and leaves them alone the next time.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(x, list(x.handlers), x.level, x.propagate) for x in loggers]
    with contextlib.ExitStack() as files:

        @functools.cache
        def log_stream(path: str) -> TextIO:
            return files.enter_context(open(path, "a"))

        monkeypatch.setattr(d2_logger, "_cached_log_stream", log_stream)
        yield
        for logger, handlers, level, propagate in before:
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
        d2_logger.setup_logger.cache_clear()


@pytest.fixture(scope="session")
def golden() -> Golden:
    """Numbers of the authors' head, decoding and losses."""
    return Golden("INSPOSE_GOLDEN")


@pytest.fixture(scope="session")
def golden_full() -> Golden:
    """Numbers of the authors' whole detector."""
    return Golden("INSPOSE_GOLDEN_FULL")


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


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a file that takes long once for all processes of the tests: the others wait for it.

    ``made_once("model.onnx", make)`` calls ``make(path)`` if nobody has, and gives the path.
    """
    fcntl = pytest.importorskip("fcntl", reason="no file locks here")
    own = tmp_path_factory.getbasetemp()  # of a process of pytest-xdist in the one of the run
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made_once"
    folder.mkdir(exist_ok=True)

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        path = folder / name
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                unfinished = path.with_stem(f"{path.stem}_unfinished")
                make(unfinished)
                unfinished.rename(path)
        return path

    return made_once


@pytest.fixture(scope="session")
def few_people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Settings for training and evaluation on seven pictures instead of hundreds.

    Two workers cannot share them evenly. They are large enough for COCO's medium and large persons.
    """
    folder, name = tmp_path_factory.mktemp("few_people"), "few_people"
    file = build_synthetic_people(folder, "val", 7, 400, num_workers=1)
    entry = [name, str(file), str(file.parents[1] / "val")]
    register_coco_keypoints(*entry)
    yield {"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": (name,), "DATASETS.TEST": (name,)}
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


TINY = {
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
    "SEED": 0,
}


@pytest.fixture
def tiny_cfg(tmp_path: Path) -> Callable[..., CfgNode]:
    """Make the config of a whole InsPose that is as small as it can be, on the CPU.

    ``tiny_cfg(["SOLVER.MAX_ITER", 3])`` and ``tiny_cfg(**{"SOLVER.MAX_ITER": 3})`` override.
    """

    def make(overrides: Sequence[Any] = (), **named: Any) -> CfgNode:
        cfg = get_cfg()
        add_inspose_config(cfg)
        cfg.merge_from_file(str(ROOT / "configs" / "quick" / "synthetic_people.yaml"))
        output = {"OUTPUT_DIR": str(tmp_path / "output")}
        for values in (TINY, output, named):
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
