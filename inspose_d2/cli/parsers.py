"""What the subcommands of ``inspose`` understand; the same thing has the same name in all.

The standard library alone: ``--help`` waits for nothing else.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__

PREDICT = """\
The output folder then holds

    poses/        the pictures, in the tree and under the names of the inputs; of a video its WebM
    kp_nets/      with --kp-net-view: the keypoint maps of the best person of each image
    results.json  the poses, one a line, in COCO's form for results: image_id, category_id (1),
                  bbox (x, y, width, height), score, keypoints (x, y, score, x, ...) and, besides,
                  file_name; of a video seconds, the time of the frame, and with --track track_id
    unfinished/   of pictures, until all are done: the same command goes on from there

Coordinates are COCO's: pixels, the first one's centre is (0, 0). A keypoint's score is a
probability. image_id is the number that is the file's name where all files have such names and no
two the same, as COCO's do, else the place among the inputs, from 0; in a video that of the frame.

Folders are searched to the bottom, through links too. A file that cannot be read is left out and
listed at the end with the reason; so is a video in a folder, or one that ends before its time. Exit
status: 0 all done, 1 nothing done, 2 could not begin, 3 something left out, 130 interrupted by
Ctrl-C, 143 by SIGTERM, which leave whole files of all that was done. A webcam or a live stream is
ended by Ctrl-C or, in the webcam's window, q: 0. docs/video_and_folders.md has more.

    inspose predict --input photo.jpg --output out
    inspose predict --input photos 'more/*.png' --output out --kp-net-view
    inspose predict --input dance.mp4 --output out --video-out dance.webm
    inspose predict --input dance.mp4 --output out --track --smooth
    inspose predict --input rtsp://192.168.0.7/live --output out
    torchrun --nproc-per-node 2 -m inspose_d2 predict --input photos --output out
"""

WEB = """\
The page shows the poses above a threshold, what the KP-Net of each person sees, and how long the
network took; the poses can be downloaded in COCO's form for results, as `inspose predict` writes
them. Only this machine is served unless --host says otherwise. The page loads nothing from
elsewhere, and the pictures are deleted an hour after their use, all of them when the server ends
(Ctrl-C).
"""

EXPORT = """\
One image goes in, its poses come out; NMS is inside.

    input   image      uint8    (3, H, W)   colours in the order of INPUT.FORMAT, any H and W;
                                            resized before, to INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST
    output  boxes      float32  (N, 4)      x0, y0, x1, y1 around the keypoints, pixels of the input
    output  scores     float32  (N,)        of the poses, in [0, 1], best first
    output  keypoints  float32  (N, K, 3)   x, y in pixels of the input, score in [0, 1]

With --preprocess: an image (H, W, 3) as OpenCV reads it, in BGR and at its own size, which all
coordinates are in pixels of.

With --batch: images (B, 3, H, W), and boxes (B, R, 4), scores (B, R), keypoints (B, R, K, 3) with
zeros behind the counts (B,) poses of each image, R being TEST.DETECTIONS_PER_IMAGE.

The .pt2 gives the same three as a tuple, for H and W above 128. docs/deployment.md has more.
"""

BROWSE = """\
Each writes pictures and index.html, a page to open in any browser, with no net.

`data` takes the first images that training with this config (SEED, one worker) would see, after
flips and resizing, and shows what is annotated and what the network is to learn from it: positive
locations, regions left out, disk offsets, heatmaps.

`results` matches the predictions of an evaluation (coco_instances_results.json) with the annotated
persons as COCO's evaluation does, and shows the persons of the lowest OKS first, ground truth
beside prediction, then the false positives. The matching is COCOeval's at OKS 0.5, the lowest that
counts for AP: the 20 best predictions of an image, best first, each take the person that is still
free and fits best. A person whom none takes is missed; the OKS given for it is that of the best
prediction that took nobody.
"""

SUBMIT = """\
    RESULTS=output/inference/coco_instances_results.json
    INFO=$DETECTRON2_DATASETS/coco/annotations/image_info_test-dev2017.json
    inspose submit --input $RESULTS --image-info $INFO --name InsPose-R50

The poses are those that evaluation on ``keypoints_coco_2017_test-dev`` writes. Their coordinates
are COCO's already (``COCOEvaluator`` takes off the half pixel that Detectron2 adds on loading):
nothing is added or taken off here. To make the file smaller only the 20 best poses of an image
stay (COCO counts no more), the third number of a keypoint, which COCO does not use, becomes 1, and
coordinates are rounded to hundredths of a pixel, where COCO itself recommends whole pixels.

File names and form: https://cocodataset.org/#upload and https://cocodataset.org/#format-results.
"""


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations: ``--conf`` may mean more than one thing."""

    def __init__(self, **kwargs: Any) -> None:
        """Like ``ArgumentParser``."""
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)


def make_parser() -> Parser:
    """Make the parser of the whole program.

    Its result has ``command`` (the words after ``inspose``) and ``module`` (of :mod:`.cli`, whose
    ``run`` does it).
    """
    parser = Parser(prog="inspose", description="InsPose in Detectron2: poses of many persons.")
    parser.add_argument("--version", action="version", version=f"inspose_d2 {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, says: str, add: Callable[[Parser], None], more: str = "", module: str = ""
    ) -> None:
        own = commands.add_parser(name, help=says, description=f"{says}\n\n{more}".rstrip())
        own.set_defaults(command=name, module=module or name)
        add(own)

    command("train", "Train a model.", _train, module="train")
    command("eval", "Evaluate a model on DATASETS.TEST.", _train, module="train")
    command("predict", "Find the poses in images, a video or a webcam's frames.", _predict, PREDICT)
    command("web", "Find the poses in pictures on a web page.", _web, WEB)
    command("export", "Write a model with its weights as ONNX or .pt2.", _export, EXPORT)
    command("browse", "Look at training data or at an evaluation's errors.", _browse, BROWSE)
    command("validate", "List what is wrong with a file of COCO keypoint annotations.", _validate)
    command("benchmark", "Measure the latency of one model.", _benchmark)
    command("convert", "Convert data sets and checkpoints.", _convert)
    command("submit", "Pack poses on COCO test-dev for COCO's server.", _submit, SUBMIT)
    command("models", "List configs and trained weights, download them, write folders.", _models)
    command(
        "install-detectron2",
        "Install Detectron2, which is on no package index, without GitHub and without a compiler.",
        _install,
        module="install",
    )
    return parser


def _model(parser: Parser, *, required: bool = False) -> None:
    """The options that choose a model."""
    default = "" if required else "; by default that of the weights"
    parser.add_argument(
        "--config-file", required=required, metavar="CONFIG", help=f"YAML file or name{default}"
    )
    parser.add_argument(
        "--weights",
        metavar="WEIGHTS",
        help="of that config: file, name, folder, or organisation/name of the Hugging Face hub",
    )


def _options(parser: Parser) -> None:
    """What stands at the end of a command line."""
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config changes, last"
    )


def _device(parser: Parser) -> None:
    parser.add_argument("--device", help="cuda, cpu, ...; by default CUDA where there is one")


def _threshold(parser: Parser) -> None:
    parser.add_argument(
        "--score-threshold",
        type=_fraction,
        help="poses below are left out; by default that of the weights, 0.4 of others",
    )


def _train(parser: Parser) -> None:
    _model(parser, required=True)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT_DIR")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="workers here (1)")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="machines (1)")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="of this one (0)")
    parser.add_argument("--dist-url", default="auto", help="where the workers meet")
    _device(parser)
    _options(parser)


def _predict(parser: Parser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        type=_home,
        required=True,
        help="images, folders, patterns; or a video; or a stream's URL; or webcam",
    )
    parser.add_argument(
        "--output", type=_path, required=True, help="folder, or the picture of a single image"
    )
    _model(parser)
    _device(parser)
    _threshold(parser)
    parser.add_argument(
        "--batch-size",
        type=_count,
        default=1,
        help="images that are read at once (1); those of one size go through the model together",
    )
    parser.add_argument("--kp-net-view", action="store_true", help="draw keypoint maps too")
    parser.add_argument(
        "--track", action="store_true", help="persons of a video keep their numbers"
    )
    parser.add_argument(
        "--smooth", action="store_true", help="tracked, and keypoints that do not tremble"
    )
    parser.add_argument("--video-out", type=_path, help="the video's WebM, elsewhere")
    _options(parser)


def _web(parser: Parser) -> None:
    _model(parser)
    _device(parser)
    _threshold(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=7860, help="to listen on (7860; 0: any free)")
    _options(parser)


def _models(parser: Parser) -> None:
    commands = parser.add_subparsers(dest="what", metavar="WHAT", help="by default the list")
    download = commands.add_parser("download", help="have weights here, and print their file")
    folder = commands.add_parser("folder", help="write a folder to push to the Hugging Face hub")
    for own in (download, folder):
        own.add_argument("weights", help="file, name, folder, or organisation/name of the hub")
    folder.add_argument("--config-file", metavar="CONFIG", help="by default that of the weights")
    folder.add_argument("--output", type=_path, required=True, metavar="FOLDER", help="to write")


def _export(parser: Parser) -> None:
    _model(parser)
    parser.add_argument("--output", type=_path, required=True, metavar="FILE")
    parser.add_argument(
        "--format", choices=("onnx", "pt2", "safetensors"), help="default: the end of --output"
    )
    parser.add_argument(
        "--batch", type=_count, metavar="B", help="of B images, fixed rows for each (ONNX)"
    )
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="the file takes pictures as OpenCV reads them, of any size",
    )
    _options(parser)


def _browse(parser: Parser) -> None:
    commands = parser.add_subparsers(dest="what", required=True)
    for name, what in (("data", "images"), ("results", "persons, and of false positives")):
        own = commands.add_parser(name)
        own.add_argument("--config-file", required=True, metavar="CONFIG", help="file or name")
        own.add_argument("--output", type=_path, required=True, help="folder")
        own.add_argument("--num", type=_count, default=30, help=f"of {what} in pictures (30)")
        if name == "results":
            own.add_argument(
                "--input",
                type=_path,
                help="coco_instances_results.json; by default that of the evaluation in OUTPUT_DIR",
            )
        _options(own)


def _validate(parser: Parser) -> None:
    parser.add_argument("--input", type=_home, required=True, metavar="JSON", help="annotations")
    parser.add_argument(
        "--images", type=_home, metavar="FOLDER", help="look for the image files here"
    )
    parser.add_argument("--num-keypoints", type=_count, metavar="K", help="default: what JSON says")
    parser.add_argument(
        "--evaluation", action="store_true", help="poses are to be scored by it, not learned"
    )


def _benchmark(parser: Parser) -> None:
    _model(parser)
    _device(parser)
    _threshold(parser)
    parser.add_argument("--input", type=_home, help="photograph; by default noise of the test size")
    parser.add_argument("--num", type=_count, default=20, help="images that are timed (20)")
    _options(parser)


def _convert(parser: Parser) -> None:
    commands = parser.add_subparsers(dest="what", required=True)
    opera = commands.add_parser(
        "opera", help="the authors' weights, for InsPose_R50_Official (docs/official.md)"
    )
    opera.add_argument("input", type=_home, metavar="IN.pth", help="the authors' file")
    opera.add_argument("output", type=_home, metavar="OUT.pth", help="file to write")
    select = commands.add_parser("select-keypoints", help="a COCO file with some of its keypoints")
    select.add_argument("--input", type=_path, required=True, help="file to copy")
    select.add_argument("--output", type=_path, required=True, help="file to write")
    select.add_argument("--keypoints", nargs="+", required=True, metavar="NAME", help="in order")
    crowdpose = commands.add_parser("crowdpose", help="what CrowdPose's files lack, added")
    crowdpose.add_argument("--input", type=_path, required=True, help="folder json of CrowdPose")
    crowdpose.add_argument("--output", type=_path, help="by default annotations, beside the input")
    _format(commands, "coco", "a COCO keypoint file mended, also Roboflow's and CVAT's", "the file")
    yolo = _format(commands, "yolo", "YOLO's poses, also Roboflow's", "data.yaml, or a folder")
    yolo.add_argument("--split", default="train", help="of data.yaml: train, val, test (train)")
    _format(commands, "labelme", "labelme's points and rectangles", "folder of the json files")
    _format(commands, "label-studio", "Label Studio's exports", "JSON or JSON-MIN")
    _format(commands, "cvat", "CVAT for images 1.1", "annotations.xml")
    back = commands.add_parser("to-yolo", help="a COCO keypoint file as YOLO's poses")
    back.add_argument("--input", type=_path, required=True, help="COCO keypoint file")
    back.add_argument("--images", type=_path, required=True, metavar="FOLDER", help="of the images")
    back.add_argument("--output", type=_path, required=True, metavar="FOLDER", help="a new one")


def _format(commands: Any, name: str, says: str, what: str) -> Parser:
    """A format of a tool that becomes a COCO keypoint file."""
    parser: Parser = commands.add_parser(name, help=says, description=says)
    parser.add_argument("--input", type=_path, required=True, help=what)
    parser.add_argument("--output", type=_path, required=True, metavar="JSON", help="file to write")
    parser.add_argument("--images", type=_path, metavar="FOLDER", help="of the images")
    parser.add_argument("--category", metavar="NAME", help="the one to keep, of several")
    parser.add_argument(
        "--keypoints", nargs="+", metavar="NAME", help="in order, where the input has none"
    )
    return parser


def _submit(parser: Parser) -> None:
    parser.add_argument("--input", type=_path, required=True, help="coco_instances_results.json")
    parser.add_argument("--image-info", type=_path, required=True, help="image_info_test-dev2017")
    parser.add_argument("--name", required=True, help="of the algorithm, in the file's name")
    parser.add_argument("--output", type=_path, help="folder; by default that of the results")


def _install(parser: Parser) -> None:
    parser.add_argument("--wheel", type=_path, help="LabGym's wheel, when it is already downloaded")


def _path(text: str) -> Path:
    """A path; ``~`` is the home folder, also where no shell has said so (``--input=~/a.jpg``)."""
    return Path(text).expanduser()


def _home(text: str) -> str:
    """The same of what may be no path, such as a pattern, or ``webcam``."""
    return os.path.expanduser(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:  # NaN neither
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be in 0 to 65535, got {text}")
    return value
