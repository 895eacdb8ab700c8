import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from inspose_d2.data import register_synthetic_people, synthetic
from inspose_d2.data.synthetic import (
    CLUTTER,
    KEYPOINT_NAMES,
    MIN_VISIBLE_KEYPOINTS,
    NUM_PARTS,
    Blob,
    build_noisy_people,
    build_partial_people,
    build_synthetic_people,
    make_image,
    paint_labels,
    paint_picture,
    sample_scene,
    visibility,
)

SIZE = 160
COCO_SIGMAS = (  # of cocodataset.org/#keypoints-eval
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062),
    *(0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    """A small set."""
    return build_synthetic_people(tmp_path_factory.mktemp("data"), "val", 12, SIZE, num_workers=1)


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(np.random.default_rng(seed), 320) for seed in range(200)]


def owner(label):
    return (int(label) - 1) // NUM_PARTS


def files_of(json_file, split="val"):
    images = sorted((json_file.parents[1] / split).iterdir())
    return [path.read_bytes() for path in (json_file, *images)]


def test_images_do_not_depend_on_the_number_of_workers(json_file, tmp_path):
    again = build_synthetic_people(tmp_path, "val", 12, SIZE, num_workers=2)
    assert files_of(again) == files_of(json_file)
    assert len(files_of(again)) == 13


@pytest.mark.parametrize(
    "other", [(1, "train", 3), (0, "val", 3), (0, "holdout", 3), (0, "train", 4)]
)
def test_image_is_a_function_of_seed_split_and_index(other):
    picture, annotations = make_image(0, "train", 3, SIZE)
    same_picture, same_annotations = make_image(0, "train", 3, SIZE)
    assert np.array_equal(picture, same_picture)
    assert annotations == same_annotations
    assert annotations != make_image(*other, SIZE)[1]


def test_scenes_vary_in_people_size_and_pose(scenes):
    counts = [len(scene.figures) for scene in scenes]
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    sizes, head_above_feet, wide = [], [], []
    for scene, figure in ((s, figure) for s in scenes for figure in s.figures):
        outline = np.concatenate([blob.polygon[:, 0] for blob in figure.blobs]) / 16
        width, height = np.ptp(outline, axis=0)
        sizes.append(max(width, height) / scene.height)
        head_above_feet.append(figure.keypoints[0, 1] < figure.keypoints[15:, 1].min())
        wide.append(width > 1.5 * height)
    assert 0.13 < min(sizes) < 0.18  # the outline differs a little from the nominal size
    assert 0.8 < max(sizes) < 0.95
    assert 0.8 < np.mean(head_above_feet) < 0.97  # the others bend, lie or stand on their hands
    assert 0.02 < np.mean(wide) < 0.2
    assert {(scene.width, scene.height) for scene in scenes} == {(320, 320), (256, 320), (320, 256)}


def test_blob_is_painted_where_its_centre_says():
    canvas = np.zeros((40, 40), np.uint8)
    Blob(np.array([[20.3, 15.6]]), np.array([5.0]), (0, 0, 0)).paint(canvas, 255, cv2.LINE_AA)
    rows, columns = np.indices(canvas.shape)
    assert (columns * canvas).sum() / canvas.sum() == pytest.approx(20.3, abs=0.1)
    assert (rows * canvas).sum() / canvas.sum() == pytest.approx(15.6, abs=0.1)


def test_keypoint_lies_on_the_middle_of_its_nose(scenes):
    checked = 0
    for scene, (index, figure) in ((s, it) for s in scenes[:30] for it in enumerate(s.figures)):
        nose = next(b for b in figure.blobs if np.array_equal(b.centres[0], figure.keypoints[0]))
        without = replace(figure, blobs=[blob for blob in figure.blobs if blob is not nose])
        figures = [*scene.figures[:index], without, *scene.figures[index + 1 :]]
        pictures = [
            paint_picture(np.random.default_rng(0), s)
            for s in (scene, replace(scene, figures=figures))
        ]
        rows, columns = np.nonzero((pictures[0] != pictures[1]).any(axis=2))
        whole = np.zeros((scene.height, scene.width), np.uint8)
        nose.paint(whole, 255, cv2.LINE_AA)
        reach = nose.radii[0] + 1
        inside = (figure.keypoints[0] > reach).all() and (
            figure.keypoints[0] < [scene.width - 1 - reach, scene.height - 1 - reach]
        ).all()
        if inside and len(rows) > 0.95 * np.count_nonzero(whole):  # not covered by anything
            assert [columns.mean(), rows.mean()] == pytest.approx(figure.keypoints[0], abs=0.5)
            checked += 1
    assert checked > 25


def test_visibility_tells_what_covers_a_keypoint(scenes):
    covered_by_figure = covered_by_clutter = covered_by_itself = outside = 0
    for scene in scenes:
        labels = paint_labels(scene)
        together = visibility(scene, labels)
        for index, figure in enumerate(scene.figures):
            alone = replace(scene, figures=[figure], in_front=[])
            (flags_alone,) = visibility(alone, paint_labels(alone))
            for point, v, v_alone in zip(
                figure.keypoints, together[index], flags_alone, strict=True
            ):
                inside = (point >= 0).all() and (point <= (scene.width - 1, scene.height - 1)).all()
                assert (v > 0) == inside
                if not inside:
                    outside += 1
                    continue
                column, row = np.rint(point).astype(int)
                label = labels[row, column]
                if v == 2:
                    assert v_alone == 2
                    assert owner(label) == index
                elif v_alone == 1:
                    covered_by_itself += 1
                elif label == CLUTTER:
                    covered_by_clutter += 1
                else:
                    assert owner(label) > index  # a nearer figure
                    covered_by_figure += 1
    assert min(covered_by_figure, covered_by_clutter, covered_by_itself, outside) > 30


def test_faces_are_seen_from_the_front_and_hidden_from_behind():
    body = np.zeros((synthetic.NUM_POINTS, 3))
    body[:5] = synthetic.SKULL_RADIUS * synthetic.FACE_SHAPE * [1, -1, 1]
    body[synthetic.FACE, 2] = 0.35 * synthetic.SKULL_RADIUS
    for turn, seen in ((1, [True] * 5), (-1, [False] * 3 + [True] * 2)):
        figure = synthetic.dress(np.random.default_rng(0), 100 * body * [turn, 1, turn], 100.0)
        assert figure.exposed[:5].tolist() == seen
        assert (
            figure.keypoints[1, 0] * turn > 0
        )  # the left eye: on the image's right from the front


def test_left_limbs_are_blue_and_right_limbs_orange(scenes):
    checked = 0
    for scene in scenes[:80]:
        labels = paint_labels(scene)
        picture = paint_picture(np.random.default_rng(0), scene).astype(int)
        limbs = ((5, 7, synthetic.UPPER_ARM), (11, 13, synthetic.THIGH), (13, 15, synthetic.SHIN))
        for (index, figure), limb, side in itertools.product(
            enumerate(scene.figures), limbs, (0, 1)
        ):
            i, j, part = limb[0] + side, limb[1] + side, limb[2][side]
            column, row = np.rint(figure.keypoints[[i, j]].mean(axis=0)).astype(int)
            around = labels[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            length = np.linalg.norm(np.diff(figure.keypoints[[i, j]], axis=0))
            if length < 0.15 * np.ptp(figure.keypoints, axis=0).max():
                continue  # seen from its end: the markers of its joints cover it
            if around.size == 9 and (around == 1 + NUM_PARTS * index + part).all():
                blue, _, red = picture[row, column]
                assert (blue > red) == KEYPOINT_NAMES[i].startswith("left")
                checked += 1
    assert checked > 500


def test_annotations_agree_with_the_label_map():
    for seed in range(40):
        scene = sample_scene(np.random.default_rng(seed), 320)
        labels = paint_labels(scene)
        flags = visibility(scene, labels)
        for index, annotation in enumerate(synthetic.annotate(scene, labels)):
            is_person = (labels != 0) & (labels != CLUTTER) & (owner_map(labels) == index)
            assert annotation["area"] == is_person.sum()
            if is_person.any():
                rows, columns = np.nonzero(is_person)
                x, y, width, height = annotation["bbox"]
                assert (x, y) == (columns.min(), rows.min())
                assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
            keypoints = np.array(annotation["keypoints"]).reshape(17, 3)
            assert keypoints[:, 2].tolist() == flags[index].tolist()
            assert not keypoints[flags[index] == 0].any()
            assert annotation["num_keypoints"] == (flags[index] > 0).sum()


def owner_map(labels):
    return (labels.astype(int) - 1) // NUM_PARTS


def test_nobody_almost_hidden_is_in_the_picture():
    for index in range(40):
        _, annotations = make_image(0, "val", index)
        assert 1 <= len(annotations) <= synthetic.MAX_PEOPLE
        for annotation in annotations:
            assert annotation["keypoints"][2::3].count(2) >= MIN_VISIBLE_KEYPOINTS


def test_json_is_coco(json_file):
    coco = COCO(str(json_file))
    assert len(coco.imgs) == 12
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    (category,) = coco.loadCats(coco.getCatIds())
    assert category["keypoints"] == list(
        MetadataCatalog.get("keypoints_coco_2017_val").keypoint_names
    )
    names = MetadataCatalog.get("keypoints_coco_2017_val").keypoint_names
    for i, j in category["skeleton"]:  # 1-based
        assert {names[i - 1], names[j - 1]} != {names[i - 1]}
    for image in coco.imgs.values():
        picture = cv2.imread(str(json_file.parents[1] / "val" / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
        assert max(picture.shape) == SIZE


def test_detectron2_loads_the_json(json_file):
    records = load_coco_json(str(json_file), str(json_file.parents[1] / "val"))
    raw = json.loads(json_file.read_text())
    assert [len(record["annotations"]) for record in records] == [
        sum(person["image_id"] == image["id"] for person in raw["annotations"])
        for image in raw["images"]
    ]
    keypoint = np.array(records[0]["annotations"][0]["keypoints"][:2])
    assert keypoint == pytest.approx(np.array(raw["annotations"][0]["keypoints"][:2]) + 0.5)


def test_truth_scores_100(json_file):
    coco = COCO(str(json_file))
    results = [
        {key: person[key] for key in ("image_id", "category_id", "keypoints")} | {"score": 1.0}
        for person in coco.anns.values()
    ]
    evaluation = COCOeval(coco, coco.loadRes(results), "keypoints")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_same_request_keeps_the_set_and_another_makes_it_again(tmp_path, monkeypatch):
    first = build_synthetic_people(tmp_path, "train", 3, SIZE, num_workers=1)
    before = files_of(first, "train")
    monkeypatch.setattr(synthetic, "make_image", None)
    build_synthetic_people(tmp_path, "train", 3, SIZE, num_workers=1)
    monkeypatch.undo()
    for request in ((2, SIZE, 0), (2, SIZE, 1), (2, 128, 1)):
        again = build_synthetic_people(tmp_path, "train", *request, num_workers=1)
        assert again == first
        files = files_of(again, "train")
        assert len(files) == 3
        assert files != before
        before = files
    monkeypatch.setattr(synthetic, "GENERATOR_VERSION", -1)
    build_synthetic_people(tmp_path, "train", *request, num_workers=1)
    assert json.loads(first.read_text())["info"]["version"] == -1


def test_interrupted_build_leaves_what_was_there(tmp_path, monkeypatch):
    def interrupted(seed, split, index, image_size):
        if index == 2:
            raise KeyboardInterrupt
        return make_image(seed, split, index, image_size)

    def build(num_images):
        return build_synthetic_people(tmp_path, "val", num_images, SIZE, num_workers=1)

    json_path = tmp_path / "synthetic_people" / "annotations" / "person_keypoints_val.json"
    monkeypatch.setattr(synthetic, "make_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(4)
    assert not json_path.exists()
    build(2)
    before = files_of(json_path)
    with pytest.raises(KeyboardInterrupt):
        build(4)
    assert files_of(json_path) == before
    monkeypatch.undo()
    assert len(files_of(build(4))) == 5


def test_builds_at_the_same_time_make_one_set(tmp_path, monkeypatch):
    calls = []
    write_split = synthetic._write_split
    monkeypatch.setattr(
        synthetic, "_write_split", lambda *args: (calls.append(args), write_split(*args))
    )
    with ThreadPoolExecutor(2) as executor:
        futures = [
            executor.submit(build_synthetic_people, tmp_path, "val", 3, SIZE, 0, 1)
            for _ in range(2)
        ]
    assert len({future.result() for future in futures}) == 1
    assert len(calls) == 1


def test_failing_process_is_reported(tmp_path):
    job = synthetic.Job(str(tmp_path / "missing"), "val", 2, SIZE, 0)
    with pytest.raises(RuntimeError, match="ended with code 1"):
        list(synthetic._run_in_processes(job, 1))


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train, val, holdout"):
        build_synthetic_people(tmp_path, "test")


def test_registered_sets_are_built_when_first_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "SPLITS", {"train": 3, "val": 2, "holdout": 1})
    for split in ("train", "val", "holdout", "train_noisy", "train_partial"):
        name = f"synthetic_people_{split}"
        monkeypatch.delitem(DatasetCatalog.data, name)
        monkeypatch.delitem(MetadataCatalog.data, name)
    register_synthetic_people(str(tmp_path))
    assert not list(tmp_path.iterdir())
    COCOEvaluator("synthetic_people_val", tasks=("keypoints",), output_dir=str(tmp_path / "out"))
    metadata = MetadataCatalog.get("synthetic_people_val")
    assert len(json.loads(Path(metadata.json_file).read_text())["images"]) == 2
    assert len(DatasetCatalog.get("synthetic_people_val")) == 2
    assert len(DatasetCatalog.get("synthetic_people_holdout")) == 1
    records = DatasetCatalog.get("synthetic_people_train")
    assert [cv2.imread(record["file_name"]) is not None for record in records] == [True] * 3
    for variant in ("noisy", "partial"):
        same = DatasetCatalog.get(f"synthetic_people_train_{variant}")
        assert [x["file_name"] for x in same] == [x["file_name"] for x in records]
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes == ["person"]
    assert metadata.keypoint_names == KEYPOINT_NAMES
    assert len(metadata.keypoint_flip_map) == 8


def test_command_line_writes_a_set(tmp_path, monkeypatch):
    arguments = f"--output {tmp_path} --split val --num-images 2"
    monkeypatch.setattr(sys, "argv", ["synthetic", *arguments.split()])
    synthetic.main()
    assert len(list((tmp_path / "synthetic_people" / "val").iterdir())) == 2


def pairs_of_poses(other_file):
    """Each person with other labels and with the true ones, and both poses taken out of them."""
    other, true = (
        json.loads(path.read_text())
        for path in (other_file, other_file.with_name("person_keypoints_train.json"))
    )
    people = list(zip(other.pop("annotations"), true.pop("annotations"), strict=True))
    assert other == true  # pictures and all else
    for pair in people:
        yield (*pair, *(np.array(x.pop("keypoints")).reshape(17, 3) for x in pair))


def test_noisy_keypoints_are_as_far_off_as_those_of_cocos_annotators(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic.SPLITS, "train", 16)
    noisy_file = build_noisy_people(tmp_path)
    assert noisy_file.name == "person_keypoints_train_noisy.json"
    errors = []
    for person, true_person, found, truth in pairs_of_poses(noisy_file):
        assert person == true_person
        labelled = truth[:, 2] > 0
        assert np.array_equal(found[:, 2], truth[:, 2])
        assert not found[~labelled].any()
        assert found.min() >= 0
        square = ((found - truth)[:, :2] ** 2).sum(axis=1) / true_person["area"]
        errors.extend((square / np.array(COCO_SIGMAS) ** 2)[labelled])
    # E[d^2 / area] is sigma^2, but for the keypoints that are kept inside the image.
    assert np.mean(errors) == pytest.approx(1, abs=0.15)
    text = noisy_file.read_bytes()
    assert build_noisy_people(tmp_path).read_bytes() == text


def test_a_third_of_the_labels_of_each_person_are_gone_and_all_else_stays(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic.SPLITS, "train", 8)
    partial_file = build_partial_people(tmp_path)
    assert partial_file.name == "person_keypoints_train_partial.json"
    for person, whole_person, left, all_of_them in pairs_of_poses(partial_file):
        stays, labelled = left[:, 2] > 0, all_of_them[:, 2] > 0
        count = person.pop("num_keypoints")
        assert count == stays.sum() == labelled.sum() - labelled.sum() // 3
        assert whole_person.pop("num_keypoints") == labelled.sum()
        assert (left[stays] == all_of_them[stays]).all()
        assert not left[~stays].any()
        assert person == whole_person  # box, area and all else
        # A straight line parts those that stay from those that go.
        turns = np.deg2rad(np.arange(0, 360, 1))
        across = all_of_them[:, :2] @ np.stack([np.cos(turns), np.sin(turns)])
        gone = labelled & ~stays
        assert (across[stays].max(axis=0) < across[gone].min(axis=0) + 0.5).any()
    assert build_partial_people(tmp_path).read_bytes() == partial_file.read_bytes()
