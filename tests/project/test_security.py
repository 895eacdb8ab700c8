"""What the project never does: run code from data, ask a shell, use the network."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("inspose_d2", "benchmarks", "experiments", "tools")
SOURCES = [*(x for name in FOLDERS for x in ROOT.glob(f"{name}/**/*.py")), ROOT / "train_net.py"]

RUN_CODE = {"eval", "exec", "compile", "__import__"}
UNPICKLE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
# Its subclass there unpickles numpy arrays and OrderedDict only.
MAY_SUBCLASS = {"inspose_d2/checkpoint/checkpointer.py"}


def dangers(source: str, path: str = "") -> list[str]:
    """What a source does of this, as "line: what"."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {base for node in classes for base in node.bases}
    bases = {x for x in bases if _full_name(x, names) == "pickle.Unpickler"}
    allowed = {x for base in bases for x in ast.walk(base)} if path in MAY_SUBCLASS else set()
    found = []
    for node in ast.walk(tree):
        what = ""
        if isinstance(node, ast.Call):
            what = _bad_call(node, names)
        elif isinstance(node, ast.Attribute | ast.Name) and node not in allowed:
            what = _bad_name(_full_name(node, names))
        if what:
            found.append(f"{node.lineno}: {what}")
    return found


def _bad_name(name: str) -> str:
    """The full name of what comes from a module that unpickles; else empty."""
    module, _, member = name.partition(".")
    is_error = member.endswith("Error")
    return name if module in UNPICKLE and member and not is_error else ""


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in the module, full name) of what is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((x.asname or x.name.split(".")[0], x.name) for x in node.names if x.asname)
            yield from ((x.name.split(".")[0],) * 2 for x in node.names if not x.asname)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((x.asname or x.name, f"{node.module}.{x.name}") for x in node.names)


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``; of what is no imported name as it stands."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return ""


def _bad_call(call: ast.Call, names: dict[str, str]) -> str:
    """What is wrong with a call; empty if nothing is."""
    name = _full_name(call.func, names)
    values = {
        keyword.arg: keyword.value.value
        for keyword in call.keywords
        if isinstance(keyword.value, ast.Constant)
    }
    asked = {keyword.arg for keyword in call.keywords}
    if name.removeprefix("builtins.") in RUN_CODE or name in SHELLS:
        return name
    if name.startswith("subprocess.") and "shell" in asked and values.get("shell") is not False:
        return f"{name} with a shell"
    if name == "torch.load" and values.get("weights_only") is not True:
        return "torch.load without weights_only=True"
    if name == "numpy.load" and "allow_pickle" in asked and values.get("allow_pickle") is not False:
        return "numpy.load with allow_pickle"
    if name in ("yaml.load", "yaml.load_all"):
        loaders = [*call.args[1:], *(x.value for x in call.keywords if x.arg == "Loader")]
        if not any("Safe" in ast.dump(loader) for loader in loaders):
            return f"{name} without a safe loader"
    if name.startswith("yaml.") and ("unsafe" in name or "full_load" in name):
        return name
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source_runs_no_code_from_data_and_no_shell(path: Path) -> None:
    assert dangers(path.read_text(), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "import builtins; builtins.exec('1')",
        "compile('1', '', 'eval')",
        "import pickle; pickle.load(file)",
        "from pickle import loads; loads(data)",
        "import pickle as p\nclass U(p.Unpickler): pass",
        "import marshal; read = marshal.loads",
        "import os; os.system('ls')",
        "from os import popen; popen('ls')",
        "import subprocess; subprocess.run('ls', shell=True)",
        "from subprocess import Popen; Popen('ls', shell=flag)",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "from torch import load; load(path)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import yaml; yaml.load(text)",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "import yaml; yaml.unsafe_load(text)",
    ],
)
def test_danger_is_found(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re, torch; re.compile('a'); torch.compile(model)",
        "import torch; torch.load(path, weights_only=True)",
        "import yaml; yaml.safe_load(text); yaml.load(text, Loader=yaml.SafeLoader)",
        "import subprocess; subprocess.run(['ls'])",
    ],
)
def test_harmless_source_is_not(source: str) -> None:
    assert dangers(source) == []


def test_only_the_checkpointer_may_subclass_the_unpickler() -> None:
    source = "import pickle\nclass U(pickle.Unpickler): pass"
    assert dangers(source, "inspose_d2/checkpoint/checkpointer.py") == []
    assert dangers(source, "inspose_d2/modeling/head.py")
    assert dangers(f"{source}\npickle.load(file)", "inspose_d2/checkpoint/checkpointer.py")


# Python tells its audit hooks of all that its socket module does (PEP 578), whoever calls it.
OFFLINE = """
import sys

def refuse(event, args):
    if event == "socket.connect" and not isinstance(args[1], tuple):
        return  # a socket of this machine: multiprocessing talks through these
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("NETWORK:", event, args)
        raise OSError(f"no network: {event} {args}")

sys.addaudithook(refuse)

import cv2
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from inspose_d2 import add_inspose_config
from inspose_d2.data.synthetic import build_synthetic_people
from inspose_d2.engine.trainer import Trainer

json_file = build_synthetic_people(sys.argv[1] + "/few", "val", 2, num_workers=1)
images = json_file.parents[1] / "val"
like = MetadataCatalog.get("synthetic_people_val")
keys = "keypoint_names", "keypoint_flip_map"
register_coco_instances("few", {k: getattr(like, k) for k in keys}, str(json_file), str(images))
cfg = get_cfg()
add_inspose_config(cfg)
cfg.merge_from_file("configs/quick/synthetic_people.yaml")
cfg.merge_from_list([
    "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", ("few",), "DATASETS.TEST", ("few",),
    "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.MAX_ITER", 2,
    "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", sys.argv[1],
    "MODEL.INSPOSE.SCORE_THRESH_TEST", 0.0, "MODEL.INSPOSE.CONV_DIM", 64,
])
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()
assert "keypoints" in Trainer.test(cfg, trainer.model)
cfg.MODEL.WEIGHTS = sys.argv[1] + "/model_final.pth"
image = cv2.imread(str(next(images.iterdir())))
assert len(DefaultPredictor(cfg)(image)["instances"]) > 0
print("done")
try:
    import urllib.request
    urllib.request.urlopen("http://127.0.0.1:9/")
except OSError as error:
    print("refused:", "no network" in str(error))
"""


@pytest.mark.slow
def test_import_training_and_prediction_use_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", OFFLINE, str(tmp_path)]
    environment = {**os.environ, "INSPOSE_D2_CACHE": str(tmp_path)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    before, after = result.stdout.split("done\n")
    assert "NETWORK" not in before
    assert "NETWORK" in after  # the hook does refuse
    assert "refused: True" in after
