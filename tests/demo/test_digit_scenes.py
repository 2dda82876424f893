import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits, load_sample_image

from demo.digit_scenes import (
    LUMINANCE,
    MIN_VISIBLE,
    NUM_DIGITS,
    SPLITS,
    Composer,
    Digit,
    choose_ink,
    draw_glyph,
    encode_rle,
    is_legible,
    main,
    write_scenes,
)
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
    pixels, value = [], 0
    for count in rle["counts"]:
        pixels += count * [value]
        value = 1 - value
    height, width = rle["size"]
    return np.array(pixels).reshape(width, height).T


def instances_by_image(coco):
    return {image["id"]: [a for a in coco["annotations"] if a["image_id"] == image["id"]] for image in coco["images"]}


def square_digit(x, y, side):
    mask = np.zeros((64, 64), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return Digit(scan=0, category=1, area=side * side, mask=mask)


def test_every_scene_has_its_files_and_its_entry(folder, split, coco):
    stems = [f"{i:05d}" for i in range(SETTINGS[split])]
    assert [image["file_name"] for image in coco["images"]] == [f"{stem}.jpg" for stem in stems]
    assert sorted(path.name for path in (folder / "images" / split).iterdir()) == [f"{stem}.jpg" for stem in stems]
    assert sorted(path.name for path in (folder / "semantic" / split).iterdir()) == [f"{stem}.png" for stem in stems]
    for image in coco["images"]:
        with Image.open(folder / "images" / split / image["file_name"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (image["width"], image["height"])) == ("RGB", (64, 64))


def test_ids_are_those_that_coco_tools_expect(coco):
    assert [category["id"] for category in coco["categories"]] == list(range(1, 11))
    assert [category["name"] for category in coco["categories"]] == list("0123456789")
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    assert all(a["iscrowd"] == 0 for a in coco["annotations"])


def test_instance_is_labelled_as_its_scan(coco):
    labels = load_digits().target
    assert all(a["category_id"] == labels[a["scan"]] + 1 for a in coco["annotations"])


def test_scene_holds_its_share_of_digits(coco):
    counts = {len(instances) for instances in instances_by_image(coco).values()}
    assert counts <= set(range(NUM_DIGITS[0], NUM_DIGITS[1] + 1)) and len(counts) > 1


def test_box_and_area_are_those_of_the_mask(coco):
    for instance in coco["annotations"]:
        y, x = np.nonzero(decode_rle(instance["segmentation"]))
        assert instance["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert instance["area"] == len(x) > 0


def test_semantic_mask_is_the_disjoint_union_of_instances(folder, split, coco):
    for i, instances in instances_by_image(coco).items():
        masks = np.array([decode_rle(instance["segmentation"]) for instance in instances])
        assert masks.sum(axis=0).max() == 1
        with Image.open(folder / "semantic" / split / f"{i:05d}.png") as image:
            assert image.mode == "P"
            assert np.array_equal(image, np.tensordot([a["category_id"] for a in instances], masks, axes=1))


def test_most_of_every_digit_is_visible(coco):
    shares = np.array([a["visible"] for a in coco["annotations"]])
    assert MIN_VISIBLE <= shares.min() < 1 == shares.max()


def test_visible_share_is_of_the_whole_digit():
    for digits in (Composer("train", size=64).compose(i).digits for i in range(10)):
        assert digits[-1].mask.sum() == digits[-1].area
        assert all(digit.mask.sum() <= digit.area for digit in digits)


@pytest.mark.parametrize("x, legible", [(8, False), (16, False), (17, True), (40, True)])  # in all, 20 %, 10 %, nowhere
def test_boxes_overlap_by_a_tenth_at_most(x, legible):
    assert is_legible(square_digit(8, 8, side=10), square_digit(x, 8, side=10)) == legible


def test_digit_is_not_covered_bit_by_bit():
    digit = square_digit(8, 8, side=10)
    digit.mask[8:12] = False  # the upper 40 %, by others
    assert is_legible(digit, square_digit(8, 40, side=10))
    assert not is_legible(digit, square_digit(8, 17, side=10))


def test_splits_share_no_scan(folder):
    members = split_digits(load_digits().target)
    for split in SPLITS:
        assert {a["scan"] for a in read(folder, split)["annotations"]} <= set(members[split])


def test_splits_share_no_background(folder):
    columns = {}
    for split in SPLITS:
        boxes = [image["photograph_box"] for image in read(folder, split)["images"]]
        columns[split] = {column for x, _, width, _ in boxes for column in range(x, x + width)}
    assert columns["train"].isdisjoint(columns["val"])


def test_background_is_what_the_annotations_name(split):
    composer = Composer(split, size=64)
    for scene in map(composer.compose, range(5)):
        x, y, width, height = scene.photograph_box
        photograph = Image.fromarray(load_sample_image(scene.photograph))
        square = photograph.crop((x, y, x + width, y + height)).resize((64, 64), Image.Resampling.BICUBIC)
        square = (0.3 * np.array(square)).round()
        near_digit = np.array(Image.fromarray(scene.semantic_mask()).filter(ImageFilter.MaxFilter(5))) > 0
        assert np.array_equal(scene.pixels[~near_digit], square[~near_digit])
        assert not near_digit.all()


def test_two_runs_write_the_same_bytes(folder, tmp_path):
    write_scenes(tmp_path, **SETTINGS)
    assert content(tmp_path) == content(folder)


def test_complete_set_is_left_alone_and_any_other_is_written(tmp_path):
    settings = {"size": 64, "train": 3, "val": 2}
    assert write_scenes(tmp_path, **settings)
    before = content(tmp_path)
    assert not write_scenes(tmp_path, **settings)
    (tmp_path / "semantic" / "val" / "00001.png").unlink()
    assert write_scenes(tmp_path, **settings)
    assert content(tmp_path) == before


def test_pictures_of_others_stay(tmp_path):
    other = tmp_path / "images" / "train" / "holiday.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"sunset")
    assert write_scenes(tmp_path, size=64, train=1, val=1)
    assert other.read_bytes() == b"sunset"


def test_smaller_set_is_the_beginning_of_the_larger_one(folder, tmp_path):
    write_scenes(tmp_path, size=64, train=40, val=1)
    write_scenes(tmp_path, size=64, train=4, val=1)
    pictures = {path: data for path, data in content(tmp_path).items() if path.suffix != ".json"}
    assert len(pictures) == 2 * 5
    assert pictures.items() <= content(folder).items()


@pytest.mark.parametrize(
    "mask, counts",
    [([[0, 0], [0, 0]], [4]), ([[1, 1], [1, 1]], [0, 4]), ([[0, 1, 0], [1, 1, 0]], [1, 3, 2]), ([[1, 0]], [0, 1, 1])],
)
def test_run_lengths_go_down_the_columns(mask, counts):
    mask = np.array(mask, dtype=bool)
    assert encode_rle(mask) == {"size": list(mask.shape), "counts": counts}
    assert np.array_equal(decode_rle(encode_rle(mask)), mask)


def test_pycocotools_reads_the_annotations(folder, split, coco):
    pycocotools = pytest.importorskip("pycocotools.coco")
    dataset = pycocotools.COCO(folder / "annotations" / f"{split}.json")
    for instance in dataset.loadAnns(dataset.getAnnIds()):
        assert np.array_equal(dataset.annToMask(instance), decode_rle(instance["segmentation"]))
    assert len(dataset.getAnnIds()) == len(coco["annotations"])


@pytest.mark.parametrize("angle", [0, 90, -90])
def test_glyph_fills_what_the_scan_inks(angle):
    glyph = draw_glyph(np.full((8, 8), 16.0), side=40, angle=angle)  # four pixels per scanned one, and a margin
    assert glyph.shape == pytest.approx((32, 32), abs=2)
    assert glyph.sum() == pytest.approx(32 * 32, rel=0.03)


def test_ink_is_lighter_than_any_background():
    inks = [choose_ink(np.random.default_rng(seed)) for seed in range(50)]
    assert min(ink @ LUMINANCE for ink in inks) > 0.3 * 255 + 48
    assert len({tuple(ink) for ink in inks}) == 50


def test_command_writes_the_set(tmp_path, monkeypatch, capsys):
    arguments = ["--output", str(tmp_path), "--train", "2", "--val", "1"]
    monkeypatch.setattr(sys, "argv", ["digit_scenes.py", *arguments])
    main()
    assert capsys.readouterr().out == f"{tmp_path}: 2 train, 1 val scenes\n"


@pytest.mark.parametrize("arguments", [["--train", "0"], ["--val", "-1"]])
def test_command_refuses_what_it_cannot_make(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digit_scenes.py", "--output", str(tmp_path / "scenes"), *arguments])
    with pytest.raises(SystemExit):
        main()
    assert "start at 1" in capsys.readouterr().err
    assert not (tmp_path / "scenes").exists()
