"""Masks of segmentation: which file belongs to which image, what its values mean, and what is refused."""

import io
import logging
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import encoded
from PIL import Image

from tinymim_jax.data.masks.class_files import classes_text, read_classes
from tinymim_jax.data.masks.classes import class_colours, class_names, distinct_colours
from tinymim_jax.data.masks.known import KNOWN, known_set
from tinymim_jax.data.masks.rules import MaskRules
from tinymim_jax.data.masks.source import open_masks
from tinymim_jax.data.prepare.prepare import prepare_images, read_report
from tinymim_jax.data.prepare.shards import Conversion
from tinymim_jax.data.sources.examples import MaskClass, Source
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.sources.sources import open_source, splits
from tinymim_jax.data.views.decoding import Undecodable

PICTURE = encoded(np.full((4, 6, 3), 90, np.uint8), "PNG")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TINYMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


def mask(*values: int, mode: str = "L") -> bytes:
    """A mask of 4 x 6 pixels, whose left half has the first value and whose right half the last."""
    pixels = np.full((4, 6), values[0], np.uint16 if mode == "I;16" else np.uint8)
    pixels[:, 3:] = values[-1]
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.convert("P")
        image.putpalette([7] * 768)
    return encoded(image, "PNG")


def put(root, *names, content=None):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content or (PICTURE if name.endswith(".jpg") else mask(0, 1)))


def pairs_of(location, split):
    source = open_source(f"pairs:{location}", split=split)
    root = str(location).partition("::")[0]
    return {tuple(p.removeprefix(root).lstrip("/") for p in source.paths(i)) for i in range(len(source))}


LAYOUTS = {
    "ADEChallengeData2016": (
        [f"{kind}/{split}/{n}.{end}" for kind, end in (("images", "jpg"), ("annotations", "png"))
         for split in ("training", "validation") for n in "ab"],
        "train",
        {(f"images/training/{n}.jpg", f"annotations/training/{n}.png") for n in "ab"},
        ["training", "validation"],
    ),
    "Cityscapes": (
        [f"leftImg8bit/{s}/aachen/aachen_0_1_leftImg8bit.png" for s in ("train", "val")]
        + [f"gtFine/{s}/aachen/aachen_0_1_gtFine_{k}.png" for s in ("train", "val")
           for k in ("labelIds", "color", "instanceIds")],
        "val",
        {("leftImg8bit/val/aachen/aachen_0_1_leftImg8bit.png", "gtFine/val/aachen/aachen_0_1_gtFine_labelIds.png")},
        ["train", "val"],
    ),
    "CamVid of SegNet": (
        [f"{s}/{n}.png" for s in ("train", "trainannot", "val", "valannot") for n in "ab"],
        "train",
        {(f"train/{n}.png", f"trainannot/{n}.png") for n in "ab"},
        ["train", "val"],
    ),
    "CamVid of Kaggle": (
        [f"{s}/{n}.png" for s in ("train", "val") for n in "ab"]
        + [f"{s}_labels/{n}_L.png" for s in ("train", "val") for n in "ab"],
        "val",
        {(f"val/{n}.png", f"val_labels/{n}_L.png") for n in "ab"},
        ["train", "val"],
    ),
    "own, split first": (
        [f"{s}/{k}" for s in ("train", "test") for k in ("images/x.jpg", "masks/x.png")],
        "test",
        {("test/images/x.jpg", "test/masks/x.png")},
        ["test", "train"],
    ),
    "own, without splits": (
        ["images/a.1.jpg", "images/b 2.jpg", "masks/a.1.png", "masks/b 2.gif"],
        "all",
        {("images/a.1.jpg", "masks/a.1.png"), ("images/b 2.jpg", "masks/b 2.gif")},
        ["all"],
    ),
    "own, prefixes": (
        ["train/images/image_1.jpg", "train/images/image_12.jpg", "train/masks/mask_1.png", "train/masks/mask_12.png"],
        "train",
        {(f"train/images/image_{n}.jpg", f"train/masks/mask_{n}.png") for n in (1, 12)},
        ["train"],
    ),
    "side by side, prefixes": (
        ["img1.jpg", "label1.png", "img02.jpg", "label02.png", "image_x.jpg", "label_x.png"],
        "all",
        {("img1.jpg", "label1.png"), ("img02.jpg", "label02.png"), ("image_x.jpg", "label_x.png")},
        ["all"],
    ),
    "side by side": (
        ["benign (1).jpg", "benign (1)_mask.png", "10_sat.jpg", "10_mask.png"],
        "all",
        {("benign (1).jpg", "benign (1)_mask.png"), ("10_sat.jpg", "10_mask.png")},
        ["all"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_well_known_and_own_sets(layout, tmp_path):
    names, split, want, whole = LAYOUTS[layout]
    put(tmp_path, *names)
    put(tmp_path, ".DS_Store", "readme.txt", content=b"x")
    assert pairs_of(tmp_path, split) == want
    assert sorted(splits(f"pairs:{tmp_path}")) == whole


def test_lists_of_pascal_voc(tmp_path, caplog):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    put(root, *(f"JPEGImages/{n}.jpg" for n in "abcd"), *(f"SegmentationClass/{n}.png" for n in "abc"))
    put(root, "ImageSets/Segmentation/train.txt", content=b"a\nc\n")
    put(root, "ImageSets/Segmentation/val.txt", content=b"b\n")
    for location in (root, tmp_path):
        inside = "" if location == root else "VOCdevkit/VOC2012/"
        want = {(f"{inside}JPEGImages/{n}.jpg", f"{inside}SegmentationClass/{n}.png") for n in "ac"}
        assert pairs_of(location, "train") == want
    assert splits(f"pairs:{tmp_path}") == {"train": 2, "val": 1}


def test_two_named_folders(tmp_path):
    put(tmp_path, *(f"{s}/left/{n}.jpg" for s in ("train", "val") for n in "ab"))
    put(tmp_path, *(f"{s}/truth/{n}_{k}.png" for s in ("train", "val") for n in "ab" for k in ("ids", "view")))
    location = f"{tmp_path}/{{split}}/left::{tmp_path}/{{split}}/truth/*_ids.png"
    source = open_source(f"pairs:{location}", split="val")
    assert {source.paths(i)[1] for i in range(2)} == {f"{tmp_path}/val/truth/{n}_ids.png" for n in "ab"}
    assert splits(f"pairs:{location}") == {"train": 2, "val": 2}
    with pytest.raises(
        ValueError, match=r"masks of several kinds: \*_ids \(2\), \*_view \(2\); choose one by a pattern"
    ):
        open_source(f"pairs:{tmp_path}/val/left::{tmp_path}/val/truth", split="all")
    with pytest.raises(ValueError, match=r"put \{split\} into both folders"):
        open_source(f"pairs:{tmp_path}/val/left::{tmp_path}/val/truth/*_ids.png", split="val")


def test_what_is_missing_is_named(tmp_path, caplog):
    put(tmp_path, "images/a.jpg", "images/b.jpg", "masks/a.png", "masks/z.png")
    with pytest.raises(ValueError, match=r"1 of 2 images of split 'all' .* have no mask: images/b.jpg"):
        open_source(f"pairs:{tmp_path}", split="all")
    put(tmp_path, "masks/b.png")
    assert len(open_source(f"pairs:{tmp_path}", split="all")) == 2
    assert "1 masks or other files are not used, as they belong to no image" in caplog.text
    assert "it has another mask: masks/z.png" in caplog.text
    with pytest.raises(ValueError, match=r"split='train' .* is unknown, or has no masks; choices: all"):
        open_source(f"pairs:{tmp_path}", split="train")
    put(tmp_path / "padded", *(f"train/{name}" for name in ("images/001.jpg", "images/002.jpg", "masks/1.png")))
    with pytest.raises(
        ValueError, match=r"2 images such as train/images/001.jpg, and 1 masks such as train/masks/1.png. A mask is"
    ):
        open_source(f"pairs:{tmp_path / 'padded'}", split="train")
    put(tmp_path / "plain", "a.jpg", "b.jpg")
    with pytest.raises(ValueError, match=r"plain: no masks were found: .* pairs:IMAGES::MASKS"):
        open_source(f"pairs:{tmp_path / 'plain'}", split="all")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_source(f"pairs:{tmp_path / 'gone'}", split="all")


def test_a_test_split_without_masks_is_no_error_for_the_others(tmp_path):
    put(tmp_path, *(f"images/{s}/a.jpg" for s in ("train", "val", "test")))
    put(tmp_path, *(f"masks/{s}/a.png" for s in ("train", "val")))
    assert splits(f"pairs:{tmp_path}") == {"train": 1, "val": 1}
    with pytest.raises(ValueError, match=r"split='test' .* has no masks; choices: train, val"):
        open_source(f"pairs:{tmp_path}", split="test")


def test_two_masks_of_the_same_name(tmp_path, caplog):
    put(tmp_path, "images/a.jpg", "masks/a.gif", "masks/a.png")
    assert pairs_of(tmp_path, "all") == {("images/a.jpg", "masks/a.gif")}
    assert "1 masks or other files are not used" in caplog.text
    assert "masks/a.png" in caplog.text


def test_a_list_names_images_that_are_not_there(tmp_path, caplog):
    put(tmp_path, *(f"JPEGImages/{n}.jpg" for n in "ab"), *(f"SegmentationClass/{n}.png" for n in "ab"))
    put(tmp_path, "ImageSets/Segmentation/train.txt", content=b"a\nb\nc\nd\n")
    assert len(open_source(f"pairs:{tmp_path}", split="train")) == 2
    assert "2 images that the list of split 'train' names are not there: c, d" in caplog.text


def test_pairs_are_shuffled_by_name_and_picklable(tmp_path):
    put(tmp_path, *(f"{k}/{n:02}.{e}" for k, e in (("images", "jpg"), ("masks", "png")) for n in range(30)))
    put(tmp_path, "classes.txt", content=b"sky\nroad 128 64 128\n")
    source = open_source(f"pairs:{tmp_path}", split="all")
    order = [source.paths(i)[0][-6:-4] for i in range(30)]
    assert order != sorted(order)
    again = pickle.loads(pickle.dumps(source))
    assert [again.paths(i) for i in range(30)] == [source.paths(i) for i in range(30)]
    assert again.mask_classes == (MaskClass("sky", None), MaskClass("road", (128, 64, 128)))
    assert source.describe(0).startswith(f"{tmp_path}/images/") and "masks" in source.describe(0)  # noqa: PT018
    assert open_source(f"pairs:{tmp_path}", split="all[:50%]").mask_classes == source.mask_classes


@pytest.mark.parametrize(
    ("mode", "stored", "rules", "want"),
    [
        ("L", (0, 2), MaskRules(3), (0, 2)),
        ("L", (1, 255), MaskRules(3), (1, 255)),
        ("P", (0, 2), MaskRules(3), (0, 2)),  # indices, whatever the palette's colours
        ("L", (0, 3), MaskRules(3, reduce_zero_label=True), (255, 2)),
        ("L", (255, 1), MaskRules(3, reduce_zero_label=True), (255, 0)),
        ("L", (11, 10), MaskRules(11, ignore=(11,)), (255, 10)),
        ("L", (0, 255), MaskRules(2, label_map=((0, 0), (255, 1)), ignore=()), (0, 1)),
        ("L", (7, 6), MaskRules(19, label_map=known_set("cityscapes").label_map), (0, 255)),
        ("I;16", (299, 65535), MaskRules(300, ignore=(65535,)), (299, 65535)),
        ("I;16", (1, 2), MaskRules(3), (1, 2)),
    ],
)
def test_what_stored_values_mean(mode, stored, rules, want):
    labels = rules.labels(mask(*stored, mode=mode))
    assert labels.dtype == rules.dtype and labels.shape == (4, 6)  # noqa: PT018
    assert (labels[0, 0], labels[0, -1]) == want


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_greys_of_few_bits_are_read_as_they_are_stored(bits):
    """A PNG written byte by byte; Pillow itself would scale its values so that white is 255."""
    values = np.arange(8, dtype=np.uint8)[None] % 2**bits

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
    packed = np.packbits(np.unpackbits(values.reshape(-1, 1), axis=1)[:, -bits:]).tobytes()
    rows = zlib.compress(b"\0" + packed)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(MaskRules(16).labels(png), values)


def test_masks_of_colours(tmp_path):
    classes = (MaskClass("sky", (0, 0, 0)), MaskClass("car", (64, 0, 128)), MaskClass("car", (64, 128, 192)))
    rules = MaskRules(2, colours=(*classes, MaskClass("ignore", (1, 1, 1))))
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, 1], pixels[:, 2], pixels[:, 3] = (64, 0, 128), (64, 128, 192), (1, 1, 1)
    np.testing.assert_array_equal(rules.labels(encoded(pixels, "PNG"))[0], [0, 1, 1, 255])
    # A picture that is all sky is grey, but still coded by colours.
    rules = MaskRules(2, colours=(MaskClass("car", (64, 0, 128)), MaskClass("sky", (0, 0, 0))))
    assert (rules.labels(encoded(np.zeros((2, 2, 3), np.uint8), "PNG")) == 1).all()
    # Grey values that were saved as RGB.
    assert (MaskRules(3).labels(encoded(np.full((2, 2, 3), 2, np.uint8), "PNG")) == 2).all()
    with pytest.raises(LabelError, match=r"has 1 colours, on 25.0% of its pixels, that are no class: \(1, 1, 1\)"):
        rules.labels(encoded(pixels[:, [0, 1, 0, 3]], "PNG"))
    with pytest.raises(LabelError, match=r"no colours are known: give data.masks.classes a file"):
        MaskRules(3).labels(encoded(pixels, "PNG"))


def test_values_that_are_no_class():
    with pytest.raises(LabelError, match=r"none of the 3 classes, 50.0% of its pixels: 9"):
        MaskRules(3).labels(mask(0, 9))
    with pytest.raises(LabelError, match="is a JPEG"):
        MaskRules(3).labels(encoded(np.zeros((8, 8), np.uint8), "JPEG"))
    with pytest.raises(LabelError, match=r"mode 'F' from 0.5"):
        MaskRules(3).labels(encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF"))
    with pytest.raises(Undecodable):
        MaskRules(3).labels(mask(0, 1)[:40])
    with pytest.raises(ValueError, match="use one"):
        MaskRules(3, label_map=((0, 1),), reduce_zero_label=True)
    with pytest.raises(ValueError, match=r"\(4, 3\) maps to a class that does not exist"):
        MaskRules(3, label_map=((4, 3),))
    with pytest.raises(ValueError, match=r"data\.masks\.label_map: a mask cannot hold 70000"):
        MaskRules(3, label_map=((70_000, 1),))
    with pytest.raises(ValueError, match=r"data\.masks\.ignore: a mask cannot hold -1; values are 0 to 65,535"):
        MaskRules(3, ignore=(255, -1))


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("classes.txt", "# mine\nsky\nwide road\n", [("sky", None), ("wide road", None)]),
        ("a.txt", "128 64 128 Road\n0 0 0\tVoid\n", [("Road", (128, 64, 128)), ("Void", (0, 0, 0))]),
        ("b.txt", "road:128,64,128::\n", [("road", (128, 64, 128))]),
        ("class_dict.csv", "name,r,g,b\nAnimal,64,128,64\n", [("Animal", (64, 128, 64))]),
        ("objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tName\n1\t.15\t1\t2\twall;brick\n", [("wall", None, 1)]),
        (
            "coco.json",
            '[{"id": 1, "name": "person"}, {"id": 2, "name": "car"}]',
            [("person", None, 1), ("car", None, 2)],
        ),
        ("c.json", '["a", {"name": "b", "color": [1, 2, 3]}]', [("a", None), ("b", (1, 2, 3))]),
        ("d.json", '{"1": "b", "0": "a"}', [("a", None), ("b", None)]),
        ("e.json", '{"a": [1, 2, 3], "b": "#0a0b0c"}', [("a", (1, 2, 3)), ("b", (10, 11, 12))]),
        ("f.json", '{"classes": ["a", "b"]}', [("a", None), ("b", None)]),
        ("d.txt", "0: sky\n1: wide road\n", [("sky", None, 0), ("wide road", None, 1)]),
        ("e.txt", "0 sky 1 2 3\n1 road 4 5 6\n", [("sky", (1, 2, 3), 0), ("road", (4, 5, 6), 1)]),
        ("f.txt", "0 1 2 3 sky\n1 4 5 6 road\n", [("sky", (1, 2, 3), 0), ("road", (4, 5, 6), 1)]),
        ("g.txt", "sky #010203\n2 wheeler #040506\n", [("sky", (1, 2, 3)), ("2 wheeler", (4, 5, 6))]),
        ("g.csv", "id,name,color\n0,sky,#010203\n\n", [("sky", (1, 2, 3), 0)]),
    ],
)
def test_files_of_classes(name, text, want, tmp_path):
    (tmp_path / name).write_text(text)
    found = read_classes(str(tmp_path / name))
    assert found == tuple(MaskClass(*each) for each in want)
    (tmp_path / "again.txt").write_text(classes_text(found))
    assert class_names(read_classes(str(tmp_path / "again.txt"))) == class_names(found)
    assert [each.stored for each in read_classes(str(tmp_path / "again.txt"))] == [each.stored for each in found]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "", "names no class"),
        ("c.txt", "1 2 3\n", "line 1: '1 2 3' has no name"),
        ("c.txt", "a 1 2 300\n", "colour"),
        ("c.txt", "7 road\n8 pavement\n", "have the numbers 7, 8, .*data.masks.label_map"),
        ("c.csv", "name,id\nroad,1\nsky,0\n", "have the numbers 1, 0, .*data.masks.label_map"),
        ("c.json", '[{"name": "a", "id": 3}, {"name": "b", "id": 9}]', "have the numbers 3, 9, "),
        ("c.csv", "name,r,g,b\na,1,2,3\nb,4,5\nc,7,8,9\n", "line 3: fewer values than the 4 columns"),
        ("c.txt", "a 1 2 3\nb 4 5 6\nc 1 2 3\n", r"'a' and 'c' have the same colour \(1, 2, 3\)"),
        ("c.txt", "a\nb\na\n", "names 'a' twice"),
        ("c.json", "a\n", "is no JSON"),
        ("c.json", '{"1": "a", "2": "b"}', "are not 0 to 1; see data.masks.label_map"),
        ("c.json", '{"a": 3, "b": 4}', "3 is no colour"),
        ("c.yaml", "names: [a, b]", "write a text file with a class a line"),
    ],
)
def test_files_without_classes(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(str(tmp_path / name))


def test_a_file_that_numbers_its_classes_from_one(tmp_path, caplog):
    """ADE20K as downloaded: objectInfo150.txt counts from 1, and 0 in the masks is none of its classes."""
    caplog.set_level(logging.INFO)
    source = made(tmp_path, mask(0, 1), mask(2, 1))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tsky\n")
    masks = open_masks(open_source(f"pairs:{tmp_path}", split="all"))
    assert masks.class_names == ("wall", "sky")
    assert "numbers them from 1: the value 0 is ignored" in caplog.text
    found = {tuple(np.unique(masks[i]["pixel_labels"]).tolist()) for i in range(2)}
    assert found == {(0, 255), (0, 1)}
    assert open_masks(source, classes=2, reduce_zero_label=True).rules.labels(mask(0, 1)).max() == 255


def test_colours_of_a_file_that_numbers_its_classes_from_one(tmp_path):
    """A class without a colour, and a number before each name, do not move the colours of the other classes."""
    (tmp_path / "classes.txt").write_text("1 wall\n2 sky 1 2 3\n3 road 4 5 6\n")
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3], pixels[:, 3:] = (1, 2, 3), (4, 5, 6)
    masks = open_masks(made(tmp_path, encoded(pixels, "PNG")), classes=str(tmp_path / "classes.txt"))
    assert masks[0]["pixel_labels"][0].tolist() == [1, 1, 1, 2, 2, 2]


def test_a_file_of_other_classes_than_the_well_known_set(tmp_path, caplog):
    source = made(tmp_path, mask(0, 1))
    open_masks(source, classes="voc")
    assert "beside the data" not in caplog.text
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    masks = open_masks(open_source(f"pairs:{tmp_path}", split="all"), classes="voc")
    assert masks.class_names[0] == "background"
    assert "data.masks.classes='voc' has 21 classes (background, aeroplane, " in caplog.text
    assert "names 2 others (sky, road). To use the file, set data.masks.classes=''" in caplog.text


def test_a_folder_named_as_a_well_known_set(tmp_path, monkeypatch):
    (tmp_path / "voc").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(open_masks(made(tmp_path, mask(0, 1)), classes="voc").class_names) == 21


def test_known_sets():
    assert {name: len(class_names(known.classes)) for name, known in KNOWN.items()} == {
        "ade20k": 150, "cityscapes": 19, "cityscapes_train_ids": 19, "voc": 21, "camvid": 11
    }  # fmt: skip
    assert class_colours(KNOWN["voc"].classes)[15] == (192, 128, 128)  # person, as in VOC's own colour map
    assert len(set(distinct_colours(254))) == 254
    # trainIds of cityscapesScripts: 7 is road, 26 is car, 33 is bicycle.
    assert [dict(KNOWN["cityscapes"].label_map)[i] for i in (7, 26, 33, 0, 29)] == [0, 13, 18, -1, -1]
    words = r"data\.masks\.classes='cityscape' is unknown; did you mean 'cityscapes'.* a file with a class a line"
    with pytest.raises(ValueError, match=words):
        known_set("cityscape")


def made(tmp_path, *masks, picture=PICTURE):
    for number, content in enumerate(masks):
        put(tmp_path, f"images/{number}.jpg", content=picture)
        put(tmp_path, f"masks/{number}.png", content=content)
    return open_source(f"pairs:{tmp_path}", split="all")


def test_the_report_on_masks(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = open_masks(made(tmp_path, mask(0, 1), mask(0, 11, mode="P"), mask(3, 3)), classes="camvid")
    assert "all: 3 of 3 masks read, mode " in caplog.text and "stored values 0 to 11" in caplog.text  # noqa: PT018
    assert "0 sky 33.3%, 3 road 33.3%, 1 building 16.7%; ignored 16.7%; not seen: 8 of 11 classes" in caplog.text
    assert source.class_names[3] == "road" and source.class_colours[3] == (128, 64, 128)  # noqa: PT018
    labels = {tuple(np.unique(pickle.loads(pickle.dumps(source))[i]["pixel_labels"])) for i in range(3)}
    assert labels == {(0, 1), (0, 255), (3,)}


def grey(rows: int, columns: int) -> bytes:
    return encoded(np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns), "PNG")


REFUSED = [
    ([mask(0, 255)], {"classes": 2}, r"masks/0.png: .* hold only 0 and 255, .*label_map='\(\(0, 0\), \(255, 1\)\)'"),
    ([mask(0, 1), mask(0, 19)], {"classes": "cityscapes_train_ids"}, r"25.0% of the pixels .* of the 19 classes: 19"),
    ([mask(0, 9), mask(0, 255)], {"classes": 2}, r"map='\(\(0, 0\), \(9, 1\), \(255, 2\)\)' and data.masks.classes=3"),
    ([mask(1, 2)], {"classes": 2}, "begin at 1: data.masks.reduce_zero_label=True"),
    ([mask(0, 2), mask(1, 1)], {"classes": 2}, "classes: 2. If 0 means unlabelled: data.masks.reduce_zero_label=True"),
    ([mask(0, 1)] * 2, {"classes": 2, "reduce_zero_label": True}, r"only class 0 .*reduce_zero_label is on"),
    ([mask(0, 1)] * 2, {"classes": 2, "ignore": (0,)}, "hold only class 1"),
    ([mask(0, 1)], {"classes": 1}, r"have one class, '0', .* data.masks.classes=2"),
    ([mask(0, 1)], {}, r"classes of the masks of .* are not known: set data.masks.classes"),
    ([grey(4, 7)], {"classes": 28}, r"masks/0.png: its mask has 7 x 4 pixels, but the image 6 x 4"),
    ([grey(6, 4)], {"classes": 24}, "EXIF orientation"),
    ([grey(4, 6)], {"classes": 3}, "with interpolation, or from JPEG"),
    ([mask(255)] * 2, {"classes": 2}, r"hold no class at all \(stored values 255\)"),
    (
        [mask(0, 1)[:50]] * 2,
        {"classes": 2},
        r"none of 2 images .* could be read with its mask: .*[01].jpg with its mask",
    ),
]


@pytest.mark.parametrize(("masks", "options", "message"), REFUSED)
def test_masks_that_cannot_be_meant_are_refused(masks, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_masks(made(tmp_path, *masks), **options)


def test_a_class_that_reduce_zero_label_ignores_is_noticed(tmp_path, caplog):
    for classes, warned in ((3, True), (4, False)):
        caplog.clear()
        masks = open_masks(made(tmp_path, mask(0, 1), mask(0, 2)), classes=classes, reduce_zero_label=True)
        assert ("the masks hold 0 to 2, as if these were the 3 classes" in caplog.text) == warned
        assert {value for i in range(2) for value in np.unique(masks[i]["pixel_labels"])} == {0, 1, 255}


def test_values_beyond_the_sample_are_found_when_they_are_read(tmp_path):
    contents = [mask(0, 1)] * 40
    source = made(tmp_path, *contents)
    sampled = set(np.unique(np.linspace(0, 39, 32).astype(int)).tolist())
    index = next(i for i in range(40) if i not in sampled)
    open(source.paths(index)[1], "wb").write(mask(0, 7))  # noqa: SIM115
    masks = open_masks(source, classes=2)
    with pytest.raises(LabelError, match=rf"{source.paths(index)[1]}: its mask holds values that are none"):
        masks[index]


def test_an_empty_file_is_no_mask(tmp_path):
    source = made(tmp_path, mask(0, 1), mask(0, 1))
    open(source.paths(1)[1], "wb").close()
    with pytest.raises(LabelError, match=rf"{source.paths(1)[1]} has no mask, or an empty one"):
        open_masks(source, classes=2)


def test_images_without_masks_are_refused(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(LabelError, match=r"[ab].jpg has no mask. Segmentation needs images with masks: pairs:LOCATION"):
        open_masks(open_source(f"folder:{tmp_path}", split="all"), classes=2)


def test_parquet_with_two_columns_of_images(tmp_path):
    masks = [mask(n, 2) for n in range(3)]
    files = [{"bytes": PICTURE, "path": None}] * 3
    (tmp_path / "classes.txt").write_text("sky\nroad 1 2 3\ncar\n")
    tables = {
        "binary": pa.table({"image": [PICTURE] * 3, "mask": masks, "label": [0, 1, 0]}),
        "sidewalk": pa.table({"pixel_values": files, "label": [{"bytes": m, "path": None} for m in masks]}),
        "scene_parse": pa.table(
            {"image": files, "annotation": [{"bytes": m, "path": "x"} for m in masks], "id": [1] * 3}
        ),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
        source = open_source(f"parquet:{tmp_path / name}.parquet", split="all")
        assert [source[i]["mask"] for i in range(3)] == masks, name
        assert pickle.loads(pickle.dumps(source))[2]["image"] == PICTURE
        labels = open_masks(source, classes=3)
        assert [labels[i]["pixel_labels"][0, 0] for i in range(3)] == [0, 1, 2]
        assert [source[i]["label"] for i in range(3)] == ([0, 1, 0] if name == "binary" else [-1] * 3)
    assert open_masks(source).class_names == ("sky", "road 1 2 3", "car")


def write_tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("end", ["mask.png", "seg.png", "labelIds.png"])
def test_masks_in_tar_files(end, tmp_path):
    """The member of a sample that is named as a mask, in several shards."""
    for shard in range(2):
        members = {}
        for n in range(3):
            members[f"s{shard}/{n}.jpg"] = PICTURE
            members[f"s{shard}/{n}.{end}"] = mask(n % 2, shard)
        write_tar(tmp_path / f"train-{shard}.tar", members)
    (tmp_path / "classes.txt").write_text("ground 1 2 3\ntree 4 5 6\n")
    source = pickle.loads(pickle.dumps(open_masks(open_source(f"tar:{tmp_path}", split="train"))))
    assert (source.class_names, source.class_colours) == (("ground", "tree"), ((1, 2, 3), (4, 5, 6)))
    assert len(source) == 6
    for index in range(6):
        shard, n = divmod(index, 3)
        example = source[index]
        assert example["image"] == PICTURE
        np.testing.assert_array_equal(example["pixel_labels"], MaskRules(classes=2).labels(mask(n % 2, shard)))


def test_masks_in_tar_files_that_are_missing_or_several(tmp_path):
    write_tar(tmp_path / "some" / "train.tar", {"a.jpg": PICTURE, "a.mask.png": mask(0, 1), "b.jpg": PICTURE})
    with pytest.raises(LabelError, match=r"b.jpg of .*train.tar has no mask"):
        open_masks(open_source(f"tar:{tmp_path}/some", split="train"), classes=2)
    write_tar(tmp_path / "two" / "train.tar", {f"a.{end}": mask(0, 1) for end in ("jpg", "mask.png", "seg.png")})
    with pytest.raises(ValueError, match=r"sample 'a' of .* has 2 masks: "):
        open_source(f"tar:{tmp_path}/two", split="train")
    write_tar(tmp_path / "none" / "train.tar", {"a.jpg": PICTURE, "a.depth.png": mask(0, 1)})
    assert "mask" not in open_source(f"tar:{tmp_path}/none", split="train")[0]


def test_a_location_of_another_level_is_named(tmp_path):
    put(
        tmp_path / "own", *(f"{split}/{kind}" for split in ("train", "val") for kind in ("images/x.jpg", "masks/x.png"))
    )
    for place, message in (
        (".", r"The folders of the splits are in .*own: did you mean pairs:.*own\?"),
        ("own/train", r"train is itself the folder of a split: did you mean pairs:.*own\?"),
        ("own/train/images", r"images is the folder of the images: did you mean pairs:.*own/train\?"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(f"pairs:{(tmp_path / place).resolve()}", split="train")


def test_masks_of_0_and_255_by_the_remedy_that_is_named(tmp_path):
    put(tmp_path, "images/a.jpg", "images/b.jpg")
    put(tmp_path, "masks/a.png", "masks/b.png", content=mask(0, 255))
    source = open_source(f"pairs:{tmp_path}", split="all")
    with pytest.raises(LabelError, match=r"hold only 0 and 255, .*label_map='\(\(0, 0\), \(255, 1\)\)'"):
        open_masks(source, classes=2)
    labels = open_masks(source, classes=2, label_map=((0, 0), (255, 1)))[0]["pixel_labels"]
    assert (labels[:, 0] == 0).all()
    assert (labels[:, 5] == 1).all()
    with pytest.raises(ValueError, match=r"the stored value 255 a class, and data.masks.ignore=\(255,\) ignores it"):
        open_masks(source, classes=2, label_map=((0, 0), (255, 1)), ignore=255)
    with pytest.raises(FileNotFoundError, match=r"data.masks.classes='nothing.txt': there is no such file"):
        open_masks(source, classes="nothing.txt")


def test_a_missing_mask_in_parquet_is_named(tmp_path):
    pq.write_table(pa.table({"image": [PICTURE] * 2, "mask": [mask(0, 1), None]}), tmp_path / "a.parquet")
    with pytest.raises(LabelError, match=r"row 1 of .*a.parquet has no mask"):
        open_masks(open_source(f"parquet:{tmp_path / 'a.parquet'}", split="all"), classes=2)


@pytest.mark.parametrize("short_side", [None, 2])
def test_prepared_sets_have_masks_and_classes(short_side, tmp_path):
    root = tmp_path / "scenes"
    for number in range(5):
        pixels = np.full((4, 6, 3), 40 * number, np.uint8)
        put(root, f"train/images/{number}.jpg", content=encoded(pixels, "PNG"))
        put(root, f"train/masks/{number}.png", content=mask(number % 2, 2, mode="P"))
        put(root, f"val/images/{number}.jpg", f"val/masks/{number}.png")
    put(root, "classes.txt", content=b"sky 1 2 3\nroad\ncar\n")
    original = open_source(f"pairs:{root}", split="train")
    conversion = Conversion(short_side=short_side)
    prepare_images(f"pairs:{root}", output=tmp_path / "out", set_name="scenes", conversion=conversion, workers=0)
    source = open_source("scenes", split="train", data_dir=tmp_path / "out")
    assert source.mask_classes == original.mask_classes
    got, want = open_masks(source, ignore=()), open_masks(original, ignore=())
    assert got.class_names == ("sky", "road", "car")
    for index in range(5):
        labels, kept = got[index]["pixel_labels"], want[index]["pixel_labels"]
        np.testing.assert_array_equal(labels, kept[::2, ::2] if short_side else kept)
        if not short_side:
            assert (source[index]["mask"], source[index]["image"]) == tuple(
                original[index][k] for k in ("mask", "image")
            )


def test_pairs_that_cannot_be_prepared_are_listed(tmp_path):
    for number in range(4):
        put(tmp_path / "in", f"images/{number}.jpg", f"masks/{number}.png")
    put(tmp_path / "in", "masks/1.png", content=mask(0, 1)[:40])
    put(tmp_path / "in", "masks/2.png", content=grey(4, 7))
    options = {"set_name": "scenes", "workers": 0, "max_rejected": 0.5}
    folder = prepare_images(f"pairs:{tmp_path / 'in'}", output=tmp_path / "out", **options)
    rejected = read_report(folder)["splits"]["train"]["rejected"]
    reasons = {each["description"].rsplit("/", 1)[1]: each["reason"] for each in rejected}
    assert sorted(reasons) == ["1.png", "2.png"]
    assert reasons["1.png"].startswith("its mask cannot be decoded: ")
    assert reasons["2.png"].startswith("its mask has 7 x 4 pixels, but the image 6 x 4")
    assert len(open_source("scenes", split="train", data_dir=tmp_path / "out")) == 2


class Renamed(Source):
    name, split, class_names = "scene_parse150", "train", ()

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"image": PICTURE, "label": -1, "mask": mask(0, 1)}


def test_scene_parse150_of_tfds_is_refused():
    with pytest.raises(ValueError, match=r"instance masks of scene_parse150.*ADEChallengeData2016"):
        open_masks(Renamed(), classes="ade20k")
