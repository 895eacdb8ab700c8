"""What the project never does: use the network unasked. That it runs no code from data and asks no
shell is ruff's to check (the rules S and TID251 of pyproject.toml)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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
