"""Data sets of the project, registered with Detectron2 when `inspose_d2` is imported.

`synthetic_people_train`, `synthetic_people_val` and `synthetic_people_holdout` are built the first
time they are asked for, in the folder `$INSPOSE_D2_CACHE` (by default `datasets`): from then on an
ordinary COCO folder. Figures are reported on `val`; whoever chooses a setting does so on `holdout`.
`synthetic_people_train_noisy` is `train` with keypoints as imprecise as COCO's annotators' are,
`synthetic_people_train_partial` is `train` with a third of each person's labels removed.

`keypoints_coco_2017_test-dev` is COCO's test set, whose annotations only COCO's server has.

`people_{train,fit,holdout,val}` are photographs of people in COCO's form, `people/annotations/
person_keypoints_*.json` and `people/{train,val}` below `$DETECTRON2_DATASETS`: `fit` and `holdout`
are the parts of `train` that `experiments/hold_out.py` makes.

`crowdpose_{train,val,trainval,test}` are the files that `inspose convert crowdpose` writes.
"""

import os
from functools import partial
from pathlib import Path
from typing import IO, Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.utils.file_io import PathHandler, PathManager

from .coco_file import load_keypoints
from .find_file import folder_of
from .keypoint_names import connection_rules, infer_flip_pairs

TEST_DEV = "keypoints_coco_2017_test-dev"

# Sigmas as in the API of CrowdPose's authors; the skeleton is ours, from 0.
CROWDPOSE_NAMES = (
    *("left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist"),
    *("left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"),
    *("head", "neck"),
)
CROWDPOSE_SKELETON = (
    *((12, 13), (13, 0), (13, 1), (0, 2), (2, 4), (1, 3), (3, 5), (0, 6), (1, 7), (6, 7)),
    *((6, 8), (8, 10), (7, 9), (9, 11)),
)
CROWDPOSE_SIGMAS = (
    *(0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
    *(0.079, 0.079),
)


class _SyntheticPeopleHandler(PathHandler):
    """Builds a split when Detectron2's `PathManager` is asked for its json.

    So whatever reads the metadata's `json_file` in Detectron2's way finds it, be it a
    `COCOEvaluator` that is made before any data loader.
    """

    def __init__(self, root: str, split: str, json_file: str) -> None:
        self.root, self.split, self.json_file = root, split, json_file

    def _get_supported_prefixes(self) -> list[str]:
        return [self.json_file]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:  # noqa: ARG002
        # Late, or `python -m inspose_d2.data.synthetic` would warn that it is imported already.
        from inspose_d2.data.synthetic import (
            build_noisy_people,
            build_partial_people,
            build_synthetic_people,
        )

        if self.split == "train_noisy":
            return str(build_noisy_people(self.root))
        if self.split == "train_partial":
            return str(build_partial_people(self.root))
        return str(build_synthetic_people(self.root, self.split))

    def _isfile(self, path: str, **kwargs: Any) -> bool:  # noqa: ARG002
        return path == self.json_file

    _exists = _isfile

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return Path(self._get_local_path(path)).open(mode, buffering, **kwargs)


def register_synthetic_people(root: str | None = None) -> None:
    """Register the splits and variants of `synthetic_people` with Detectron2's catalogs.

    Args:
        root: folder that holds, or will hold, the folder `synthetic_people`.
    """
    root = root or folder_of("INSPOSE_D2_CACHE")
    for split in ("train", "val", "holdout", "train_noisy", "train_partial"):
        name = f"synthetic_people_{split}"
        folder = os.path.join(root, "synthetic_people")
        image_root = os.path.join(folder, split.split("_")[0])
        json_file = os.path.join(folder, "annotations", f"person_keypoints_{split}.json")
        PathManager.register_handler(_SyntheticPeopleHandler(root, split, json_file))
        _register(name, json_file, image_root, **_get_builtin_metadata("coco_person"))


def register_coco_test_dev() -> None:
    """Register `keypoints_coco_2017_test-dev`, unless that name is taken already.

    Detectron2 has these images as `coco_2017_test-dev`, without keypoints; the files are the same:
    `coco/annotations/image_info_test-dev2017.json`, `coco/test2017` below `$DETECTRON2_DATASETS`.
    """
    if TEST_DEV in DatasetCatalog:
        return
    images = MetadataCatalog.get("coco_2017_test-dev")
    # Loaded without its name, or `load_coco_json` would take all 80 categories of COCO's test file
    # for the classes (or fail where the file lists none); the model knows persons alone.
    load = partial(load_keypoints, images.json_file, images.image_root, None)
    DatasetCatalog.register(TEST_DEV, load)
    MetadataCatalog.get(TEST_DEV).set(
        json_file=images.json_file,
        image_root=images.image_root,
        evaluator_type="coco",
        thing_dataset_id_to_contiguous_id={1: 0},
        **_get_builtin_metadata("coco_person"),
    )


def register_people() -> None:
    """Register `people_{train,fit,holdout,val}`, unless these names are taken already."""
    folder = os.path.join(folder_of("DETECTRON2_DATASETS"), "people")
    for split in ("train", "fit", "holdout", "val"):
        name = f"people_{split}"
        if name in DatasetCatalog:
            continue
        json_file = os.path.join(folder, "annotations", f"person_keypoints_{split}.json")
        image_root = os.path.join(folder, "val" if split == "val" else "train")
        _register(name, json_file, image_root, **_get_builtin_metadata("coco_person"))


def register_crowdpose() -> None:
    """Register `crowdpose_{train,val,trainval,test}`, unless these names are taken already.

    They are `crowdpose/annotations/crowdpose_*.json` and `crowdpose/images` below
    `$DETECTRON2_DATASETS` (default `datasets`).
    """
    folder = os.path.join(folder_of("DETECTRON2_DATASETS"), "crowdpose")
    image_root = os.path.join(folder, "images")
    for split in ("train", "val", "trainval", "test"):
        name = f"crowdpose_{split}"
        if name in DatasetCatalog:
            continue
        json_file = os.path.join(folder, "annotations", f"{name}.json")
        _register(
            name,
            json_file,
            image_root,
            thing_classes=["person"],
            keypoint_names=list(CROWDPOSE_NAMES),
            keypoint_flip_map=infer_flip_pairs(CROWDPOSE_NAMES),
            keypoint_connection_rules=connection_rules(CROWDPOSE_NAMES, CROWDPOSE_SKELETON),
            keypoint_oks_sigmas=list(CROWDPOSE_SIGMAS),
        )


def _register(name: str, json_file: str, image_root: str, **metadata: Any) -> None:
    """Register files in COCO's form, which need not be there yet."""
    DatasetCatalog.register(name, partial(load_keypoints, json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )
