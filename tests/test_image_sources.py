"""Sources of files: each kind against an independent reader, rules for splits, remote files, the index, mistakes."""

import concurrent.futures
import hashlib
import importlib
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from runs import small_config
from tensorflow_datasets.proto import tf_example_pb2

from tinymim_jax.data.pipeline import train_batches
from tinymim_jax.data.sources import files, index
from tinymim_jax.data.sources import folder as folder_source
from tinymim_jax.data.sources import parquet as parquet_source
from tinymim_jax.data.sources.examples import balanced_subset
from tinymim_jax.data.sources.labels import labelled
from tinymim_jax.data.sources.sources import open_source, splits
from tinymim_jax.data.views.transforms import EvalView
from tinymim_jax.experiment import build_experiment


def picture(number: int, kind: str = "PNG") -> bytes:
    """An image file that differs for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TINYMIM_CACHE", str(folder))
    return folder / "index"


def put(path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def old(root) -> None:
    """Sets all modification times to an hour ago."""
    hour = time.time() - 3600
    for folder, _, names in os.walk(root):
        for name in [*names, "."]:
            os.utime(os.path.join(folder, name), (hour, hour))


def read_all(source) -> list[tuple[bytes, int]]:
    return [(example["image"], example["label"]) for example in source]


# ---------------------------------------------------------------------------------------- a set of each kind


LABELLED = [(picture(number), number * 7 % 3) for number in range(12)]
UNLABELLED = [(data, -1) for data, _ in LABELLED]


CLASSES = ("ant", "bee", "cow")


def write_folder(root, split: str, records) -> None:
    for number, (data, label) in enumerate(records):
        put(root / split / (CLASSES[label] if label >= 0 else ".") / f"{number:03d}.png", data)


def write_tar(root, split: str, records, shard: int = 5) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(records), shard):
        with tarfile.open(root / f"{split}-{first // shard:06d}.tar", "w") as tar:
            for number, (data, label) in list(enumerate(records))[first : first + shard]:
                members = {f"x/{number:03d}.png": data}
                if label >= 0:
                    members |= {f"x/{number:03d}.cls": str(label).encode()}
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write_parquet(root, split: str, records, classes=("ant", "bee", "cow"), rows: int = 3) -> None:
    root.mkdir(parents=True, exist_ok=True)
    features: dict = {"image": {"_type": "Image"}}
    columns: dict = {"image": [{"bytes": data, "path": f"{n}.png"} for n, (data, _) in enumerate(records)]}
    if records[0][1] >= 0:
        columns["label"] = [label for _, label in records]
        features["label"] = {"names": list(classes), "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    half = len(records) // 2 + 1
    for number, part in enumerate((slice(0, half), slice(half, None))):
        table = pa.table({name: values[part] for name, values in columns.items()}).replace_schema_metadata(metadata)
        pq.write_table(table, root / f"{split}-{number:05d}-of-00002.parquet", row_group_size=rows)


def example_of(data: bytes, label: int, image_key="image", label_key="label") -> bytes:
    made = tf_example_pb2.Example()
    made.features.feature[image_key].bytes_list.value.append(data)
    if label >= 0:
        made.features.feature[label_key].int64_list.value.append(label)
    return made.SerializeToString()


def write_array_records(root, split: str, records, as_example=None) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if as_example is None:
        as_example = records[0][1] >= 0
    for number, part in enumerate((records[:7], records[7:])):
        writer = ArrayRecordWriter(str(root / f"{split}.array_record-{number:05d}-of-00002"), "group_size:1")
        for data, label in part:
            writer.write(example_of(data, label) if as_example else data)
        writer.close()


WRITERS = {
    "folder": write_folder,
    "tar": write_tar,
    "parquet": write_parquet,
    "array_record": write_array_records,
}
KINDS = sorted(WRITERS)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def expected(kind: str, records) -> list[tuple[bytes, int]]:
    """The expected order: of folders by a hash of the names, of other kinds as stored."""
    if kind != "folder":
        return list(records)
    names = [
        f"{CLASSES[label]}/{number:03d}.png" if label >= 0 else f"{number:03d}.png"
        for number, (_, label) in enumerate(records)
    ]
    order = sorted(range(len(records)), key=lambda i: hashlib.blake2b(names[i].encode(), digest_size=8).digest())
    return [records[i] for i in order]


@pytest.mark.parametrize("records", [LABELLED, UNLABELLED], ids=["labelled", "unlabelled"])
def test_what_was_written_is_read(kind, records, tmp_path):
    WRITERS[kind](tmp_path / "set", "train", records)
    source = open_source(f"{kind}:{tmp_path}/set", split="train")
    assert len(source) == len(records)
    assert read_all(source) == expected(kind, records)
    named = {"folder": ("ant", "bee", "cow"), "parquet": ("ant", "bee", "cow")}
    assert source.class_names == (named.get(kind, ("0", "1", "2")) if records is LABELLED else ())
    assert source.classes == len(source.class_names)
    for beyond in (-1, len(records)):
        with pytest.raises(IndexError, match="0 to 11"):
            source[beyond]


def test_source_pickles_small_and_reads_from_threads(kind, tmp_path):
    WRITERS[kind](tmp_path, "train", LABELLED)
    source = open_source(f"{kind}:{tmp_path}", split="train[1:]")
    source[3]  # with files open
    sent = pickle.dumps(source)
    assert len(sent) < 1500
    copy = pickle.loads(sent)
    wanted = expected(kind, LABELLED)[1:]
    assert read_all(copy) == wanted
    order = np.random.default_rng(0).integers(0, len(source), 400).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for place, example in zip(order, pool.map(copy.__getitem__, order)):
            assert (example["image"], example["label"]) == wanted[place]
    subset = balanced_subset(source, 6)
    assert sorted(label for _, label in read_all(pickle.loads(pickle.dumps(subset)))) == [0, 0, 1, 1, 2, 2]


def test_records_are_described(kind, tmp_path):
    WRITERS[kind](tmp_path, "train", LABELLED)
    described = open_source(f"{kind}:{tmp_path}", split="train[8:]").describe(0)
    number = LABELLED.index(expected(kind, LABELLED)[8])
    assert (
        described
        == {
            "folder": f"{tmp_path}/train/{CLASSES[LABELLED[number][1]]}/{number:03d}.png",
            "tar": f"x/008.png of {tmp_path}/train-000001.tar",
            "parquet": f"row 1 of {tmp_path}/train-00001-of-00002.parquet",
            "array_record": f"record 1 of {tmp_path}/train.array_record-00001-of-00002",
        }[kind]
    )


# ---------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "spec",
    ["train[:90%]", "train[3:]", "train[-2:]", "train[:50%]+train[90%:]", "test+train[2:4]", "train[10%:33%]"],
)
def test_parts_are_those_of_tfds(kind, spec, tmp_path):
    WRITERS[kind](tmp_path, "train", LABELLED)
    WRITERS[kind](tmp_path, "test", LABELLED[5:9])
    numbers = {"train": list(range(12)), "test": list(range(100, 104))}
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[len(held)], num_bytes=0) for name, held in numbers.items()
    }
    wanted = []
    for part in tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos):
        wanted += numbers[part.splitname][slice(part.from_, part.to)]
    whole = dict(zip(numbers["train"], expected(kind, LABELLED)))
    whole |= dict(zip(numbers["test"], expected(kind, LABELLED[5:9])))
    if kind == "folder":  # the same classes in both
        for name in ("ant", "bee", "cow"):
            (tmp_path / "test" / name).mkdir(exist_ok=True)
    if kind in ("tar", "array_record"):
        (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    assert read_all(open_source(f"{kind}:{tmp_path}", split=spec)) == [whole[number] for number in wanted]


def test_every_rule_for_splits(kind, tmp_path):
    write = WRITERS[kind]
    write(tmp_path / "a", "train", LABELLED)
    write(tmp_path / "a", "val", LABELLED[:6])
    wanted = {"train": 12, "val": 6}
    assert splits(f"{kind}:{tmp_path}/a") == wanted
    assert len(open_source(f"{kind}:{tmp_path}/a", split="all")) == 18
    assert len(open_source(f"{kind}:{tmp_path}/a", split="all[:50%]+all[90%:]")) == 9 + 2

    write(tmp_path / "b" / "train", "part", LABELLED)  # a folder for each split
    write(tmp_path / "b" / "val", "part", LABELLED[:6])
    if kind != "folder":
        assert splits(f"{kind}:{tmp_path}/b") == wanted
        assert read_all(open_source(f"{kind}:{tmp_path}/b", split="val")) == LABELLED[:6]
        write(tmp_path / "b" / "train", "more", LABELLED[:8])
        assert len(open_source(f"{kind}:{tmp_path}/b/*/part*", split="all")) == 18

    marked = f"{kind}:{tmp_path}/b/{{split}}/part" + "*" * (kind != "folder")
    assert splits(marked) == wanted
    assert len(open_source(marked, split="val[1:]")) == 5
    assert len(open_source(marked, split="all")) == 18


def test_a_set_without_splits_is_all(kind, tmp_path):
    WRITERS[kind](tmp_path / "00" if kind != "folder" else tmp_path, "0", LABELLED)
    place = f"{kind}:{tmp_path}/0"
    if kind != "folder":
        place = f"{kind}:{tmp_path}/00"
        for path in (tmp_path / "00").iterdir():
            path.rename(str(path).replace("/0-", "/").replace("/0.", "/x."))
    if kind == "array_record":
        place += "/*"
    assert splits(place) == {"all": 12}
    with pytest.raises(ValueError, match=r"split='train'.*unknown.*choices: all"):
        open_source(place, split="train")


def test_unknown_split_and_place(kind, tmp_path):
    WRITERS[kind](tmp_path, "train", LABELLED)
    WRITERS[kind](tmp_path, "val", LABELLED)
    with pytest.raises(ValueError, match=rf"split='tset' of '{kind}:.*choices: train, val, or a part"):
        open_source(f"{kind}:{tmp_path}", split="tset[:10%]")
    with pytest.raises(ValueError, match=r"split='train\[:x%\]'.*choices: a part such as"):
        open_source(f"{kind}:{tmp_path}", split="train[:x%]")
    with pytest.raises(ValueError, match="holds no image"):
        open_source(f"{kind}:{tmp_path}", split="train[:0]")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere"):
        open_source(f"{kind}:{tmp_path}/nowhere", split="train")
    with pytest.raises(ValueError, match=f"write {kind}:LOCATION"):
        open_source(f"{kind}:", split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image|no \w+ file at"):
        open_source(f"{kind}:{tmp_path}/empty", split="all")


def test_an_index_of_another_locale_is_not_used(tmp_path, monkeypatch):
    """In an ASCII locale Python reads the names of classes otherwise."""
    (tmp_path / "images" / "é").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "é" / "a.png")
    monkeypatch.setenv("TINYMIM_CACHE", str(tmp_path / "cache"))
    open_source(f"folder:{tmp_path / 'images'}", split="all")
    with monkeypatch.context() as ascii_locale:
        ascii_locale.setattr("sys.getfilesystemencoding", lambda: "ascii")
        open_source(f"folder:{tmp_path / 'images'}", split="all")
    assert len([path for path in (tmp_path / "cache" / "index").iterdir() if path.is_dir()]) == 2


def test_a_longer_name_is_another_split(tmp_path):
    for split in ("train", "train-extra"):
        write_tar(tmp_path, split, LABELLED)
    assert splits(f"tar:{tmp_path}") == {"train": 12, "train-extra": 12}
    assert len(open_source(f"tar:{tmp_path}", split="train")) == 12


def test_a_bracket_in_a_path_is_no_pattern(kind, tmp_path):
    WRITERS[kind](tmp_path / "[set]", "train", LABELLED)
    assert splits(f"{kind}:{tmp_path}/[set]") == {"train": 12}
    assert len(open_source(f"{kind}:{tmp_path}/[set]", split="train[:5]")) == 5


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
def test_a_missing_shard_is_named(kind, tmp_path):
    WRITERS[kind](tmp_path, "train", LABELLED)
    next(tmp_path.glob("train*00000-of*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"train[.\w]*-00000-of-00002 is missing, 1 of 2"):
        open_source(f"{kind}:{tmp_path}", split="train")


# ---------------------------------------------------------------------------------------- folders


def image_folder(root) -> list[tuple[str, int]]:
    """The rule of torchvision.datasets.ImageFolder, written out."""
    extensions = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    samples = []
    for label, name in enumerate(classes):
        for folder, _, names in sorted(os.walk(os.path.join(root, name), followlinks=True)):
            samples += [
                (os.path.join(folder, each), label) for each in sorted(names) if each.lower().endswith(extensions)
            ]
    return samples


def test_folder_is_torchvisions(tmp_path):
    root = tmp_path / "set"
    names = ("b/1.JPEG", "b/x/2.png", "b/x-y/3.webp", "b/10.jpg", "a/z.bmp", "a/notes.txt", "c/d/e/4.TIFF", "B/ü.png")
    for number, name in enumerate(names):
        put(root / name, picture(number))
    put(tmp_path / "elsewhere" / "5.png", picture(50))
    (root / "c" / "linked").symlink_to(tmp_path / "elsewhere")
    source = open_source(f"folder:{root}", split="all")
    wanted = image_folder(root)
    assert len(wanted) == 8
    assert sorted((source.describe(place), source[place]["label"]) for place in range(len(source))) == sorted(wanted)
    assert source.class_names == ("B", "a", "b", "c")
    images = {source.describe(place): source[place]["image"] for place in range(len(source))}
    assert images[f"{root}/B/ü.png"] == picture(7)


def test_slices_of_a_folder_hold_every_class_and_keep_their_images_when_others_come(tmp_path):
    def names(split):
        source = open_source(f"folder:{tmp_path}", split=split)
        labels = [source[i]["label"] for i in range(len(source))]
        return [source.describe(i) for i in range(len(source))], np.bincount(labels, minlength=3)

    for label, name in enumerate("abc"):
        for number in range(60):
            put(tmp_path / name / f"{number}.png", picture(label))
    before, counts = names("all[:50%]")
    assert (np.abs(counts - 30) < 4 * np.sqrt(60 / 4)).all()  # four standard deviations
    put(tmp_path / "a" / "new.png", picture(9))
    after, _ = names("all")
    assert [name for name in after if not name.endswith("new.png")][: len(before)] == before


def test_hidden_files_are_no_images(tmp_path):
    for name in ("a/1.png", "a/._1.png", ".thumbs/1.png", "a/.x/2.png"):
        put(tmp_path / name, picture(0))
    source = open_source(f"folder:{tmp_path}", split="all")
    assert (len(source), source.class_names) == (1, ("a",))


def test_images_beside_class_folders_are_a_mistake(tmp_path):
    put(tmp_path / "a" / "1.png", picture(0))
    put(tmp_path / "stray.png", picture(1))
    with pytest.raises(ValueError, match=r"stray.png.*either put each class into its own folder"):
        open_source(f"folder:{tmp_path}", split="all")


def test_a_link_that_leads_up_is_a_mistake(tmp_path):
    put(tmp_path / "a" / "1.png", picture(0))
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(OSError, match=f"{tmp_path}/a/up is a link"):
        open_source(f"folder:{tmp_path}", split="all")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path / "a" / "1.png", picture(0))
    put(tmp_path / "b" / "1.png", picture(0))
    scandir = os.scandir

    def refuse(path):  # file modes do not stop the root user, whom tests may run as
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=f"{tmp_path}/b"):
        open_source(f"folder:{tmp_path}", split="all")


def test_classes_that_differ_cannot_be_added(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "val/b/1.png"):
        put(tmp_path / name, picture(0))
    with pytest.raises(ValueError, match=r"'train' \(2\) and 'val' \(1\) differ, in \['a'\]"):
        open_source(f"folder:{tmp_path}", split="train+val")
    put(tmp_path / "extra" / "1.png", picture(1))
    mixed = open_source(f"folder:{tmp_path}", split="train+extra")
    assert (mixed.classes, [example["label"] for example in mixed]) == (0, [-1, -1, -1])


# ---------------------------------------------------------------------------------------- tar


def test_tar_is_what_tarfile_reads(tmp_path):
    long = "deep/" * 30 + "a.b.jpg"  # needs a header of its own
    members = {
        "./x/1.jpg": b"one", "./x/1.json": b'{"label": 2, "caption": "?"}', "2.JPG": b"two", "2.seg.png": b"mask",
        "2.cls": b" 0\n", long: b"three", long.replace("b.jpg", "cls"): b"1", "notes.txt": b"", ".hidden.jpg": b"h",
    }  # fmt: skip
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as tar:
            tar.add(tmp_path, arcname="x", recursive=False)
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    source = open_source(f"tar:{tmp_path}/*.tar", split="all")
    assert read_all(source) == [(b"one", 2), (b"two", 0), (b"three", 1)] * 3
    with tarfile.open(tmp_path / "1.tar") as tar:
        name = source.describe(5).split(" of ")[0]
        assert name == long
        assert tar.extractfile(name).read() == source[5]["image"]
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\ndog\n")
    assert open_source(f"tar:{tmp_path}/*.tar", split="all").class_names == ("ant", "bee", "cow", "dog")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.cls": b"3"}, "'1' of .*has a label but no image"),
        ({"1.jpg": b"", "1.cls": b"cat"}, r"1.cls of .*holds b'cat'; expected a class number"),
        ({"1.jpg": b"", "1.json": b"{"}, r"holds b'{'"),
        ({"1.jpg": b"", "1.cls": b"0", "2.jpg": b""}, "1 of 2 examples of split 'all' .*no label.*2.jpg of .*0.tar"),
        ({"1.jpg": b"", "1.png": b""}, "'1' of .*has 2 images: 1.jpg, 1.png"),
        ({"1.txt": b""}, "holds no image"),
    ],
)
def test_tar_mistakes(members, message, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=message):
        labelled(open_source(f"tar:{tmp_path}", split="all"))


def test_damaged_tars_are_refused(tmp_path):
    write_tar(tmp_path, "train", LABELLED, shard=12)
    whole = (tmp_path / "train-000000.tar").read_bytes()
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        member = tar.getmembers()[10]
    for damaged in (
        whole[: member.offset_data + 10],
        whole[: member.offset] + b"\1" * 512 + whole[member.offset + 512 :],
        b"not a tar file" * 100,
    ):
        (tmp_path / "train-000000.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-000000.tar is truncated or not a tar file"):
            open_source(f"tar:{tmp_path}", split="train")


def test_a_member_that_claims_more_than_the_tar_holds(tmp_path):
    """Its header is read and nothing else: neither the memory nor the data that it claims."""
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in (("1.jpg", b"one"), ("1.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = (tmp_path / "0.tar").read_bytes()
    at = whole.index(b"1.cls")
    for claimed in (1 << 60, -512):
        info = tarfile.TarInfo("1.cls")
        info.size = claimed
        (tmp_path / "0.tar").write_bytes(whole[:at] + info.tobuf(tarfile.GNU_FORMAT) + whole[at + 512 :])
        with pytest.raises(ValueError, match=r"0.tar is truncated or not a tar file"):
            open_source(f"tar:{tmp_path}", split="all")


def test_links_in_a_tar_stand_for_their_files(tmp_path):
    put(tmp_path / "x" / "1.jpg", b"one")
    put(tmp_path / "x" / "1.cls", b"2")
    os.link(tmp_path / "x" / "1.jpg", tmp_path / "x" / "2.jpg")
    os.link(tmp_path / "x" / "1.cls", tmp_path / "x" / "2.cls")
    (tmp_path / "x" / "3.jpg").symlink_to("2.jpg")
    put(tmp_path / "x" / "3.cls", b"0")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("1.jpg", "1.cls", "2.jpg", "2.cls", "3.jpg", "3.cls"):
            tar.add(tmp_path / "x" / name, arcname=f"./x/{name}")
        assert [member.islnk() for member in tar.getmembers()] == [False, False, True, True, False, False]
        assert tar.getmembers()[4].issym()
    source = open_source(f"tar:{tmp_path}", split="all")
    assert read_all(source) == [(b"one", 2), (b"one", 2), (b"one", 0)]
    assert source.describe(1).startswith("./x/2.jpg of ")
    (tmp_path / "x" / "4.jpg").symlink_to("/nowhere/4.jpg")
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        tar.add(tmp_path / "x" / "4.jpg", arcname="x/4.jpg")
    with pytest.raises(ValueError, match=r"x/4.jpg of .*0.tar is a link to /nowhere/4.jpg.*--dereference"):
        open_source(f"tar:{tmp_path}", split="all")


def test_a_read_that_stops_short_is_continued(tmp_path, monkeypatch):
    write_tar(tmp_path, "train", LABELLED)
    pread, sizes = os.pread, []

    def short(descriptor, size, offset):  # as network file systems may
        sizes.append(size)
        return pread(descriptor, min(size, 50), offset)

    monkeypatch.setattr(os, "pread", short)
    assert read_all(open_source(f"tar:{tmp_path}", split="train")) == LABELLED
    assert len(sizes) > len(LABELLED)


def test_home_in_a_location(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    WRITERS[kind](tmp_path / "set", "train", LABELLED)
    assert read_all(open_source(f"{kind}:~/set", split="train")) == expected(kind, LABELLED)


def test_compressed_tars_are_refused(tmp_path):
    for name in ("train-0.tar.gz", "train-1.tgz"):
        put(tmp_path / name, b"")
        for place in (tmp_path, tmp_path / name, tmp_path / "*", f"{tmp_path}/{{split}}*"):
            with pytest.raises(ValueError, match=rf"train-\d.*{name[-2:]}.*gunzip"):
                open_source(f"tar:{place}", split="all")
        with pytest.raises(ValueError, match=r"gunzip"):
            open_source(f"tar:{tmp_path}", split="train")
        (tmp_path / name).unlink()


def test_a_shard_cut_after_it_was_opened(tmp_path):
    write_tar(tmp_path, "train", LABELLED)
    source = open_source(f"tar:{tmp_path}", split="train")
    with open(tmp_path / "train-000002.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(EOFError, match=r"train-000002.tar ends before"):
        source[11]


# ---------------------------------------------------------------------------------------- Parquet


def test_parquet_is_what_pyarrow_reads(tmp_path):
    write_parquet(tmp_path, "train", LABELLED)
    source = open_source(f"parquet:{tmp_path}", split="train")
    table = pa.concat_tables(pq.read_table(path) for path in sorted(tmp_path.iterdir()))
    assert read_all(source) == [
        (image["bytes"], label) for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist())
    ]


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("jpg", "labels"), ("image", None)])
def test_parquet_columns_by_name(image, label, tmp_path):
    columns = {"caption": ["?"] * 12, image: [data for data, _ in LABELLED]}
    if label:
        columns[label] = [number for _, number in LABELLED]
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    source = open_source(f"parquet:{tmp_path}", split="train")
    assert read_all(source) == (LABELLED if label else UNLABELLED)
    assert source.class_names == (("0", "1", "2") if label else ())
    assert read_all(open_source(f"parquet:{tmp_path}/train.parquet", split="all")) == read_all(source)


def test_parquet_columns_by_metadata(tmp_path):
    features = {
        "scan": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": {"0": "x", "10": "z", "2": "y"}},
        "label": {"_type": "Value", "dtype": "string"},
    }  # fmt: skip
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"label": ["?"] * 12, "scan": [data for data, _ in LABELLED], "kind": [None] + [1] * 11}
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "train.parquet")
    source = open_source(f"parquet:{tmp_path}", split="train")
    assert source.class_names == ("x", "y", "z")
    assert [label for _, label in read_all(source)] == [-1] + [1] * 11


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b""], "n": [1]}, "has no image column: it has picture, n; expected one of image, img, jpg"),
        ({"image": ["a.png"]}, "column 'image' of .* holds string; expected encoded image files"),
        ({"image": [b""], "label": ["cat"]}, "column 'label' of .* holds string; expected integers"),
        ({"image": [b""], "label": [10**9]}, "the highest label is 1,000,000,000, too large for a class number"),
    ],
)
def test_parquet_mistakes(columns, message, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        labelled(open_source(f"parquet:{tmp_path}", split="train"))


def test_parquet_files_must_agree_and_be_whole(tmp_path):
    write_parquet(tmp_path, "train", LABELLED)
    write_parquet(tmp_path, "other", LABELLED, classes=("x", "y", "z"))
    with pytest.raises(ValueError, match=r"train-00000-of-00002.parquet has other columns or classes than .*other"):
        open_source(f"parquet:{tmp_path}", split="all")
    (tmp_path / "train-00001-of-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet is truncated"):
        open_source(f"parquet:{tmp_path}", split="train")


def test_an_image_kept_elsewhere_is_an_error_of_its_record(tmp_path):
    pq.write_table(
        pa.table({"image": [{"bytes": b"1", "path": "1"}, {"bytes": None, "path": "2"}]}), tmp_path / "a.parquet"
    )
    source = open_source(f"parquet:{tmp_path}", split="a")
    assert source[0]["image"] == b"1"
    with pytest.raises(ValueError, match=r"row 1 of .*a.parquet holds no image"):
        source[1]


def test_row_groups_kept_are_bounded(tmp_path, monkeypatch):
    write_parquet(tmp_path, "train", LABELLED, rows=2)
    source = open_source(f"parquet:{tmp_path}", split="train")
    two_groups = 2 * source._read(0)[0].nbytes + 50
    monkeypatch.setattr(parquet_source, "CACHE_BYTES", two_groups)
    reads = []
    read = source._read
    monkeypatch.setattr(source, "_read", lambda group: reads.append(group) or read(group))
    assert read_all(source) == LABELLED
    assert reads == list(range(7))  # of 2 rows, and 7 is odd
    assert source._kept_bytes <= two_groups
    assert source._kept_bytes == sum(images.nbytes for images, _ in source._groups.values())
    source[11], source[9], source[11]
    assert len(reads) == 7
    source[0]
    assert reads[7:] == [0]


def test_large_row_groups_are_warned_of(tmp_path, monkeypatch, caplog):
    write_parquet(tmp_path, "train", LABELLED)
    with caplog.at_level(logging.WARNING):
        open_source(f"parquet:{tmp_path}", split="train")
        assert not caplog.records
        monkeypatch.setattr(parquet_source, "_LARGE_GROUP", 100)
        open_source(f"parquet:{tmp_path}", split="train")
    assert [f"tinymim prepare parquet:{tmp_path}" in record.getMessage() for record in caplog.records] == [True]


# ---------------------------------------------------------------------------------------- ArrayRecord


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_an_array_record_may_be_an_image(kind, tmp_path):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    records = [(picture(number, kind), -1) for number in range(9)]
    write_array_records(tmp_path, "train", records)
    assert read_all(open_source(f"array_record:{tmp_path}", split="train")) == records


def test_array_records_of_examples_under_other_names(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "train.arrayrecord"), "group_size:1")
    for data, label in LABELLED:
        writer.write(example_of(data, label, "image/encoded", "image/class/label"))
    writer.write(example_of(b"", 0, "scan"))
    writer.write(b"\xff neither")
    writer.close()
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    source = open_source(f"array_record:{tmp_path}", split="train")
    assert source.class_names == ("ant", "bee")
    assert source[0] == {"image": LABELLED[0][0], "label": 0}
    for place, message in (
        (12, r"no image among \['label', 'scan'\]"),
        (13, "neither an image file nor a tf.train.Example"),
    ):
        with pytest.raises(ValueError, match=message):
            source[place]
    with pytest.raises(ValueError, match=r"record 2 of .*train.arrayrecord has label 2, none of the 2 classes"):
        labelled(source)


def test_array_records_must_be_whole_and_local(tmp_path):
    write_array_records(tmp_path, "train", LABELLED)
    damaged = next(tmp_path.glob("*00001-of*"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match="00001-of-00002 is truncated or not an ArrayRecord file"):
        open_source(f"array_record:{tmp_path}", split="train")
    with pytest.raises(ValueError, match="mount the bucket"):
        open_source("array_record:gs://bucket/set", split="train")


# ---------------------------------------------------------------------------------------- remote files


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_remote_files_are_as_local_ones(kind, tmp_path):
    WRITERS[kind](tmp_path, "train", LABELLED)
    WRITERS[kind](tmp_path, "val", LABELLED[:6])
    url = f"memory://remote-{kind}"
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path) + "/", f"/remote-{kind}/", recursive=True)
    try:
        for split in ("train", "val[1:]", "all[:50%]"):
            remote = open_source(f"{kind}:{url}", split=split)
            assert read_all(remote) == read_all(open_source(f"{kind}:{tmp_path}", split=split))
            assert f"remote-{kind}/" in remote.describe(0)
        assert splits(f"{kind}:{url}") == {"train": 12, "val": 6}
        marked = f"{kind}:{url}/{{split}}" + "-*" * (kind != "folder")
        assert splits(marked) == {"train": 12, "val": 6}
        assert read_all(open_source(marked, split="train")) == expected(kind, LABELLED)
        with pytest.raises(FileNotFoundError, match=f"{url}/nowhere"):
            open_source(f"{kind}:{url}/nowhere", split="train")
        with pytest.raises(ValueError, match="choices: train, val"):
            open_source(f"{kind}:{url}", split="tset")
        for path in memory.ls(f"/remote-{kind}", detail=False):
            if "val" in path:
                memory.rm(path, recursive=True)
        assert splits(f"{kind}:{url}") == {"train": 12}
    finally:
        memory.rm(f"/remote-{kind}", recursive=True)


def test_storage_without_its_package_names_it():
    with pytest.raises(ValueError, match="nosuch://bucket"):
        open_source("folder:nosuch://bucket", split="train")
    if fsspec.utils and not shutil.which("s3fs"):
        try:
            import s3fs  # noqa: F401
        except ImportError:
            with pytest.raises(ImportError, match="pip install s3fs"):
                open_source("folder:s3://bucket/images", split="train")


# ---------------------------------------------------------------------------------------- the index


def test_an_index_is_made_once(kind, tmp_path, cache, monkeypatch):
    WRITERS[kind](tmp_path, "train", LABELLED)
    old(tmp_path)
    first = open_source(f"{kind}:{tmp_path}", split="train")
    made = sorted(os.listdir(cache))

    def never(*args):
        raise AssertionError("indexed again")

    with monkeypatch.context() as patched:
        for name in ("_records", "walk"):
            for module in (files, folder_source, importlib.import_module(f"tinymim_jax.data.sources.{kind}")):
                if hasattr(module, name) and (name == "_records" or kind == "folder"):
                    patched.setattr(module, name, never)
        assert read_all(open_source(f"{kind}:{tmp_path}", split="train")) == read_all(first)
    assert sorted(os.listdir(cache)) == made


def test_a_change_is_seen(kind, tmp_path):
    WRITERS[kind](tmp_path, "train", LABELLED[:9])
    old(tmp_path)
    assert len(open_source(f"{kind}:{tmp_path}", split="train")) == 9
    WRITERS[kind](tmp_path, "train", LABELLED)
    assert read_all(open_source(f"{kind}:{tmp_path}", split="train")) == expected(kind, LABELLED)
    old(tmp_path)
    again = [(picture(200 + number), label) for number, (_, label) in enumerate(LABELLED)]
    WRITERS[kind](tmp_path, "train", again)
    assert read_all(open_source(f"{kind}:{tmp_path}", split="train")) == expected(kind, again)


def test_a_folder_changed_a_moment_later_is_listed_anew(tmp_path):
    put(tmp_path / "a" / "1.png", picture(0))
    assert len(open_source(f"folder:{tmp_path}", split="all")) == 1
    stamp = os.stat(tmp_path / "a").st_mtime_ns
    put(tmp_path / "a" / "2.png", picture(1))
    os.utime(tmp_path / "a", ns=(stamp, stamp))  # in the same tick of a coarse clock
    assert len(open_source(f"folder:{tmp_path}", split="all")) == 2


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path, monkeypatch):
    put(tmp_path / "set" / "1.png", picture(0))
    put(tmp_path / "file", b"")
    monkeypatch.setenv("TINYMIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set TINYMIM_CACHE to a folder"):
        open_source(f"folder:{tmp_path}/set", split="all")


def test_of_two_that_index_at_once_one_is_kept(tmp_path, cache):
    records = index.Records()
    records.add("only", 3, 1, 2**40, 5)

    def build():
        assert len(index.cached("set", "same", lambda: records)) == 1  # another process is faster
        return records

    found = index.cached("set", "same", build)
    assert (found.name(0), found.labels[0], found.shards[0], found.offsets[0], found.sizes[0]) == (
        "only",
        3,
        1,
        2**40,
        5,
    )
    assert len(os.listdir(cache)) == 1


def test_records_of_files_and_their_mixed_order():
    """Of one label at once as one after another; mixed, they are sorted by a hash of their names."""
    names = [f"näme/{number % 7}/{number}\udcff" for number in range(100)]
    one_by_one, at_once = index.Records(), index.Records()
    for records in (one_by_one, at_once):
        records.add("first", 9, 1, 2**40, 5)
    for name in names:
        one_by_one.add(name, 3)
    at_once.add_files(names, 3)
    at_once.add_files([], 4)
    for name, column in one_by_one.columns().items():
        np.testing.assert_array_equal(at_once.columns()[name], column, err_msg=name)
    mixed = at_once.mixed()
    want = sorted(["first", *names], key=lambda name: hashlib.blake2b(os.fsencode(name), digest_size=8).digest())
    ends = list(mixed.ends)
    found = bytes(mixed.names)
    assert [os.fsdecode(found[begin:end]) for begin, end in zip([0, *ends], ends)] == want
    place = want.index("first")
    assert [column[place] for column in (mixed.labels, mixed.shards, mixed.offsets, mixed.sizes)] == [9, 1, 2**40, 5]
    assert set(mixed.labels) == {9, 3}


def test_an_index_is_mapped_and_not_read(tmp_path):
    records = index.Records()
    for number in range(1000):
        records.add(f"näme/{number}\udcff", number)
    more = index.Records()
    more.add("last", -1)
    records.extend(more)
    found = pickle.loads(pickle.dumps(index.cached("set", "mapped", lambda: records)))
    assert isinstance(found.labels, np.memmap)
    assert [found.name(place) for place in (0, 7, 1000)] == ["näme/0\udcff", "näme/7\udcff", "last"]
    assert found.labels[1000] == -1


# ---------------------------------------------------------------------------------------- end to end


def test_workers_read_a_folder(tmp_path):
    write_folder(tmp_path, "train", LABELLED)
    source = open_source(f"folder:{tmp_path}", split="train[:75%]")
    settings = {"augment": EvalView(image_size=(6, 6), resize=6), "batch_size": 6, "seed": 0}
    with train_batches(source, workers=1, **settings) as spawned, train_batches(source, **settings) as own:
        for _ in range(3):
            theirs, ours = next(spawned), next(own)
            assert theirs["valid"].all()
            for key, values in ours.items():
                np.testing.assert_array_equal(values, theirs[key])


def test_a_subset_of_a_set_without_labels(kind, tmp_path):
    WRITERS[kind](tmp_path, "train", UNLABELLED)

    def images(seed):
        source = open_source(f"{kind}:{tmp_path}", split="train", examples=5, seed=seed)
        return [example["image"] for example in source]

    assert len(set(images(0))) == 5
    assert images(0) == images(0) != images(1)


def test_experiments_need_labels_that_mean_the_same(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path, split, LABELLED)
        write_folder(tmp_path / "flat", split, UNLABELLED)

    def build(experiment, source, evaluated="val"):
        splits = ("data.train_split=train", f"data.eval_split={evaluated}", "data.examples=0")
        return build_experiment(small_config(experiment, f"data.source=folder:{source}", *splits))

    assert build("finetune", tmp_path).task.model["classifier"]["classes"] == 3
    assert build("mae_student", tmp_path / "flat").train_source.classes == 0
    with pytest.raises(ValueError, match="has no labels: task 'classify' learns from them"):
        build("finetune", tmp_path / "flat")
    with pytest.raises(ValueError, match=r"split 'flat/val' of .* has no labels: task 'classify' is evaluated by them"):
        build("finetune", tmp_path, "flat/val")
    (tmp_path / "val" / "aardvark").mkdir()
    with pytest.raises(ValueError, match=r"3 classes and .*'val' 4, .*only in data\.eval_split='val': 'aardvark'"):
        build("finetune", tmp_path)
