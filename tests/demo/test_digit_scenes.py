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
    semantic_mask,
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


def test_files_and_entries_of_every_scene(folder, split, coco):
    stems = [f"{i:05d}" for i in range(SETTINGS[split])]
    assert [image["file_name"] for image in coco["images"]] == [f"{stem}.jpg" for stem in stems]
    assert sorted(path.name for path in (folder / "images" / split).iterdir()) == [f"{stem}.jpg" for stem in stems]
    assert sorted(path.name for path in (folder / "semantic" / split).iterdir()) == [f"{stem}.png" for stem in stems]
    for image in coco["images"]:
        with Image.open(folder / "images" / split / image["file_name"]) as file:
            assert (file.mode, file.size) == ("RGB", (image["width"], image["height"])) == ("RGB", (64, 64))


def test_ids_follow_coco(coco):
    assert [category["id"] for category in coco["categories"]] == list(range(1, 11))
    assert [category["name"] for category in coco["categories"]] == list("0123456789")
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    assert all(a["iscrowd"] == 0 for a in coco["annotations"])


def test_category_is_the_label_of_the_scan(coco):
    labels = load_digits().target
    assert all(a["category_id"] == labels[a["scan"]] + 1 for a in coco["annotations"])


def test_number_of_digits(coco):
    counts = {len(instances) for instances in instances_by_image(coco).values()}
    assert counts <= set(range(NUM_DIGITS[0], NUM_DIGITS[1] + 1)) and len(counts) > 1


def test_box_and_area_match_the_mask(coco):
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


def test_area_excludes_occlusion():
    for _, digits, _ in map(Composer("train", size=64).compose, range(10)):
        assert digits[-1].mask.sum() == digits[-1].area
        assert all(digit.mask.sum() <= digit.area for digit in digits)


@pytest.mark.parametrize(
    "x, legible", [(8, False), (16, False), (17, True), (40, True)]
)  # overlap: 100 %, 20 %, 10 %, none
def test_overlap_of_boxes_is_limited(x, legible):
    assert is_legible(square_digit(8, 8, side=10), square_digit(x, 8, side=10)) == legible


def test_occlusion_by_several_digits_is_limited():
    digit = square_digit(8, 8, side=10)
    digit.mask[8:12] = False  # 40 % are hidden already
    assert is_legible(digit, square_digit(8, 40, side=10))
    assert not is_legible(digit, square_digit(8, 17, side=10))


def test_splits_share_no_scan(folder):
    members = split_digits(load_digits().target)
    for split in SPLITS:
        assert {a["scan"] for a in read(folder, split)["annotations"]} <= set(members[split])


def test_splits_share_no_background(folder):
    columns = {}
    for split in SPLITS:
        boxes = [image["photo_box"] for image in read(folder, split)["images"]]
        columns[split] = {column for x, _, width, _ in boxes for column in range(x, x + width)}
    assert columns["train"].isdisjoint(columns["val"])


def test_background_matches_the_annotations(split):
    for pixels, digits, origin in map(Composer(split, size=64).compose, range(5)):
        x, y, width, height = origin["photo_box"]
        photo = Image.fromarray(load_sample_image(origin["photo"]))
        square = photo.crop((x, y, x + width, y + height)).resize((64, 64), Image.Resampling.BICUBIC)
        square = (0.3 * np.array(square)).round()
        near_digit = np.array(Image.fromarray(np.array(semantic_mask(digits))).filter(ImageFilter.MaxFilter(5))) > 0
        assert np.array_equal(pixels[~near_digit], square[~near_digit])
        assert not near_digit.all()


def test_two_runs_write_the_same_bytes(folder, tmp_path):
    write_scenes(tmp_path, **SETTINGS)
    assert content(tmp_path) == content(folder)


def test_incomplete_scenes_are_written_again(tmp_path):
    settings = {"size": 64, "train": 3, "val": 2}
    assert write_scenes(tmp_path, **settings)
    before = content(tmp_path)
    assert not write_scenes(tmp_path, **settings)
    (tmp_path / "annotations" / "val.json").unlink()
    assert write_scenes(tmp_path, **settings)
    assert content(tmp_path) == before


def test_other_files_are_kept(tmp_path):
    other = tmp_path / "images" / "train" / "holiday.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"sunset")
    assert write_scenes(tmp_path, size=64, train=1, val=1)
    assert other.read_bytes() == b"sunset"


def test_scenes_do_not_depend_on_their_number(folder, tmp_path):
    write_scenes(tmp_path, size=64, train=40, val=1)
    write_scenes(tmp_path, size=64, train=4, val=1)
    files = {path: data for path, data in content(tmp_path).items() if path.suffix != ".json"}
    assert len(files) == 2 * 5
    assert files.items() <= content(folder).items()


@pytest.mark.parametrize(
    "mask, counts",
    [([[0, 0], [0, 0]], [4]), ([[1, 1], [1, 1]], [0, 4]), ([[0, 1, 0], [1, 1, 0]], [1, 3, 2]), ([[1, 0]], [0, 1, 1])],
)
def test_run_lengths_are_column_by_column(mask, counts):
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
def test_glyph_has_the_size_of_the_scan(angle):
    glyph = draw_glyph(np.full((8, 8), 16.0), side=40, angle=angle)  # four pixels per pixel of the scan, and a margin
    assert glyph.shape == pytest.approx((32, 32), abs=2)
    assert glyph.sum() == pytest.approx(32 * 32, rel=0.03)


def test_ink_is_brighter_than_any_background():
    inks = [choose_ink(np.random.default_rng(seed)) for seed in range(50)]
    assert min(ink @ LUMINANCE for ink in inks) > 0.3 * 255 + 48
    assert len({tuple(ink) for ink in inks}) == 50


def test_command(tmp_path, monkeypatch, capsys):
    arguments = ["--output", str(tmp_path), "--train", "2", "--val", "1"]
    monkeypatch.setattr(sys, "argv", ["digit_scenes.py", *arguments])
    main()
    assert capsys.readouterr().out == f"{tmp_path}: 2 train, 1 val scenes, written\n"


@pytest.mark.parametrize("arguments", [["--train", "0"], ["--val", "-1"]])
def test_command_rejects_invalid_numbers(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digit_scenes.py", "--output", str(tmp_path / "scenes"), *arguments])
    with pytest.raises(SystemExit):
        main()
    assert "must be 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "scenes").exists()
