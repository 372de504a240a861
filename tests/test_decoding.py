"""Decoding against Pillow: every mode and format, damage, orientation, reduced sizes, unusual files."""

import io

import numpy as np
import pytest
import simplejpeg
from pictures import encoded, psnr
from PIL import EpsImagePlugin, Image, ImageOps

from tinymim_jax.data.pipeline import eval_batches, train_batches
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.views import decoding, transforms
from tinymim_jax.data.views.decoding import Picture, Undecodable, decode
from tinymim_jax.data.views.transforms import Augment, EvalView, random_resized_crop_params, resized_crop

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


# ---------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 98, "subsampling": 0}])
def test_decodes_jpeg_as_pillow_does(mode, options):
    data = encoded(Image.fromarray(NOISE).convert(mode), "JPEG", **options)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    got = decode(data)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP"])
def test_decodes_other_formats_as_pillow_does(mode, file_format):
    picture = Image.fromarray(NOISE).convert(mode)
    if file_format == "WEBP":
        picture = picture.convert("RGBA" if "A" in mode else "RGB")
    elif file_format == "BMP" and "A" in mode:
        picture = picture.convert("L")
    data = encoded(picture, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    np.testing.assert_array_equal(decode(data), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(file_format):
    levels = (np.arange(64 * 64, dtype=np.uint32) * 16).astype(np.uint16).reshape(64, 64)
    got = decode(encoded(Image.fromarray(levels), file_format))
    np.testing.assert_array_equal(got, np.repeat((levels // 256).astype(np.uint8)[..., None], 3, axis=-1))


def test_a_warning_is_no_reason_to_refuse_a_jpeg():
    data = encoded(NOISE, "JPEG")
    scan = data.index(b"\xff\xda")
    with_stray_bytes = data[:scan] + b"\x00\x00\x00" + data[scan:]  # "extraneous bytes before marker"
    np.testing.assert_array_equal(decode(with_stray_bytes), decode(data))


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(NOISE, "JPEG")[:-400], encoded(NOISE, "PNG")[:500]])
def test_damaged_files_raise(data):
    with pytest.raises(Undecodable):
        decode(data)


def test_a_decompression_bomb_is_refused_before_memory_is_taken():
    data = bytearray(encoded(NOISE, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # height and width 65500
    # Our own message and not Pillow's, which comes after the fast decoder has asked for 12 GB.
    with pytest.raises(Undecodable, match="refused as a decompression bomb, the limit is 178,956,970"):
        Picture(bytes(data))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_large_images_are_converted_in_strips_with_the_same_pixels(mode, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 65536, (37, 29), np.uint16)
    picture = Image.fromarray(levels) if mode == "I;16" else Image.fromarray(NOISE).convert(mode)
    data = encoded(picture, "TIFF")
    whole = decode(data)
    want = (levels >> 8)[..., None].repeat(3, -1) if mode == "I;16" else np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(whole, want)
    monkeypatch.setattr(decoding, "_STRIP", 100)
    monkeypatch.setattr(decoding, "_LARGE", 100)
    np.testing.assert_array_equal(decode(data), whole)
    needed = picture.width * picture.height * (3 + {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(mode, 4))
    monkeypatch.setattr(decoding, "_MAX_BYTES", needed)
    decode(data)
    monkeypatch.setattr(decoding, "_MAX_BYTES", needed - 1)
    with pytest.raises(Undecodable, match="GiB of memory to decode, the limit is"):
        decode(data)


def test_postscript_is_not_run(monkeypatch):
    programs = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: programs.append(args))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(Undecodable, match=r"not an image in one of the supported formats: JPEG, .*PNG"):
        decode(eps)
    assert not programs


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (
            np.linspace(0, 4095, 64).astype(np.uint16),
            "16 bits but gray levels of at most 4,095, so it would look black",
        ),
        (np.linspace(0, 255, 64).astype(np.int32), "gray levels of at most 255"),
        (np.linspace(0, 70000, 64).astype(np.int32), "from 0 to 70,000, outside 16 bits"),
        (np.linspace(-5, 65535, 64).astype(np.int32), "from -5 to 65,535"),
        (np.linspace(0, 1, 64).astype(np.float32), "floating-point numbers"),
    ],
)
def test_greys_without_a_known_white_are_refused(levels, message):
    data = encoded(Image.fromarray(levels.reshape(8, 8)), "TIFF")
    with pytest.raises(Undecodable, match=f"{message}.*convert it to 8 bits, or scale it to the full 16-bit range"):
        decode(data)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_greys_of_sixteen_bits_and_black_are_read(dtype):
    for high in (0, 4096, 65535):
        levels = np.linspace(0, high, 64).astype(dtype).reshape(8, 8)
        got = decode(encoded(Image.fromarray(levels), "TIFF"))
        np.testing.assert_array_equal(got, (levels // 256).astype(np.uint8)[..., None].repeat(3, -1))


# ---------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_turns_as_exif_says(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(NOISE, file_format, exif=exif)
    stored = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode(data), np.asarray(stored))
    want = np.asarray(ImageOps.exif_transpose(stored))
    picture = Picture(data, upright=True)
    assert picture.size == want.shape[:2]
    np.testing.assert_array_equal(picture.pixels(), want)


# ---------------------------------------------------------------------------------------------- reduction


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_reduced_picture_is_the_mean_of_blocks(photo, reduction, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photo[:421, :635] if orientation == 1 else photo[:424, :632]
    data = encoded(stored, "JPEG", quality=95, subsampling=0, exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).reduce(reduction))
    picture = Picture(data, upright=True)
    assert picture.reducible
    got = picture.pixels(reduction)
    assert got.shape == want.shape
    assert psnr(got, want) > 35  # the decoder's filter is a cosine transform's low frequencies, not quite a box


def test_large_pictures_are_reduced_while_decoding_and_look_the_same(photo, monkeypatch):
    large = Image.fromarray(photo).resize((2560, 1708), Image.Resampling.BICUBIC)
    data = encoded(large, "JPEG", quality=92)
    heights = []
    original = simplejpeg.decode_jpeg

    def recorded(*args, **kwargs):
        pixels = original(*args, **kwargs)
        heights.append(pixels.shape[0])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", recorded)
    figures = []
    for seed in range(20):
        box = random_resized_crop_params(np.random.default_rng(seed), 1708, 2560, (0.2, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = box
        crop = pillow(data).crop((left, top, left + width, top + height))
        want = np.asarray(crop.resize((96, 96), Image.Resampling.BICUBIC))
        figures.append(psnr(resized_crop(Picture(data), box, (96, 96)), want))
    assert np.mean(figures) > 45
    assert min(figures) > 40
    assert max(heights) <= 854  # half of it, or less


def test_a_crop_is_not_taken_from_a_reduced_picture_when_that_would_show(photo):
    picture = Picture(encoded(photo, "JPEG"))
    got = resized_crop(picture, (0, 0, 427, 640), (214, 214))  # less than twice as high: all pixels count
    want = np.asarray(Image.fromarray(picture.pixels()).resize((214, 214), Image.Resampling.BICUBIC))
    assert psnr(got, want) > 55


def test_a_picture_that_cannot_be_turned_as_blocks_is_not_reduced(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert not Picture(encoded(photo[:421, :635], "JPEG", exif=exif), upright=True).reducible


# ---------------------------------------------------------------------------------------------- rows left out


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"restart_marker_rows": 1},
        {"optimize": True, "comment": b"\xff\xda \xff\xc0 \xff\xd9"},
    ],
)
def test_rows_that_are_decoded_are_those_of_the_whole(photo, options):
    data = encoded(photo, "JPEG", quality=90, **options)
    whole = np.asarray(pillow(data))
    for rows in (1, 7, 16, 17, 200, 333, 390, 427):
        got = Picture(data).pixels(rows=rows)
        assert rows <= len(got) <= rows + 32
        np.testing.assert_array_equal(got[:rows], whole[:rows])


def test_grey_rows_too(photo):
    data = encoded(Image.fromarray(photo).convert("L"), "JPEG")
    np.testing.assert_array_equal(Picture(data).pixels(rows=50)[:50], np.asarray(pillow(data))[:50])


def test_all_rows_are_decoded_where_leaving_some_out_would_go_wrong_or_hide_damage(photo):
    progressive = encoded(photo, "JPEG", progressive=True)
    assert Picture(progressive).pixels(rows=50).shape == photo.shape
    with pytest.raises(Undecodable):
        Picture(encoded(photo, "JPEG")[:-5000]).pixels(rows=50)
    data = encoded(photo, "JPEG")
    assert Picture(data, several_views=True).pixels(rows=50).shape == photo.shape
    twice = Picture(data)
    assert len(twice.pixels(rows=50)) < 100
    assert twice.pixels(rows=50).shape == photo.shape  # asked once more, it will be asked again


# ---------------------------------------------------------------------------------------------- awkward files

AWKWARD = {
    "cmyk": encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
    "palette": encoded(Image.fromarray(NOISE).convert("P"), "PNG"),
    "grey": encoded(Image.fromarray(NOISE).convert("L"), "JPEG"),
    "sixteen bits": encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 256), "PNG"),
    "animated": encoded(
        NOISE, "GIF", save_all=True, append_images=[Image.fromarray(255 - NOISE), Image.fromarray(NOISE // 2)]
    ),
    "one pixel": encoded(NOISE[:1, :1], "PNG"),
    "strip": encoded(np.tile(NOISE[:2], (1, 375, 1)), "PNG"),  # 30000 x 2
    "png named jpeg": encoded(NOISE, "PNG"),
}
USELESS = {
    "truncated jpeg": encoded(NOISE, "JPEG")[:-300],
    "truncated png": encoded(NOISE, "PNG")[:300],
    "zero bytes": b"",
    "no image": b"<html>404 Not Found</html>" * 20,
}


class Awkward(Source):
    """All files above, then so many intact ones that four damaged ones are a small share."""

    name, split, class_names = "awkward", "train", ()

    def __init__(self):
        self._files = [*AWKWARD.values(), *USELESS.values(), encoded(NOISE, "JPEG")]

    def __len__(self):
        return 6000

    def __getitem__(self, index):
        return {"image": self._files[min(index, len(self._files) - 1)], "label": -1}


def test_awkward_files_are_seen_as_pillow_sees_them_and_useless_ones_replaced():
    view = EvalView(48, 56)
    with eval_batches(Awkward(), view=view, batch_size=16) as batches:
        batch = next(batches)
        assert batches.substitutions == len(USELESS)
    for row, name in enumerate(AWKWARD):
        image = pillow(AWKWARD[name])
        if name == "sixteen bits":  # where Pillow's conversion of grey would clip to white
            image = Image.fromarray(NOISE[..., 0]).convert("RGB")
        short = 56 / min(image.size)
        size = [max(56, int(side * short)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - 48) / 2), round((size[1] - 48) / 2)
        image = image.crop((left, top, left + 48, top + 48))
        np.testing.assert_array_equal(batch["image"][row], np.asarray(image), err_msg=name)
    good = batch["image"][-1]
    for row in range(len(AWKWARD), len(batch["image"])):
        np.testing.assert_array_equal(batch["image"][row], good)


def test_the_middle_of_a_strip_is_made_alone_where_all_of_it_would_be_huge(monkeypatch):
    strip = np.random.default_rng(1).integers(0, 256, (4, 5001, 3), dtype=np.uint8)
    whole = EvalView(48, 56)(strip)
    monkeypatch.setattr(transforms, "_MAX_RESIZED", 10**6)
    assert np.abs(EvalView(48, 56)(strip).astype(int) - whole).max() <= 1


def test_awkward_files_can_be_augmented():
    with train_batches(Awkward(), augment=Augment(32), batch_size=500, seed=0) as batches:
        for _ in range(12):  # one epoch: every file once
            assert next(batches)["image"].shape == (500, 32, 32, 3)
        assert batches.substitutions == len(USELESS)
