"""The exported graph against the model that it was made of; the files are written in slow tests."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from matplotlib.cbook import get_sample_data

from inspose_d2 import InsPose, InsPosePredictor, cli, get_cfg, get_model
from inspose_d2.cli import export
from inspose_d2.data.images import ResizeShortestEdge
from inspose_d2.export import (
    OUTPUTS,
    BatchGraph,
    InsPoseGraph,
    PictureGraph,
    export_onnx,
    export_program,
    graph_of,
    outputs_of,
    unsuppressed,
)

ROOT = Path(__file__).parents[2]
PEOPLE = "people/InsPose_Lite0_people", "people_lite0"
CONFIG, WEIGHTS = "quick/synthetic_people_tiny", "synthetic_people_tiny"
SIZES = [(250, 330), (256, 320), (129, 511), (320, 190), (216, 132)]  # (H, W)
SMALL_SIZES = [(97, 410), (31, 33), (20, 300)]
MODELS = {
    "paper": {},
    "box head": {"MODEL.INSPOSE.BOX_HEAD.ENABLED": True},
    "no disk offset, but visibility": {
        "MODEL.INSPOSE.DISK_OFFSET.ENABLED": False,
        "MODEL.INSPOSE.VISIBILITY.ENABLED": True,
    },
    "NMS of poses": {"MODEL.INSPOSE.NMS_TYPE_TEST": "poses"},
    "expected OKS and visibility": {
        "MODEL.INSPOSE.VISIBILITY.ENABLED": True,
        "MODEL.INSPOSE.DECODING_TEST": "expected_oks",
        "MODEL.INSPOSE.KEYPOINT_SCORE_WEIGHT_TEST": 0.5,
        "MODEL.INSPOSE.NMS_TYPE_TEST": "poses",
    },
    "maps at 1/4": {"MODEL.INSPOSE.MAP_STRIDE": 4},
    "maps at 1/16": {"MODEL.INSPOSE.MAP_STRIDE": 16},
    "features at 1/4": {"MODEL.INSPOSE.MAP_STRIDE": 4, "MODEL.INSPOSE.RESAMPLE": "features"},
}
# With NMS of boxes but where poses are asked for: the random weights of one of them give two poses
# of the same score, to a rounding error, that change places.
MODELS = {name: {"MODEL.INSPOSE.NMS_TYPE_TEST": "boxes"} | own for name, own in MODELS.items()}

# Those of a program: all settings in few exports. The expected OKS and maps at 1/4 are those of the
# package's models.
PROGRAMS = [
    ("box head", "features at 1/4"),
    ("NMS of poses", "no disk offset, but visibility", "maps at 1/16"),
]

Poses = Sequence[np.ndarray]  # in the order of outputs_of


def eager(model: InsPose, image: np.ndarray) -> Poses:
    """Poses that the model finds in an image (3, H, W)."""
    with torch.no_grad():
        poses = model([{"image": torch.from_numpy(image)}])[0]["instances"]
    return [
        poses.pred_boxes.tensor.numpy(),
        poses.scores.numpy(),
        poses.pred_keypoints.numpy(),
        *([poses.pred_visibility.numpy()] if poses.has("pred_visibility") else []),
    ]


def without_one(poses: Poses, others: Poses) -> Poses:
    """Leave out the pose without which the scores are the nearest to those of the others."""
    scores = [np.delete(poses[1], i) for i in range(len(poses[1]))]
    odd = int(np.argmin([np.abs(x - others[1]).sum() for x in scores]))
    return [np.delete(x, odd, axis=0) for x in poses]


def assert_same_poses(got: Poses, expected: Poses) -> None:
    # A pose whose score or overlap is at the threshold, to a rounding error, may be in one only.
    if len(got[1]) == len(expected[1]) + 1:
        got = without_one(got, expected)
    elif len(got[1]) + 1 == len(expected[1]):
        expected = without_one(expected, got)
    assert [x.shape for x in got] == [x.shape for x in expected]
    boxes, scores, keypoints, *visibility = (
        np.abs(a - b) for a, b in zip(got, expected, strict=True)
    )
    assert scores.max(initial=0) < 1e-4
    assert all(x.max(initial=0) < 1e-4 for x in visibility)
    assert keypoints[..., 2].max(initial=0) < 1e-4
    # Two cells of a map that are equally high may change places, and their keypoint with them.
    moved = (keypoints[..., :2] >= 0.1).any(axis=2)
    assert moved.sum() <= 0.005 * moved.size
    assert boxes[~moved.any(axis=1)].max(initial=0) < 0.1


def resized(path: str, size: tuple[int, int]) -> np.ndarray:
    """Picture as the network is to see it, (3, H, W) uint8."""
    return np.ascontiguousarray(cv2.resize(cv2.imread(path), size[::-1]).transpose(2, 0, 1))


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, *size), np.uint8)


def crowded(cfg: CfgNode) -> InsPose:
    """Build a random model that finds many poses."""
    seed_all_rng(0)
    model = build_model(cfg).eval()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.1)
    torch.nn.init.normal_(model.head.params_pred.weight, std=0.05)  # more: logits of thousands
    if model.head.visibility_pred is not None:
        torch.nn.init.normal_(model.head.visibility_pred.weight, std=0.1)
    inference = model.pose_inference
    inference.score_threshold, inference.nms_threshold = 0.1, 0.95
    return model


def with_visibility(model: InsPose) -> InsPose:
    """Copy a model, and let the copy say at random which keypoints are visible."""
    model, channels = copy.deepcopy(model), model.head.params_pred.in_channels
    model.head.visibility_pred = torch.nn.Conv2d(channels, 17, 3, padding=1)
    torch.nn.init.normal_(model.head.visibility_pred.weight, std=0.5)
    return model


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_graph_gives_the_poses_of_the_model(
    tiny_cfg: Callable[..., CfgNode], settings: dict[str, object]
) -> None:
    model = crowded(tiny_cfg(**settings))
    graph, found = InsPoseGraph(model), 0
    for size in [(130, 170), (128, 256), *SMALL_SIZES]:
        image = noise(size)
        expected = eager(model, image)
        with torch.no_grad():
            got = graph(torch.from_numpy(image))
        assert_same_poses([x.numpy() for x in got], expected)
        found += len(expected[0])
    assert found > 10


def test_similar_poses_go_from_the_best_to_the_worst() -> None:
    chain = torch.eye(9, dtype=torch.bool).roll(1, dims=1)  # each is similar to the next alone
    torch.manual_seed(0)
    for similar in [chain, *(torch.rand(40, 9, 9) < torch.linspace(0, 1, 40)[:, None, None])]:
        for valid in (torch.ones(9, dtype=torch.bool), torch.rand(9) < 0.7):
            expected: list[int] = []
            for i in valid.nonzero()[:, 0].tolist():
                if not any(similar[j, i] for j in expected):
                    expected.append(i)
            kept = unsuppressed(similar, valid)
            assert kept.nonzero()[:, 0].tolist() == expected
    kept = unsuppressed(chain, torch.ones(9, dtype=torch.bool))
    assert kept.tolist() == [True, False] * 4 + [True]


@pytest.mark.parametrize("count", [0, 1])
def test_graph_gives_no_pose_and_one_pose(tiny_cfg: Callable[..., CfgNode], count: int) -> None:
    model = crowded(tiny_cfg())
    inference = model.pose_inference
    inference.topk_candidates, inference.score_threshold = 1, 1.0 - count
    with torch.no_grad():
        got = InsPoseGraph(model)(torch.from_numpy(noise((96, 128))))
    assert [len(x) for x in got] == [count] * 3


def test_model_stays_as_it_is(tiny_cfg: Callable[..., CfgNode]) -> None:
    model = crowded(tiny_cfg()).train()
    net, weight = type(model.kp_net), model.head.cls_score.weight
    InsPoseGraph(model)
    assert model.training
    assert type(model.kp_net) is net
    assert model.head.cls_score.weight is weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_tool_says_which_extra_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: name == "onnx" or None)
    arguments = ["--config-file", CONFIG, "--output", str(tmp_path / "model.onnx")]
    assert cli.main(["export", *arguments]) == cli.USAGE
    error = capsys.readouterr().err
    assert re.search(r"onnxruntime, onnxscript: pip install .*\[export\]", error)


@pytest.mark.parametrize(
    ("output", "problem"),
    [("model.pth", "must end in .onnx, .pt2 or"), ("no/a.pt2", "no such folder")],
)
def test_tool_refuses_a_bad_output_before_it_works(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    output: str,
    problem: str,
) -> None:
    arguments = ["--config-file", CONFIG, "--output", str(tmp_path / output)]
    assert cli.main(["export", *arguments]) == cli.USAGE
    assert problem in capsys.readouterr().err


def test_example_is_short_and_imports_no_torch() -> None:
    source = (ROOT / "examples" / "onnx_app.py").read_text()
    assert len(source.splitlines()) <= 40
    assert "import torch" not in source


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_batch_gives_the_poses_of_each_image(
    tiny_cfg: Callable[..., CfgNode], settings: dict[str, object]
) -> None:
    model = crowded(tiny_cfg(**settings))
    inference, found = model.pose_inference, 0
    inference.topk_candidates, inference.max_poses = 60, 40
    for size in [(96, 130), SMALL_SIZES[1]]:  # in the smaller one there are fewer locations
        images = [noise(size, seed) for seed in range(3)]
        with torch.no_grad():
            *rows, counts = BatchGraph(model)(torch.from_numpy(np.stack(images)))
        assert [x.shape[:2] for x in rows] == [(3, 40)] * len(outputs_of(model))
        for number, (image, count) in enumerate(zip(images, counts.tolist(), strict=True)):
            own = [x[number].numpy() for x in rows]
            assert_same_poses([x[:count] for x in own], eager(model, image))
            assert not any(x[count:].any() for x in own)
            found += count
    assert found > 10


def test_batch_of_empty_and_full_images(tiny_cfg: Callable[..., CfgNode]) -> None:
    model = crowded(tiny_cfg())
    model.pose_inference.score_threshold = 1.0
    with torch.no_grad():
        *rows, counts = BatchGraph(model)(torch.zeros(2, 3, 96, 128, dtype=torch.uint8))
    assert counts.tolist() == [0, 0]
    assert not any(x.any() for x in rows)


def grace_hopper() -> np.ndarray:
    """Photograph (600, 512, 3) in BGR."""
    return cv2.imread(get_sample_data("grace_hopper.jpg", asfileobj=False))


def assert_poses_of_predictor(predictor: InsPosePredictor, got: Poses, picture: np.ndarray) -> None:
    """Compare the poses of a picture from a score of 0.5 on.

    Some pixels are 1 of 255 higher or lower than Pillow's. That moved 0.4 % of the keypoints of 60
    poses in 21 photographs by more than 0.1 pixels, and one by 5. Where a map says little, as for
    legs outside a picture, that may move a keypoint far: these, which nobody draws, are left out.
    """
    found = predictor(picture)["instances"]
    expected = [found.pred_boxes.tensor, found.scores, found.pred_keypoints]
    got, other = ([np.asarray(x[poses[1] >= 0.5]) for x in poses] for poses in (got, expected))
    assert len(other[1]) > 0
    assert [x.shape for x in got] == [x.shape for x in other]
    assert np.abs(got[1] - other[1]).max() < 0.005
    drawn = other[2][..., 2] >= 0.3
    assert drawn.sum() >= 8
    assert np.abs(got[2] - other[2])[drawn].max() < 0.5


def test_graph_of_pictures_gives_the_poses_of_the_predictor() -> None:
    predictor = InsPosePredictor(PEOPLE[0], weights=PEOPLE[1], device="cpu")
    predictor.model = with_visibility(predictor.model)
    graph, photograph = graph_of(predictor.model, predictor.cfg), grace_hopper()
    for picture in [photograph, cv2.resize(photograph, (180, 200)), photograph[30:]]:
        with torch.no_grad():
            *got, visibility = graph(torch.from_numpy(picture))
        assert_poses_of_predictor(predictor, [x.numpy() for x in got], picture)
        expected = predictor(picture)["instances"].pred_visibility[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(visibility[0], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("library", ["pillow", "opencv"])
def test_graph_of_pictures_resizes_as_evaluation_does(
    tiny_cfg: Callable[..., CfgNode], library: str
) -> None:
    cfg = tiny_cfg(
        **{"INPUT.MIN_SIZE_TEST": 96, "INPUT.MAX_SIZE_TEST": 160, "INPUT.RESIZE": library}
    )
    seen: list[torch.Tensor] = []

    def network(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(pixels)
        return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 17, 3)

    graph = PictureGraph(network, cfg)
    resize = ResizeShortestEdge([96, 96], 160, library=library)
    random = np.random.default_rng(0)
    for height, width in [(96, 96), (1, 700), *random.integers(20, 500, (20, 2))]:
        picture = random.integers(0, 256, (height, width, 3), np.uint8)
        expected = resize.get_transform(picture).apply_image(picture).transpose(2, 0, 1)
        graph(torch.from_numpy(picture))
        got = seen.pop().numpy()
        if cfg.INPUT.FORMAT == "RGB":
            expected = expected[::-1]
        assert got.shape == expected.shape
        # Numbers near a half are rounded up or down; OpenCV's have but 11 bits of a fraction.
        assert np.abs(got - expected).max() <= (1 if library == "pillow" else 2)
        assert (got != expected).mean() < 0.2


def test_preprocess_is_for_single_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--config-file", CONFIG, "--preprocess", "--output"]
    for more in ([str(tmp_path / "a.safetensors")], [str(tmp_path / "a.onnx"), "--batch", "2"]):
        assert cli.main(["export", *arguments, *more]) == cli.USAGE
        assert "--preprocess is for .onnx and .pt2" in capsys.readouterr().err


def test_batch_is_for_onnx(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--config-file", CONFIG, "--batch", "2", "--output", str(tmp_path / "model.pt2")]
    assert cli.main(["export", *arguments]) == cli.USAGE
    assert "--batch is for ONNX" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained() -> InsPose:
    """Model of the package: random ones make ties of equal maps."""
    return get_model(CONFIG, WEIGHTS, device="cpu")


def write(config_file: str, weights: str, output: Path, *more: str) -> None:
    """Export as users do, from the command line."""
    command = [sys.executable, "-m", "inspose_d2", "export", "--config-file", config_file]
    command += ["--weights", weights, "--output", str(output), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


@pytest.fixture(scope="module")
def onnx_file(made_once: Callable[..., Path]) -> Path:
    """The small model of the package, for images."""
    pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
    return made_once("model.onnx", lambda path: write(CONFIG, WEIGHTS, path))


@pytest.fixture(scope="module")
def people_file(made_once: Callable[..., Path]) -> Path:
    """The model of the package for photographs, for pictures as they are."""
    pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
    return made_once("people.onnx", lambda path: write(*PEOPLE, path, "--preprocess"))


def pictures(dataset: str) -> Iterator[np.ndarray]:
    """Thirty pictures of a data set, each at a size of its own."""
    sides = np.random.default_rng(0).integers(129, 450, (30, 2)).tolist()
    for record, (height, width) in zip(DatasetCatalog.get(dataset), sides, strict=False):
        yield resized(record["file_name"], (height, width))


def compare_with_onnx(model: InsPose, onnx_file: Path, images: Iterator[np.ndarray]) -> int:
    """Compare each image's poses; count them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file)
    count = 0
    for image in images:
        expected = eager(model, image)
        assert_same_poses(session.run(outputs_of(model), {"image": image}), expected)
        count += len(expected[0])
    return count


@pytest.mark.slow
def test_onnx_runtime_finds_the_poses_of_pytorch_in_thirty_images(
    trained: InsPose, onnx_file: Path
) -> None:
    assert compare_with_onnx(trained, onnx_file, pictures("synthetic_people_val")) > 100


@pytest.mark.slow
def test_onnx_runtime_finds_the_poses_of_pytorch_in_small_images(
    trained: InsPose, onnx_file: Path
) -> None:
    record = DatasetCatalog.get("synthetic_people_val")[0]
    images = (resized(record["file_name"], size) for size in SMALL_SIZES)
    assert compare_with_onnx(trained, onnx_file, images) > 0


@pytest.mark.slow
def test_openvino_finds_the_poses_of_onnx_runtime(onnx_file: Path) -> None:
    openvino = pytest.importorskip("openvino")
    import onnxruntime

    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.Core().read_model(onnx_file), "CPU", precision)
    session = onnxruntime.InferenceSession(onnx_file)
    for image in islice(pictures("synthetic_people_val"), 5):
        expected = session.run(list(OUTPUTS), {"image": image})
        assert_same_poses([compiled([image])[name] for name in OUTPUTS], expected)
        assert len(expected[1]) > 0


@pytest.mark.slow
@pytest.mark.coco
@pytest.mark.usefixtures("coco_root")
def test_onnx_runtime_finds_the_poses_of_pytorch_in_photographs(
    trained: InsPose, onnx_file: Path
) -> None:
    assert compare_with_onnx(trained, onnx_file, pictures("keypoints_coco_2017_val")) > 100


@pytest.mark.slow
def test_onnx_file_has_the_documented_names_and_no_paths(onnx_file: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file)
    image, *more = session.get_inputs()
    assert (image.name, image.type, image.shape[0], more) == ("image", "tensor(uint8)", 3, [])
    assert image.shape[1:] == ["height", "width"]
    outputs = session.get_outputs()
    assert [x.name for x in outputs] == list(OUTPUTS)
    assert [x.shape[1:] for x in outputs] == [[4], [], [17, 3]]
    assert str(ROOT).encode() not in onnx_file.read_bytes()


@pytest.mark.slow
def test_example_finds_the_poses_without_torch(
    onnx_file: Path, people_file: Path, tmp_path: Path
) -> None:
    picture = get_sample_data("grace_hopper.jpg", asfileobj=False)
    blocked = "import sys, runpy; sys.modules.update(torch=None, torchvision=None, detectron2=None)"
    code = f"{blocked}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    example = [sys.executable, "-c", code, str(ROOT / "examples" / "onnx_app.py")]
    drawn, score = str(tmp_path / "drawn.png"), 0.5
    command = [*example, str(people_file), picture, "--output", drawn, "--score", str(score)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    predictor = InsPosePredictor(PEOPLE[0], weights=PEOPLE[1], device="cpu")
    poses = predictor(picture)["instances"]
    expected = poses.pred_keypoints[poses.scores >= score].numpy()
    printed = [line.split() for line in result.stdout.splitlines()]
    assert len(printed) == len(expected) > 0
    points = np.array([[x.split(",") for x in line] for line in printed], float)
    sure = expected[..., 2] >= 0.3  # see assert_poses_of_predictor
    assert sure.sum() >= 8
    assert np.abs(points - expected)[sure].max() < 0.5
    assert (cv2.imread(drawn) != cv2.imread(picture)).any()

    refused = subprocess.run([*example, str(onnx_file), picture], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "export it with --preprocess" in refused.stderr


@pytest.mark.slow
def test_onnx_runtime_finds_the_poses_of_a_batch_and_resamples_maps(
    trained: InsPose, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
    model, found = with_visibility(trained), 0
    # Weights do not depend on the stride of the maps; only offsets, in cells, are half too small.
    model.kp_net.map_stride, model.disk_offset_branch.scale = 4, 2
    inference = model.pose_inference
    inference.topk_candidates, inference.max_poses = 30, 20
    export_onnx(model, tmp_path / "model.onnx", batch=2)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    files = [x["file_name"] for x in DatasetCatalog.get("synthetic_people_val")[:2]]
    for size in [*SIZES, *SMALL_SIZES]:
        images = np.stack([resized(x, size) for x in files])
        *rows, counts = session.run([*OUTPUTS, "visibility", "counts"], {"images": images})
        assert [x.shape[:2] for x in rows] == [(2, 20)] * 4
        for number, count in enumerate(counts):
            own = [x[number, :count] for x in rows]
            assert_same_poses(own, eager(model, images[number]))
            found += count
    assert found > 10


def eager_as_they_are(predictor: InsPosePredictor, picture: np.ndarray) -> Poses:
    """Poses of a picture of the network's size, which is not resized."""
    if predictor.cfg.INPUT.FORMAT == "RGB":
        picture = picture[:, :, ::-1]
    return eager(predictor.model, np.ascontiguousarray(picture.transpose(2, 0, 1)))


@pytest.mark.slow
def test_saved_program_finds_the_poses_of_the_model(trained: InsPose, tmp_path: Path) -> None:
    torch.export.save(export_program(trained), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    record = DatasetCatalog.get("synthetic_people_val")[0]
    for size in [*SIZES, *SMALL_SIZES]:
        image = resized(record["file_name"], size)
        got = [x.detach().numpy() for x in program(torch.from_numpy(image))]
        assert_same_poses(got, eager(trained, image))


@pytest.mark.slow
def test_saved_program_of_pictures_does_what_the_graph_does(
    trained: InsPose, tmp_path: Path
) -> None:
    cfg, found = get_cfg(CONFIG), 0
    graph, program = graph_of(trained, cfg), export_program(trained, preprocess=cfg)
    torch.export.save(program, tmp_path / "pictures.pt2")
    loaded = torch.export.load(tmp_path / "pictures.pt2").module()
    picture = cv2.imread(DatasetCatalog.get("synthetic_people_val")[0]["file_name"])
    for size in [(300, 200), (200, 900), (130, 131), (20, 30)]:
        image = torch.from_numpy(cv2.resize(picture, size[::-1]))
        got, expected = ([x.detach().numpy() for x in run(image)] for run in (loaded, graph))
        assert_same_poses(got, expected)
        found += len(expected[1])
    assert found > 10


@pytest.mark.slow
@pytest.mark.parametrize("names", PROGRAMS, ids=" + ".join)
def test_program_of_other_models_finds_their_poses(
    tiny_cfg: Callable[..., CfgNode], names: tuple[str, ...]
) -> None:
    settings = {key: value for name in names for key, value in MODELS[name].items()}
    model = crowded(tiny_cfg(**settings))
    program = export_program(model).module()
    for size in [*SIZES, (32, 300)]:
        image = noise(size)
        got = [x.detach().numpy() for x in program(torch.from_numpy(image))]
        assert_same_poses(got, eager(model, image))


@pytest.mark.slow
def test_program_gives_no_pose_and_one_pose(tiny_cfg: Callable[..., CfgNode]) -> None:
    model = crowded(tiny_cfg())
    images = [torch.from_numpy(noise((200, 200)) // divisor) for divisor in (1, 16)]
    with torch.no_grad():
        batches = [model.preprocess_image([{"image": x}]).tensor for x in images]
        best = [model.predict(x).person_logits.sigmoid().max().item() for x in batches]
    assert best[0] != best[1]
    inference = model.pose_inference
    inference.topk_candidates, inference.score_threshold = 1, sum(best) / 2
    program = export_program(model).module()
    counts = [len(scores) for _, scores, _ in map(program, images)]
    assert counts == [int(x > sum(best) / 2) for x in best]


@pytest.mark.slow
def test_onnx_runtime_finds_the_poses_of_photographs(people_file: Path) -> None:
    import onnxruntime

    session, photograph = onnxruntime.InferenceSession(people_file), grace_hopper()
    assert session.get_inputs()[0].shape == ["height", "width", 3]
    predictor = InsPosePredictor(PEOPLE[0], weights=PEOPLE[1], device="cpu")
    # Sizes that the config leaves as they are, and nobody.
    pictures = [cv2.resize(photograph, (288, 352)), cv2.resize(photograph, (320, 288))]
    for picture in [*pictures, np.zeros((288, 288, 3), np.uint8)]:
        expected = eager_as_they_are(predictor, picture)
        assert (expected[1].max(initial=0) > 0.5) == bool(picture.any())
        assert_same_poses(session.run(list(OUTPUTS), {"image": picture}), expected)
    for picture in [photograph, cv2.resize(photograph, (200, 180)), photograph[30:]]:
        got = session.run(list(OUTPUTS), {"image": picture})
        assert_poses_of_predictor(predictor, got, picture)
