"""``inspose browse``: what a model is trained on, and what an evaluated model does worst."""

import argparse
import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from pycocotools.coco import COCO
from tqdm import tqdm

from ..config import get_cfg
from ..data.check import check_config
from ..data.images import read_image
from ..data.keypoint_sets import register_datasets
from ..engine.trainer import Trainer
from ..evaluation.results import RESULTS, inference_folder, read_results
from ..evaluation.visibility import LEAST_OKS, match_poses
from ..modeling import InsPose, InsPoseOfficial
from ..modeling.geometry import Locations, map_size
from ..modeling.keypoint_codec import decode_keypoints
from ..modeling.official.head import DENSE_SCALE
from ..modeling.target_generator import LEFT_OUT, NO_PERSON, PERSON, Targets
from ..visualization.poses import draw_poses
from .pictures import write_picture

SHOWN_SIZE = 800  # pixels, that the longer side of a small training image is enlarged to
ROW_HEIGHT = 400  # pixels, of the pictures of a result
WEAKEST = 0.25  # a predicted keypoint of a lower score is drawn as if it had this one
# BGR. Persons of an image take these in turn; red, the fourth, is for what is left out.
PERSON_COLORS = [
    tuple(round(255 * x) for x in rgb[::-1])
    for i, rgb in enumerate(colormaps["tab10"].colors)  # type: ignore[attr-defined]
    if i != 3
]
LEFT_OUT_COLOR = (60, 60, 230)
FRAME_COLOR = (0, 220, 255)


@dataclass(frozen=True)
class Section:
    """Pictures that belong together, and what is to be said of them."""

    about: Any  # text, or a Finding
    file: str  # of the image
    image_id: Any
    pictures: dict[str, np.ndarray]  # by caption


class Page:
    """Sections as the template takes them, and their pictures in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.groups: list[list[dict[str, Any]]] = []

    def add(self, sections: Iterable[Section]) -> None:
        """Write the pictures of a group of sections, one after the other."""
        self.groups.append([])
        for section in sections:
            name = f"{len(self.groups)}-{len(self.groups[-1]) + 1}"
            links: dict[str, str] = {}
            for caption, picture in section.pictures.items():
                links[caption] = f"pictures/{name}_{len(links)}.jpg"
                write_picture(self.folder / links[caption], picture)
            self.groups[-1].append({**vars(section), "name": name, "pictures": links})

    def write(self, what: str, title: str, **values: Any) -> Path:
        """Write index.html with the values that the template asks for; returns its path."""
        environment = Environment(
            loader=PackageLoader("inspose_d2.cli"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
        )
        environment.filters["path"] = lambda file: Path(file).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        template = environment.get_template("browse.html")
        text = template.render(what=what, title=title, groups=self.groups, **values)
        path = self.folder / "index.html"
        path.write_text(text.lstrip(), encoding="utf-8")
        return path


# What training sees


def browse_data(cfg: CfgNode, num: int, output: Path) -> Path:
    """Write the page of training data; returns its path.

    Args:
        cfg: of a model InsPose or InsPoseOfficial, on the CPU.
        num: of images, at most; each image of the data set comes once.
        output: folder.

    Raises:
        ValueError: the config is another model's, or the data set has nothing to train on.
    """
    if cfg.MODEL.META_ARCHITECTURE not in ("InsPose", "InsPoseOfficial"):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}: targets are InsPose's"
        )
    cfg = cfg.clone()
    cfg.MODEL.TIMM.PRETRAINED = False  # the weights do not matter
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    model = build_model(cfg)
    loader = Trainer.build_train_loader(cfg)
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    page = Page(output)
    num = min(num, len(loader.dataset))
    page.add(
        data_section(model, inputs, metadata, cfg.INPUT.FORMAT)
        for (inputs,) in tqdm(itertools.islice(loader, num), total=num, unit="image")
    )
    return page.write("data", f"Training data: {', '.join(cfg.DATASETS.TRAIN)}")


def targets_of(model: Any, inputs: dict[str, Any]) -> tuple[Targets, Locations]:
    """Make the targets of one image, as a batch, and its locations, without running the network."""
    images = model.preprocess_image([inputs])
    sizes = [map_size(images.tensor.shape[-2:], stride) for stride in model.strides]
    locations = Locations.of([torch.zeros(1, 1, *size) for size in sizes], model.strides)
    maps = map_size(images.tensor.shape[-2:], model.kp_net.map_stride)
    if isinstance(model, InsPose):
        return model.target_generator([inputs["instances"]], locations, maps), locations
    (persons,) = model.persons_of([inputs], images.image_sizes)
    made = model.criterion.targets([persons], locations, maps)
    labelled = made.keypoints[..., 2] > 0
    targets = Targets(
        labels=torch.where(made.is_positive, PERSON, NO_PERSON),
        positives=made.positives,
        cells=made.cells,
        labelled=labelled,
        keypoints=made.keypoints,
        areas=made.areas,
        boxes=made.boxes,
        disk_offsets=made.offsets,
        disk_mask=made.offset_mask,
        heatmaps=made.heatmaps,
        num_labelled=(persons.keypoints[..., 2] > 0).sum(),
    )
    return targets, locations


def strides_of(model: Any) -> tuple[int | None, int | None]:
    """Give the strides of the maps of offsets and of heatmaps; None where a model has none."""
    if isinstance(model, InsPoseOfficial):
        stride = model.kp_net.stride // DENSE_SCALE
        return stride, stride
    return (
        None if model.disk_offset_branch is None else model.kp_net.map_stride,
        None if model.heatmap_branch is None else model.target_generator.heatmap_stride,
    )


def data_section(
    model: InsPose | InsPoseOfficial, inputs: dict[str, Any], metadata: Metadata, image_format: str
) -> Section:
    """Draw one image of training with its targets."""
    targets, locations = targets_of(model, inputs)
    image = inputs["image"].permute(1, 2, 0).numpy()
    image = np.ascontiguousarray(image[:, :, ::-1] if image_format == "RGB" else image)
    zoom = max(1, round(SHOWN_SIZE / max(image.shape[:2])))
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    pictures = {
        "annotations": draw_annotations(image, inputs["instances"], zoom, metadata),
        "positive locations and regions left out": draw_locations(image, targets, locations, zoom),
    }
    offset_stride, heatmap_stride = strides_of(model)
    if offset_stride is not None:
        pictures["disk offsets"] = draw_disks(image, targets, offset_stride, zoom)
    if heatmap_stride is not None:
        pictures["heatmaps"] = draw_heatmaps(image, targets.heatmaps[0], zoom * heatmap_stride)
    counts = ", ".join(
        f"{name} {int((targets.positives.strides == stride).sum())}"
        for name, stride in zip(model.in_features, model.strides, strict=True)
    )
    height, width = inputs["image"].shape[1:]
    about = (
        f"{width} x {height} pixels; annotations: {len(inputs['instances'])}, "
        f"labelled keypoints: {int(targets.num_labelled)}; positive locations: {counts}; "
        f"left out: {int((targets.labels == LEFT_OUT).sum())} of {targets.labels.numel()}"
    )
    return Section(about, inputs["file_name"], inputs.get("image_id"), pictures)


def draw_annotations(
    image: np.ndarray, instances: Instances, zoom: int, metadata: Metadata
) -> np.ndarray:
    """Draw the keypoints and boxes of training on an enlarged image (H, W, 3)."""
    keypoints = instances.gt_keypoints.tensor
    poses = Instances(
        image.shape[:2],
        pred_keypoints=torch.cat([keypoints[..., :2] * zoom, keypoints[..., 2:] > 0], dim=-1),
        pred_boxes=Boxes(instances.gt_boxes.tensor * zoom),
    )
    return draw_poses(image, poses, metadata=metadata, boxes=True)


def draw_locations(
    image: np.ndarray, targets: Targets, locations: Locations, zoom: int
) -> np.ndarray:
    """Draw positive locations, pseudo-boxes and what is left out on an enlarged image."""
    canvas = cv2.addWeighted(image, 0.6, np.full_like(image, 128), 0.1, 0)
    height, width = locations.sizes[0]
    left_out = (targets.labels[0, : height * width] == LEFT_OUT).view(height, width).numpy()
    cell = zoom * int(locations.strides[0])
    left_out = enlarged(left_out, cell, canvas)
    canvas[left_out] = 0.6 * canvas[left_out] + 0.4 * np.array(LEFT_OUT_COLOR)

    boxes, person = targets.boxes.unique(dim=0, return_inverse=True)
    half = targets.positives.strides[:, None] / 2
    cells = torch.cat([targets.positives.points - half, targets.positives.points + half], dim=1)
    for i, box in enumerate(boxes):
        color = PERSON_COLORS[i % len(PERSON_COLORS)]
        own = cells[person == i]
        layer = canvas.copy()
        for corners in own * zoom:
            draw_rectangle(layer, corners, color, cv2.FILLED)
        canvas = cv2.addWeighted(layer, 0.45, canvas, 0.55, 0)
        for corners in own * zoom:
            draw_rectangle(canvas, corners, color, 1)
        draw_rectangle(canvas, box * zoom, color, 2)
    return canvas


def draw_disks(image: np.ndarray, targets: Targets, stride: int, zoom: int) -> np.ndarray:
    """Draw lines from the cells with disk offsets to the keypoints on an enlarged image."""
    mask, offsets = targets.disk_mask[0], targets.disk_offsets[0]
    num_keypoints, _, width = mask.shape
    channel, row, column = mask.nonzero(as_tuple=True)
    cells = (row * width + column)[:, None].expand(-1, num_keypoints)
    keypoints = decode_keypoints(
        cells,
        torch.ones(cells.shape),
        offsets,
        stride=stride,
        map_width=width,
        image_size=(image.shape[0] // zoom, image.shape[1] // zoom),
    )[torch.arange(len(cells)), channel, :2]
    starts = (torch.stack([column, row], dim=1) + 0.5) * stride
    lines = (torch.stack([starts, keypoints], dim=1) * zoom - 0.5).round().int().tolist()
    colors = keypoint_colors(num_keypoints).tolist()
    canvas = image // 3
    for (start, end), k in zip(lines, channel.tolist(), strict=True):
        cv2.line(canvas, start, end, colors[k], 1, cv2.LINE_AA)
        cv2.circle(canvas, end, 3, colors[k], cv2.FILLED, cv2.LINE_AA)
    return canvas


def draw_heatmaps(image: np.ndarray, heatmaps: torch.Tensor, cell: int) -> np.ndarray:
    """Draw the strongest of heatmaps (K, h, w) in each cell of so many pixels of the image."""
    value, index = heatmaps.clamp(min=0).max(dim=0)  # what is left out is dark
    light = value[..., None].numpy() * keypoint_colors(len(heatmaps))[index.numpy()]
    return (image // 3 + 0.65 * enlarged(light, cell, image)).clip(0, 255).astype(np.uint8)


def keypoint_colors(num_keypoints: int) -> np.ndarray:
    """Colours (K, 3), BGR in [0, 255]."""
    return 255 * colormaps["hsv"](np.arange(num_keypoints) / num_keypoints)[:, 2::-1]


def enlarged(grid: np.ndarray, cell: int, image: np.ndarray) -> np.ndarray:
    """Repeat values (h, w, ...) over cells of so many pixels; what lies beyond the image goes."""
    return grid.repeat(cell, axis=0).repeat(cell, axis=1)[: image.shape[0], : image.shape[1]]


def draw_rectangle(
    canvas: np.ndarray, box: Sequence[float], color: tuple[int, ...], thickness: int
) -> None:
    """Draw the box x0, y0, x1, y1, continuous pixels of the canvas."""
    x0, y0, x1, y1 = (round(float(x) - 0.5) for x in box)
    cv2.rectangle(canvas, (x0, y0), (x1, y1), color, thickness, cv2.LINE_AA)


# What a model does worst


@dataclass(frozen=True)
class Finding:
    """An annotated person with the prediction that COCO's matching gives it, or one of them."""

    image_id: int
    person: Any  # annotation; None of a false positive
    prediction: Any  # in COCO's form; None where nothing fits at all
    oks: float  # 0 of a false positive
    is_found: bool

    @property
    def kind(self) -> str:
        """What it is called in the page."""
        if self.person is None:
            return "false positive"
        return "found" if self.is_found else "missed"


def browse_results(cfg: CfgNode, results: Path | None, num: int, output: Path) -> Path:
    """Write the page of an evaluation; returns its path.

    Args:
        cfg: the first of DATASETS.TEST, and TEST.KEYPOINT_OKS_SIGMAS.
        results: coco_instances_results.json of the evaluation; None: in OUTPUT_DIR.
        num: of the persons, and of the false positives, that are shown in pictures.
        output: folder.

    Raises:
        ValueError: the results are none, or of other images.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: which data set are these results of?")
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    if not metadata.get("json_file"):
        raise ValueError(f"{name} has no json_file: it is not in COCO's format")
    coco = COCO()
    coco.dataset = Trainer.check_dataset(cfg, name, evaluation=True)
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    results = results or inference_folder(cfg, name) / RESULTS
    predictions = read_results(results, coco.imgs, coco.cats, cfg.MODEL.INSPOSE.NUM_KEYPOINTS)
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS or metadata.get("keypoint_oks_sigmas", ())
    persons, false_positives = match(coco, predictions, sigmas)

    files = {x["image_id"]: x["file_name"] for x in DatasetCatalog.get(name)}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for prediction in predictions:
        by_image.setdefault(prediction["image_id"], []).append(prediction)

    def section(finding: Finding) -> Section:
        file = files[finding.image_id]
        image = read_image(file, "BGR", cfg.INPUT.MAX_PIXELS)
        annotated = [x for x in coco.imgToAnns[finding.image_id] if "keypoints" in x]
        predicted = by_image.get(finding.image_id, [])
        pictures = result_pictures(image, finding, annotated, predicted, metadata)
        return Section(finding, file, finding.image_id, pictures)

    page = Page(output)
    page.add(map(section, tqdm(persons[:num], unit="person")))
    page.add(map(section, tqdm(false_positives[:num], unit="false positive")))
    return page.write(
        "results",
        f"Evaluation: {name}",
        results=results,
        predictions=predictions,
        num_images=len(coco.imgs),
        persons=persons,
        false_positives=false_positives,
        files=files,
        match_oks=LEAST_OKS,
    )


def match(
    coco: COCO, predictions: list[dict[str, Any]], sigmas: Sequence[float]
) -> tuple[list[Finding], list[Finding]]:
    """Match predictions with persons by COCO's own code.

    Args:
        coco: annotations.
        predictions: in COCO's form.
        sigmas: of the keypoints; empty takes COCO's.

    Returns:
        All persons with keypoints, crowds apart, the lowest OKS first; and the false positives,
        the highest score first.
    """
    found, evaluation = match_poses(coco, predictions, sigmas)
    persons, false_positives = [], []
    for result in filter(None, evaluation.evalImgs):
        image_id, category = result["image_id"], result["category_id"]
        oks = evaluation.ious[image_id, category]
        oks = np.reshape(oks, (len(result["dtIds"]), len(result["gtIds"])))
        # dtMatches holds persons' ids, one of which may be 0; gtMatches one prediction of a crowd.
        taken = (result["dtMatches"][0] != 0) | np.isin(result["dtIds"], result["gtMatches"][0])
        # The columns of OKS are in the order of the file, not in that of gtIds.
        columns = coco.getAnnIds(imgIds=[image_id], catIds=[category])
        matches = zip(result["gtIds"], result["gtMatches"][0], result["gtIgnore"], strict=True)
        for person, prediction, ignored in matches:
            if ignored:
                continue
            column = oks[:, columns.index(person)]
            row = -1
            if prediction:
                row = result["dtIds"].index(prediction)
            elif not taken.all():
                row = int(np.where(taken, -1, column).argmax())
            persons.append(
                Finding(
                    image_id,
                    coco.anns[person],
                    found.anns[result["dtIds"][row]] if row >= 0 else None,
                    float(column[row]) if row >= 0 else 0.0,
                    bool(prediction),
                )
            )
        for number in (~taken).nonzero()[0]:
            prediction = found.anns[result["dtIds"][number]]
            false_positives.append(Finding(image_id, None, prediction, 0.0, False))
    persons.sort(key=lambda x: (x.oks, x.image_id))
    false_positives.sort(key=lambda x: (-x.prediction["score"], x.image_id))
    return persons, false_positives


def result_pictures(
    image: np.ndarray,
    finding: Finding,
    annotations: list[dict[str, Any]],
    predictions: list[dict[str, Any]],
    metadata: Metadata,
) -> dict[str, np.ndarray]:
    """Draw a person's surroundings: ground truth, prediction; and the whole image.

    Args:
        image: (H, W, 3) BGR uint8.
        finding: the person or false positive.
        annotations: all of the image.
        predictions: all of the image.
        metadata: of the data set.

    Returns:
        Pictures (h, w, 3) BGR uint8 by caption. Surroundings without a keypoint to draw are left
        out.
    """
    part = surroundings((finding.person or finding.prediction)["bbox"], image.shape[:2])
    whole = (0, 0, image.shape[1], image.shape[0])
    pictures = {}
    annotated = annotations if finding.person is None else [finding.person]
    if any_keypoint_in(part, annotated):
        pictures["ground truth"] = draw_part(image, part, annotated, metadata)
    if finding.prediction is not None and any_keypoint_in(part, [finding.prediction]):
        caption = f"prediction, score {finding.prediction['score']:.2f}"
        pictures[caption] = draw_part(image, part, [finding.prediction], metadata)
    best = max((x["score"] for x in predictions), default=0)
    shown = [x for x in predictions if x["score"] >= 0.5 * best]
    context = draw_part(image, whole, shown, metadata)
    draw_rectangle(context, np.array(part) * (context.shape[1] / image.shape[1]), FRAME_COLOR, 2)
    pictures["whole image, all predictions of at least half the best one's score"] = context
    return pictures


def any_keypoint_in(part: tuple[int, int, int, int], people: Sequence[dict[str, Any]]) -> bool:
    """Whether a keypoint of people, annotated or predicted, lies in x0, y0, x1, y1."""
    keypoints = np.reshape([x["keypoints"] for x in people], (-1, 3))
    points = keypoints[keypoints[:, 2] > 0, :2] + 0.5
    return bool(((points >= part[:2]) & (points < part[2:])).all(axis=1).any())


def surroundings(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Widen a box (x, y, width, height) by 0.4 of its longer side; x0, y0, x1, y1 in the image."""
    x, y, width, height = box
    margin = 0.4 * max(width, height) + 4
    low = np.clip([x - margin, y - margin], 0, [size[1] - 1, size[0] - 1]).astype(int)
    high = np.clip([x + width + margin, y + height + margin], low + 1, [size[1], size[0]])
    return (*low.tolist(), *np.ceil(high).astype(int).tolist())


def draw_part(
    image: np.ndarray,
    part: tuple[int, int, int, int],
    people: Sequence[dict[str, Any]],
    metadata: Metadata,
) -> np.ndarray:
    """Draw people, annotated or predicted, in a part of the image, at the height of a row."""
    x0, y0, x1, y1 = part
    zoom = ROW_HEIGHT / (y1 - y0)
    size = max(1, round((x1 - x0) * zoom)), ROW_HEIGHT
    picture = cv2.resize(image[y0:y1, x0:x1], size, interpolation=cv2.INTER_AREA)
    scale = np.array(size) / (x1 - x0, y1 - y0)
    if not people:
        return picture
    keypoints = np.array([np.reshape(x["keypoints"], (-1, 3)) for x in people], dtype=float)
    # COCO counts from the first pixel's centre.
    keypoints[..., :2] = (keypoints[..., :2] + 0.5 - (x0, y0)) * scale
    for person, own in zip(people, keypoints, strict=True):
        # Of an annotation 1 and 2 say how visible a keypoint is, 0 that it is not labelled.
        own[:, 2] = own[:, 2].clip(WEAKEST, 1) if "score" in person else own[:, 2] > 0
    poses = Instances(picture.shape[:2], pred_keypoints=torch.from_numpy(keypoints))
    return draw_poses(picture, poses, metadata=metadata)


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    cfg = get_cfg(args.config_file, args.opts)
    cfg.MODEL.DEVICE = "cpu"
    training = args.what == "data"
    register_datasets(cfg, training=training)
    check_config(cfg, training=training)
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output}: is a file; give a folder")
    if training:
        page = browse_data(cfg, args.num, args.output)
    else:
        page = browse_results(cfg, args.input, args.num, args.output)
    print(f"see {page}")
    return 0
