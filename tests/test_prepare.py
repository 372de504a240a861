"""`tinymim prepare --output`: what is written and left out, and that interruptions do not change the result."""

import errno
import fcntl
import functools
import io
import logging
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image

from tinymim_jax.cli import main as cli
from tinymim_jax.cli import prepare as prepare_command
from tinymim_jax.data.prepare import shards as prepare_shards
from tinymim_jax.data.prepare import workers as prepare_workers
from tinymim_jax.data.prepare.prepare import default_name, prepare_images, read_report, write_set
from tinymim_jax.data.prepare.report import size, split_report, table
from tinymim_jax.data.prepare.shards import Conversion, convert
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.sources import open_source


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some grain, uint8 `[height, width, 3]`."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int64)
    return np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    entries = Image.Exif()
    entries[0x0112] = orientation
    return entries.tobytes()


class Photographs(Source):
    """Small JPEGs and PNGs of three classes; `files` replaces some of them, an exception is raised."""

    def __init__(self, length: int, split: str = "train", files=None, class_names=("cat", "dog", "cow")):
        self.name, self.split, self.class_names = "photographs", split, tuple(class_names)
        self.length, self.files = length, files or {}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        label = index % 3 if self.class_names else -1
        pixels = photograph(20 + index % 7, 30, index)
        file = self.files.get(index) or encoded(pixels, "PNG" if index % 4 == 3 else "JPEG")
        if isinstance(file, Exception):
            raise file
        return {"image": b"" if file == "empty" else file, "label": label}


class Masked(Photographs):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"mask": b""}


class Deadly(Photographs):
    """Kills the worker that reads record 5, as the OOM killer would."""

    def __getitem__(self, index):
        if index == 5 and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def shard_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record-*") if path.suffix != ".tmp"}


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare", *map(str, words)])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(source of 50 images, folder of the set made of them with kept bytes)."""
    source = Photographs(50)
    sources = {"train": source, "test": Photographs(7, "test")}
    return source, write_set(sources, tmp_path_factory.mktemp("sets"), "photos", shard_images=16, workers=0)


# ---------------------------------------------------------------------------------------------- what is written


def test_our_sources_read_it_by_name(written):
    source, folder = written
    opened = open_source("photos", split="train", data_dir=folder.parents[1])
    assert len(opened) == 50
    assert opened.class_names == source.class_names
    for index in range(50):
        assert opened[index] == source[index]  # JPEG and PNG side by side, not a byte changed
    assert opened.describe(3) == "record 3 of photos/train (record 3 of photographs/train)"
    assert len(open_source("photos", split="test[:3]", data_dir=folder.parents[1])) == 3


def test_tfds_reads_it_by_name(written):
    source, folder = written
    for builder in (tfds.builder("photos", data_dir=folder.parents[1]), tfds.builder_from_directory(folder)):
        records = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
        assert len(records) == 50
        for index in (0, 3, 15, 16, 49):
            assert {key: records[index][key] for key in ("image", "label")} == source[index]
        assert builder.info.features["label"].names == ["cat", "dog", "cow"]
        assert records[2]["file_name"] == b"record 2 of photographs/train"
        assert builder.info.splits["train"].shard_lengths == [16, 16, 16, 2]
    decoded = builder.as_data_source("train")[3]["image"]  # and decodes a PNG in a set it takes for JPEG
    np.testing.assert_array_equal(decoded, photograph(23, 30, 3))


def test_nothing_but_the_set_is_left(written):
    _, folder = written
    shards = [f"photos-train.array_record-{number:05d}-of-00004" for number in range(4)]
    described = ["dataset_info.json", "features.json", "label.labels.txt", "prepare.json", "report.json"]
    assert sorted(os.listdir(folder)) == sorted([*shards, *described, "photos-test.array_record-00000-of-00001"])
    assert os.listdir(folder.parent) == ["1.0.0"]


def test_the_workers_do_not_change_a_byte(written, tmp_path):
    source, folder = written
    for workers in (1, 2):
        sources = {"train": source, "test": Photographs(7, "test")}
        other = write_set(sources, tmp_path / str(workers), "photos", shard_images=16, workers=workers)
        assert shard_bytes(other) == shard_bytes(folder)
        report, want = read_report(other), read_report(folder)
        assert report["splits"] == want["splits"]


def test_a_set_without_classes(tmp_path):
    folder = write_set({"train": Photographs(5, class_names=())}, tmp_path, "plain", workers=0)
    records = tfds.builder_from_directory(folder).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert sorted(records[0]) == ["file_name", "image"]
    assert records[4]["image"] == Photographs(5)[4]["image"]
    report = read_report(folder)
    assert report["splits"]["train"]["without_class"] == 5
    assert "no class labels" in table(report)


def test_every_worker_dies_and_it_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"memory ran out.*--workers.*run the same command again"):
        write_set({"train": Deadly(8)}, tmp_path, "deadly", shard_images=2, workers=1)
    folder = tmp_path / "deadly"
    assert os.listdir(folder) == ["1.0.0.incomplete"]
    assert len(shard_bytes(folder / "1.0.0.incomplete")) == 2  # those before the one that killed


# ---------------------------------------------------------------------------------------------- conversion


def test_bytes_are_kept_by_default():
    for data in (encoded(photograph(40, 60)), encoded(photograph(9, 9), "WEBP"), encoded(photograph(9, 9), "PNG")):
        assert convert(data, Conversion()).data == data


@pytest.mark.parametrize(("height", "width", "want"), [(300, 400, (128, 170)), (401, 300, (171, 128))])
def test_large_images_are_resized_as_pillow_does(height, width, want):
    data = encoded(photograph(height, width), quality=98)
    got = convert(data, Conversion(short_side=128))
    pixels = np.asarray(Image.open(io.BytesIO(got.data)))
    assert (got.action, got.size, pixels.shape[:2]) == ("resized", (height, width), want)
    resized = Image.open(io.BytesIO(data)).resize(want[::-1], Image.Resampling.BICUBIC)
    assert psnr(pixels, np.asarray(resized)) > 36  # what JPEG of quality 90 leaves of grain; another filter gives less
    assert psnr(pixels, np.asarray(resized.resize(want[::-1], Image.Resampling.NEAREST, (2, 2, *want[::-1])))) < 36
    assert simplejpeg.decode_jpeg_header(got.data)[3] == "420"
    # Pillow's encoder at the same settings writes the same tables.
    want_tables = Image.open(io.BytesIO(encoded(np.asarray(resized), quality=90))).quantization
    assert Image.open(io.BytesIO(got.data)).quantization == want_tables


def test_small_images_keep_their_bytes_where_they_decode_fast():
    pixels, shrink = photograph(40, 60), Conversion(short_side=40)
    for data in (encoded(pixels), encoded(pixels, "PNG"), encoded(pixels, mode="L")):
        assert convert(data, shrink).data == data
    for data in (encoded(pixels, mode="CMYK"), encoded(pixels, "WEBP"), encoded(pixels, "BMP")):
        got = convert(data, shrink)
        assert (got.action, got.data[:2]) == ("reencoded", b"\xff\xd8")
        np.testing.assert_array_less(30, psnr(simplejpeg.decode_jpeg(got.data), pixels))


def test_pictures_are_turned_on_request():
    pixels = photograph(40, 60)
    data = encoded(pixels, exif=exif(6))  # to be turned a quarter clockwise
    assert convert(data, Conversion()).data == data
    got = convert(data, Conversion(upright=True))
    assert (got.action, got.size) == ("reencoded", (60, 40))
    assert psnr(simplejpeg.decode_jpeg(got.data), np.rot90(pixels, -1)) > 30
    upright = encoded(pixels, exif=exif(1))
    assert convert(upright, Conversion(upright=True)).data == upright


def test_what_the_decoder_complains_of_is_kept_and_told():
    data = encoded(photograph(64, 64))
    odd = data[:-2] + b"\0\0\0" + data[-2:]  # what does not belong there, before the last marker
    got = convert(odd, Conversion())
    assert (got.data, got.action) == (odd, "kept")
    assert "extraneous bytes" in got.warning
    assert convert(odd, Conversion(short_side=64)).action == "reencoded"
    with pytest.raises(Exception, match="truncated"):
        convert(data[:-100], Conversion())


@pytest.mark.parametrize("options", [{"short_side": 0}, {"quality": 0}, {"quality": 101}])
def test_mistaken_conversions_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Conversion(**options)


# ---------------------------------------------------------------------------------------------- rejected images


def damaged_files() -> dict:
    whole = encoded(photograph(64, 64))
    return {
        2: whole[:-100],
        17: b"Dear reader, this is a text.",
        18: "empty",
        33: OSError("the disk has a hole here"),
        34: b"Dear reader, this is a text.",
    }


def test_damaged_images_are_left_out_and_listed(tmp_path):
    damaged = Photographs(40, files=damaged_files())
    folder = write_set({"train": damaged}, tmp_path, "photos", shard_images=16, max_rejected=0.125, workers=0)
    opened = open_source("photos", split="train", data_dir=tmp_path)
    good = [index for index in range(40) if index not in damaged.files]
    assert [opened[place] for place in range(len(opened))] == [damaged[index] for index in good]
    report = read_report(folder)["splits"]["train"]
    assert (report["images"], report["read"]) == (35, 40)
    assert report["classes"] == {"cat": 12, "dog": 12, "cow": 11}
    reasons = {entry["index"]: entry["reason"] for entry in report["rejected"]}
    assert sorted(reasons) == [2, 17, 18, 33, 34]
    for index, words in {2: "truncated", 17: "not an image", 18: "empty", 33: "a hole here"}.items():
        assert words in reasons[index]
    assert report["rejected"][0]["description"] == "record 2 of photographs/train"
    text = table(read_report(folder))
    assert "35 images of 40 read" in text
    assert "rejected, 2: not an image" in text
    assert "fewest 11 (cow), most 12 (cat), mean 11.7" in text


def test_too_many_rejected_end_it(tmp_path):
    sources = {"train": Photographs(40, files=damaged_files())}
    with pytest.raises(RuntimeError, match=r"more than --max_rejected 0\.1.*remove .*incomplete") as error:
        write_set(sources, tmp_path, "photos", shard_images=16, max_rejected=0.1, workers=0)
    assert "record 17 of photographs/train: not an image" in str(error.value)
    assert os.listdir(tmp_path / "photos") == ["1.0.0.incomplete"]
    with pytest.raises(RuntimeError, match="more than --max_rejected"):  # nor does a second try let them pass
        write_set(sources, tmp_path, "photos", shard_images=16, max_rejected=0.1, workers=0)
    folder = write_set(sources, tmp_path, "photos", shard_images=16, max_rejected=1, workers=0)
    assert read_report(folder)["splits"]["train"]["images"] == 35


def test_a_shard_may_end_up_empty(tmp_path):
    files = dict.fromkeys(range(4, 8), b"no image")
    write_set({"train": Photographs(12, files=files)}, tmp_path, "photos", shard_images=4, max_rejected=1, workers=0)
    opened = open_source("photos", split="train", data_dir=tmp_path)
    assert [opened[index] for index in range(8)] == [Photographs(12)[index] for index in (*range(4), *range(8, 12))]


def test_a_lack_of_memory_or_files_rejects_nothing(tmp_path):
    for error in (MemoryError(), OSError(errno.EMFILE, "Too many open files")):
        with pytest.raises(type(error)):  # of the 40, number 1 is not looked at to know the source again
            write_set({"train": Photographs(40, files={1: error})}, tmp_path, "photos", max_rejected=1, workers=0)
        assert shard_bytes(tmp_path / "photos" / "1.0.0.incomplete") == {}


# ---------------------------------------------------------------------------------------------- again, and at once


def test_finished_shards_are_kept_and_others_made(written, tmp_path, monkeypatch):
    source, folder = written
    sources = {"train": source, "test": Photographs(7, "test")}
    begun, wrote, room = [], prepare_workers.write_shard, [2]

    def until_full(of, shard, *args):
        begun.append(shard.path.name)
        if len(begun) > room[0]:
            raise OSError("no space left on device")
        wrote(of, shard, *args)

    monkeypatch.setattr(prepare_workers, "write_shard", until_full)
    with pytest.raises(OSError, match="no space left"):
        write_set(sources, tmp_path, "photos", shard_images=16, workers=0)
    scratch = tmp_path / "photos" / "1.0.0.incomplete"
    first, second, third = (scratch / name for name in begun[:3])
    begun.clear()
    room[0] = 9
    assert [path.exists() for path in (first, second, third)] == [True, True, False]
    first.write_bytes(first.read_bytes()[:-1])  # as a disk may leave it; the sidecar knows better
    kept = second.stat().st_ino
    folder_again = write_set(sources, tmp_path, "photos", shard_images=16, workers=0)
    assert (folder_again / second.name).stat().st_ino == kept
    assert shard_bytes(folder_again) == shard_bytes(folder)
    assert len(begun) == 5 - 1
    before = folder_again.stat().st_mtime_ns
    assert write_set(sources, tmp_path, "photos", shard_images=16, workers=0) == folder_again
    assert folder_again.stat().st_mtime_ns == before


def test_a_class_name_that_is_not_utf8_is_told_before_the_first_image(tmp_path):
    for name in (os.fsdecode(b"cl\xe9"), "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "a.png")
    with pytest.raises(ValueError, match=r"class name 'cl\\udce9' is not valid UTF-8"):
        prepare_images(f"folder:{tmp_path / 'images'}", output=tmp_path / "sets", workers=0)
    assert not (tmp_path / "sets").exists()


def test_a_full_disk_is_told_and_nothing_looks_whole(tmp_path, monkeypatch):
    real = prepare_shards.ArrayRecordWriter
    monkeypatch.setattr(prepare_shards, "ArrayRecordWriter", lambda path, options: real("/dev/full", options))
    with pytest.raises(OSError, match=r"cannot write .*photos-train.*No space left on device.*is the disk full"):
        write_set({"train": Photographs(4)}, tmp_path, "photos", workers=0)
    scratch = tmp_path / "photos" / "1.0.0.incomplete"
    assert shard_bytes(scratch) == {}
    assert os.listdir(scratch / "sidecars") == []


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Each file is synced before it is renamed, its folder after, and the sidecar that vouches for it comes last."""
    order = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        order.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_replace(source, target):
        order.append(("rename", os.path.basename(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_set({"train": Photographs(4)}, tmp_path, "photos", workers=0)
    shard = next(name for what, name in order if what == "rename" and name.startswith("photos-train.array_record"))
    if ".json" in shard:  # the sidecar was renamed first
        pytest.fail("the sidecar came before its shard")
    renamed = order.index(("rename", shard))
    assert ("sync", shard) in order[:renamed]
    assert order[renamed + 1] == ("sync", "1.0.0.incomplete")
    sidecar = next(name for what, name in order[renamed:] if what == "rename" and ".json" in name)
    assert order.index(("sync", sidecar)) < order.index(("rename", sidecar))


@pytest.mark.parametrize("finish", [False, True])
def test_other_options_are_refused(tmp_path, finish):
    source = Photographs(8, files={} if finish else {0: b"text"})

    def write(source=source, **options):
        return write_set({"train": source}, tmp_path, "photos", **({"shard_images": 4, "workers": 0} | options))

    if finish:
        write()
    else:
        with pytest.raises(RuntimeError, match="rejected"):
            write()
    message = r"choose another --name or remove it:\n  shard_images: 4 in the folder, 5 now$"
    with pytest.raises(ValueError, match=message):
        write(shard_images=5)
    with pytest.raises(ValueError, match="short_side: None in the folder, 16 now"):
        write(conversion=Conversion(short_side=16))
    with pytest.raises(ValueError, match="source_digest"):
        write(Photographs(8, files={3: encoded(photograph(9, 9))}))


def test_another_programs_set_is_left_alone(data_dir, tmp_path):
    assert os.listdir(f"{data_dir}/digits") == ["1.0.0"]
    with pytest.raises(ValueError, match="written by another program; choose another --name"):
        prepare_images("digits", output=data_dir, data_dir=data_dir, workers=0)
    assert os.listdir(f"{data_dir}/digits") == ["1.0.0"]


def test_a_second_process_is_refused(tmp_path):
    source = Photographs(8)
    scratch = tmp_path / "photos" / "1.0.0.incomplete"
    scratch.mkdir(parents=True)
    with open(scratch / "prepare.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing"):
            write_set({"train": source}, tmp_path, "photos", workers=0)
    write_set({"train": source}, tmp_path, "photos", workers=0)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ({"train": Photographs(3)}, {"name": "My Photos"}, "TFDS allows lower-case letters.*'my_photos'"),
        ({"train": Photographs(3)}, {"shard_images": 0}, "shard_images=0"),
        ({"train": Photographs(3)}, {"workers": -1}, "workers=-1"),
        ({"train": Photographs(3)}, {"max_rejected": 2}, "max_rejected=2"),
        ({"train[:50%]": Photographs(3)}, {}, "must be a whole split"),
        ({"train": Photographs(0)}, {}, "holds no images"),
        ({}, {}, "no split"),
        ({"train": Masked(3)}, {}, "masks would be lost"),
        ({"a": Photographs(3), "b": Photographs(3, class_names=("x", "y", "z"))}, {}, "the same classes"),
    ],
)
def test_mistakes_are_told(tmp_path, sources, options, message):
    with pytest.raises(ValueError, match=message):
        write_set(sources, tmp_path, **({"name": "photos", "workers": 0} | options))
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------- as a user


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A folder of 1,200 files (of 30 pictures) in three folders, one file damaged."""
    folder = tmp_path_factory.mktemp("files") / "pets"
    pictures = [encoded(photograph(300 + seed, 400, seed)) for seed in range(30)]
    for index in range(1200):
        path = folder / ("cat", "cow", "dog")[index % 3] / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[index % 30])
    (folder / "dog" / "0500.jpg").write_bytes(pictures[0][:999])
    return folder


def command(pets, output, *words) -> list[str]:
    words = ["--output", str(output), "--short_side", "128", "--workers", "2", "--shard_images", "40", *words]
    return [sys.executable, "-m", "tinymim_jax", "prepare", f"folder:{pets}", *words]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TINYMIM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def start(words) -> subprocess.Popen:
    # In a shell's background jobs SIGINT is ignored, by their children too, these tests perhaps among them.
    heed_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, start_new_session=True, preexec_fn=heed_ctrl_c, **streams)


def wait_for_shards(process, scratch, more: int, before: int) -> int:
    """Waits until there are `more` finished shards than `before`; returns how many there are."""
    deadline = time.monotonic() + 300
    while (there := sum(1 for _ in scratch.glob("sidecars/*[0-9].json"))) < before + more:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return there


def test_no_interruption_shows_in_the_result(pets, tmp_path):
    scratch = tmp_path / "disturbed" / "pets_128" / "1.0.0.incomplete"
    rng = random.Random()
    count = 0
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = start(command(pets, tmp_path / "disturbed"))
        wait_for_shards(process, scratch, 2, before=count)
        time.sleep(rng.uniform(0, 0.1))
        if count < 6:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)  # to it alone: its workers must end with it, who hold its output open
        out, _ = process.communicate(timeout=300)
        count = wait_for_shards(process, scratch, 0, before=0)
        assert process.returncode == status, out
        assert "Traceback" not in out
        if status > 0:
            assert "run the same command again to resume" in out
            assert not list(scratch.glob("*.tmp"))
        with pytest.raises(FileNotFoundError):  # incomplete, so not there
            open_source("pets_128", split="train", data_dir=tmp_path / "disturbed")
    last = start(command(pets, tmp_path / "disturbed"))
    wait_for_shards(last, scratch, 1, before=count)
    os.killpg(last.pid, signal.SIGSTOP)
    second = subprocess.run(command(pets, tmp_path / "disturbed"), capture_output=True, text=True)
    assert second.returncode == 1
    assert "another process is writing" in second.stderr
    os.killpg(last.pid, signal.SIGCONT)
    out, _ = last.communicate(timeout=300)
    assert last.returncode == 0, out
    assert "are in finished shards, which are kept" in out

    undisturbed = subprocess.run(command(pets, tmp_path / "once"), capture_output=True, text=True, check=True)
    folders = [tmp_path / name / "pets_128" / "1.0.0" for name in ("disturbed", "once")]
    assert shard_bytes(folders[0]) == shard_bytes(folders[1])
    assert len(shard_bytes(folders[0])) == 30
    reports = [read_report(folder)["splits"] for folder in folders]
    assert reports[0] == reports[1]
    for line in ("1,199 images of 1,200 read, 1,199 resized, 1 rejected", "dog/0500.jpg: ", str(folders[1])):
        assert line in undisturbed.stdout
    assert "1,200/1,200 images (100 %)" in undisturbed.stdout
    source = open_source("pets_128", split="train", data_dir=tmp_path / "once")
    assert len(source) == 1199
    place = next(i for i in range(len(source)) if "cow/0001.jpg" in source.describe(i))
    assert source[place]["label"] == 1
    assert simplejpeg.decode_jpeg_header(source[place]["image"])[:2] == (128, 128 * 400 // 301)


def test_the_command_takes_every_option(capsys, data_dir, tmp_path):
    words = ["digits", "--data_dir", data_dir, "--output", tmp_path, "--workers", 0, "--name", "eight", "--upright"]
    code, out, err = run(capsys, *words, "--splits", "test", "--quality", 80, "--short_side", 4, "--max_rejected", 0)
    assert code == 0, err
    assert "500 images of 500 read, 500 resized, 0 rejected" in out
    assert out.endswith(f"{tmp_path}/eight/1.0.0\n")
    opened = open_source("eight", split="test", data_dir=tmp_path)
    assert np.asarray(Image.open(io.BytesIO(opened[0]["image"]))).shape == (4, 4, 3)
    assert read_report(tmp_path / "eight" / "1.0.0")["settings"]["quality"] == 80
    code, again, err = run(capsys, *words, "--splits", "test", "--quality", 80, "--short_side", 4)
    assert (code, again) == (0, out[out.index("test:") :])  # done already: the same report


def test_the_commands_of_the_docs_run(capsys, data_dir, tmp_path, monkeypatch):
    """As written, with other paths and the digits instead of ImageNet."""
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    for index in range(6):
        path = tmp_path / "data" / "pets" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photograph(20, 20, index), "PNG"))
    page = (pathlib.Path(__file__).parents[1] / "docs" / "data.md").read_text()
    for text in (page, prepare_command._EPILOG):
        lines = {line.split(" #")[0].strip() for line in text.splitlines()}
        lines = sorted(line for line in lines if line.startswith("tinymim prepare") and "--output" in line)
        assert len(lines) == 2
        for line in lines:
            line = line.replace("/data/", f"{tmp_path}/data/").replace("imagenet2012", "digits")
            code, _, err = run(capsys, *line.split()[2:], "--workers", 0)
            assert code == 0, err
    assert sorted(os.listdir(tmp_path / "data" / "sets")) == ["digits_256", "pets"]
    opened = open_source("pets", split="train", data_dir=tmp_path / "data" / "sets")
    assert (len(opened), opened.class_names) == (6, ("cat", "dog"))


def test_options_of_output_need_it(capsys):
    code, _, err = run(capsys, "digits", "--short_side", 256)
    assert code == 1
    assert "--short_side needs --output DIR" in err
    code, _, err = run(capsys, "folder:/data/pets")
    assert code == 1
    assert "give the output folder: --output DIR" in err


def test_without_output_a_tfds_set_is_prepared(capsys, data_dir):
    code, out, _ = run(capsys, "digits", "--data_dir", data_dir)
    assert (code, out) == (0, f"{data_dir}/digits/1.0.0\n")


def test_help_teaches_both_meanings(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for words in ("tinymim prepare imagenet2012\n", "Without --output", "prepare folder:/data/pets --output"):
        assert words in out


def test_progress_tells_what_is_left(caplog):
    with caplog.at_level(logging.INFO, logger="tinymim_jax"):
        prepare_command._log_progress(prepare_workers.Progress(250, 1000, 2_500_000, 10.0))
        prepare_command._log_progress(prepare_workers.Progress(0, 1000, 0, 0.0))
    assert caplog.messages == [
        "250/1,000 images (25 %) | 10 images/s | ETA 1m15s | 2.5 MB read",
        "0/1,000 images (0 %) | 0 images/s | ETA - | 0 bytes read",
    ]


@pytest.mark.parametrize(
    ("source", "short_side", "name"),
    [
        ("imagenet2012", None, "imagenet2012"),
        ("imagenet2012", 256, "imagenet2012_256"),
        ("imagenet_a:0.1.0", None, "imagenet_a"),
        ("oxford/small:1.*.*", None, "oxford"),
        ("folder:/x/My-Pets/", 256, "my_pets_256"),
        ("folder:../2024", None, "set_2024"),
        ("folder:/", None, "folder"),
        ("folder:/data/pets/{split}", None, "pets"),
        ("tar:/data/shots-000.tar.gz", None, "shots_000"),
        ("tar:/data/pets/train-*.tar", None, "pets"),
    ],
)
def test_default_names(source, short_side, name):
    assert default_name(source, short_side) == name


def test_quantiles_are_those_of_the_images():
    widths = np.random.default_rng(0).integers(1, 400, 1001).tolist()
    counts = {str(value): widths.count(value) for value in set(widths)}
    account = {"first": 0, "last": 1001, "records": 1001, "file_bytes": 1, "bytes_before": 1, "bytes_after": 1}
    account |= {key: {} for key in ("classes", "formats", "actions", "heights", "short_sides")}
    report = split_report([account | {"widths": counts, "rejected": [], "warnings": []}], ())
    want = np.percentile(widths, [0, 5, 25, 50, 75, 95, 100], method="lower")
    assert list(report["width"].values()) == want.tolist()


def test_sizes_in_words():
    assert [size(count) for count in (0, 999, 1000, 1_234_567, 37e9, 2e15)] == [
        *("0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "37.0 GB", "2000.0 TB")
    ]
