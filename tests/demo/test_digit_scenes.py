"""Scenes of digits with COCO annotations and semantic masks."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from demo.digit_scenes import MIN_VISIBLE, NUM_DIGITS, SPLITS, main, write_scenes
from demo.digits import split_digits

SETTINGS = {"size": 64, "train": 30, "val": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("digit_scenes")
    assert write_scenes(root, **SETTINGS)
    return root


@pytest.fixture(scope="module", params=SPLITS)
def split(request):
    return request.param


@pytest.fixture(scope="module")
def coco(folder, split):
    return read(folder, split)


def read(folder, split):
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.*"))}


def decode_rle(rle):
    pixels = np.repeat(np.arange(len(rle["counts"])) % 2, rle["counts"])
    return pixels.reshape(rle["size"][::-1]).T


def test_files_of_every_scene(folder, split, coco):
    stems = [f"{i:05d}" for i in range(SETTINGS[split])]
    assert [image["file_name"] for image in coco["images"]] == [f"{stem}.jpg" for stem in stems]
    for kind, suffix, mode in (("images", "jpg", "RGB"), ("semantic", "png", "P")):
        paths = sorted((folder / kind / split).iterdir())
        assert [path.name for path in paths] == [f"{stem}.{suffix}" for stem in stems]
        assert {(image.mode, image.size) for image in map(Image.open, paths)} == {(mode, (64, 64))}


def test_annotations_follow_coco(coco):
    annotations, labels = coco["annotations"], load_digits().target
    assert [(c["id"], c["name"]) for c in coco["categories"]] == list(enumerate("0123456789", 1))
    assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
    assert all(a["iscrowd"] == 0 and a["category_id"] == labels[a["scan"]] + 1 for a in annotations)
    for instance in annotations:
        y, x = np.nonzero(decode_rle(instance["segmentation"]))
        assert instance["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert instance["area"] == len(x) > 0
    shares = np.array([a["visible"] for a in annotations])
    assert MIN_VISIBLE <= shares.min() < 1 == shares.max()


def test_semantic_mask_is_the_disjoint_union_of_instances(folder, split, coco):
    counts = set()
    for image in coco["images"]:
        instances = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        masks = np.array([decode_rle(instance["segmentation"]) for instance in instances])
        assert masks.sum(axis=0).max() == 1
        with Image.open(folder / "semantic" / split / f"{image['id']:05d}.png") as mask:
            assert np.array_equal(mask, np.tensordot([a["category_id"] for a in instances], masks, axes=1))
        counts.add(len(instances))
    assert counts <= set(range(NUM_DIGITS[0], NUM_DIGITS[1] + 1)) and len(counts) > 1


def test_splits_share_no_scan_and_no_background(folder):
    members, columns = split_digits(load_digits().target), {}
    for split in SPLITS:
        coco = read(folder, split)
        assert {a["scan"] for a in coco["annotations"]} <= set(members[split])
        boxes = [image["photo_box"] for image in coco["images"]]
        columns[split] = {column for x, _, width, _ in boxes for column in range(x, x + width)}
    assert columns["train"].isdisjoint(columns["val"])


def test_scenes_are_deterministic_and_do_not_depend_on_their_number(folder, tmp_path):
    write_scenes(tmp_path, **SETTINGS)
    assert content(tmp_path) == content(folder)
    write_scenes(tmp_path, size=64, train=4, val=1)
    files = {path: data for path, data in content(tmp_path).items() if path.suffix != ".json"}
    assert len(files) == 2 * 5 and files.items() <= content(folder).items()


def test_incomplete_scenes_are_written_again_and_other_files_are_kept(tmp_path, monkeypatch, capsys):
    other = tmp_path / "images" / "train" / "holiday.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"sunset")
    monkeypatch.setattr(sys, "argv", ["", "--output", str(tmp_path), "--train", "3", "--val", "2"])
    main()
    assert "3 train, 2 val scenes" in capsys.readouterr().out
    before = content(tmp_path)
    assert not write_scenes(tmp_path, train=3, val=2)
    (tmp_path / "annotations" / "val.json").unlink()
    main()
    assert content(tmp_path) == before and other.read_bytes() == b"sunset"
