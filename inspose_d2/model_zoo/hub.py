"""Models as folders in the form of the Hugging Face hub, and repositories there.

| file | |
|---|---|
| ``config.yaml`` | every key, as Detectron2 dumps it |
| ``model.safetensors`` | the weights; its metadata has ``score_threshold`` |
| ``README.md`` | the model card, with the hub's front matter |

Nothing in them can run code, and of a repository nothing else is fetched.
"""

import os
import re
from pathlib import Path

import yaml
from detectron2.config import CfgNode

CONFIG, WEIGHTS, CARD = "config.yaml", "model.safetensors", "README.md"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
WEIGHT_FILES = (".pth", ".pkl", ".pyth", ".safetensors")
NEEDS_HUB = "needs huggingface_hub: pip install 'inspose_d2[hub]'"


def is_repository(name: str) -> bool:
    """Whether a name, of no file here, has the form ``organisation/name``."""
    return bool(REPOSITORY.fullmatch(name)) and not name.endswith(WEIGHT_FILES)


def model_folder(name: str) -> Path:
    """Give the folder of a model, fetched into the hub's cache if it is none of this machine.

    Args:
        name: a folder, or ``organisation/name`` on the hub.

    Returns:
        The folder, with ``config.yaml`` and ``model.safetensors``.

    Raises:
        ValueError: it lacks one of them, or huggingface_hub is missing.
        OSError: the repository cannot be fetched.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _fetch(name)
    missing = [x for x in (CONFIG, WEIGHTS) if not (folder / x).is_file()]
    if missing:
        raise ValueError(f"{name} is no folder of a model: it has no {' and no '.join(missing)}")
    return folder


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ValueError(f"{name} is no file and no folder; of the hub it {NEEDS_HUB}") from error
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise OSError(
            f"{name} is no file and no folder here, and cannot be fetched from the Hugging Face "
            f"hub: {reason}"
        ) from error


def score_threshold(file: str | os.PathLike[str]) -> float | None:
    """Score from which the poses of a safetensors file are shown; None where it says none."""
    if Path(file).suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("score_threshold")
    return None if text is None else float(text)


def write_config(cfg: CfgNode, file: Path) -> None:
    """Write a config without what is of one machine: paths, data sets of its own, the device."""
    cfg = cfg.clone()
    cfg.defrost()
    own = {name for name, *_ in cfg.DATASETS.REGISTER}
    for key in ("TRAIN", "TEST"):
        cfg.DATASETS[key] = tuple(x for x in cfg.DATASETS[key] if x not in own)
    cfg.DATASETS.REGISTER = []
    cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.OUTPUT_DIR = "./output"
    values = yaml.safe_load(cfg.dump())
    del values["MODEL"]["DEVICE"]
    file.write_text(yaml.safe_dump(values), encoding="utf-8")


def write_card(file: Path, name: str, metrics: dict[str, float], license_name: str | None) -> None:
    """Write a model card.

    Args:
        file: to write.
        name: of the model.
        metrics: such as "people_val/keypoints/AP", in percent; may be empty.
        license_name: as the hub writes it; None says none.

    Raises:
        ValueError: huggingface_hub is missing.
    """
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError as error:
        raise ValueError(f"a model card {NEEDS_HUB}") from error
    results = []
    for key, value in metrics.items():
        data_set, task, metric = key.split("/")
        results.append(
            EvalResult(
                task_type="keypoint-detection",
                dataset_type=data_set,
                dataset_name=data_set,
                metric_type=metric,
                metric_name=f"{task} {metric}",
                metric_value=value,
            )
        )
    front = ModelCardData(
        license=license_name,
        library_name="inspose-d2",
        pipeline_tag="keypoint-detection",
        tags=["pose-estimation", "inspose", "detectron2"],
        model_name=name,
        eval_results=results or None,
    ).to_yaml()
    table = [f"| {key} | {value:.2f} |" for key, value in metrics.items()]
    measured = ["| metric | percent |", "|---|---:|", *table] if table else ["Nothing is measured."]
    lines = [
        *("---", front.strip(), "---", "", f"# {name}", ""),
        "A model of InsPose (Shi et al., ACM MM 2021) for InsPose-D2: the keypoints of all",
        "persons of an image in one pass. `config.yaml` has every setting of it.",
        *("", "```python", "from inspose_d2 import InsPosePredictor", ""),
        'predictor = InsPosePredictor(weights="FOLDER OR ORGANISATION/NAME")',
        'poses = predictor("image.jpg")["instances"]',
        *("```", "", *measured, ""),
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
