"""Image files of every kind, good and bad; made here, read back as 8-bit colours."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image, ImageFile

from inspose_d2.data.images import ImageError, ResizeShortestEdge, read_image, to_array

MAX_PIXELS = 10_000
SIZE = (12, 20)  # height, width
pytestmark = pytest.mark.fault


def colours(dtype: type = np.uint8) -> np.ndarray:
    """Random RGB picture (H, W, 3) of all values of its type."""
    high = np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, high, (*SIZE, 3)).astype(dtype)


def read(path: Path, order: str = "RGB") -> np.ndarray:
    pixels = read_image(path, order, MAX_PIXELS)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags.writeable
    return pixels


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG file by hand: `colour` 0 is grey, 2 is RGB, 4 is grey with alpha, 6 is RGBA."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_of(values: np.ndarray, colour: int) -> bytes:
    """A 16-bit PNG of values (H, W, C)."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, zlib.compress(rows), bits=16, colour=colour)


def tiff_of(values: np.ndarray, orientation: int) -> bytes:
    """A TIFF file of RGB values (H, W, 3), by hand."""
    height, width = values.shape[:2]
    data = values.astype("<" + values.dtype.str[1:]).tobytes()
    tags = {
        256: width, 257: height, 258: 8, 259: 1, 262: 2, 273: 14, 274: orientation, 277: 3,
        278: height, 279: len(data),
    }  # fmt: skip
    file = struct.pack("<2sHIHHH", b"II", 42, 14 + len(data), *[8 * values.itemsize] * 3) + data
    file += struct.pack("<H", len(tags))
    for tag, value in tags.items():
        long = tag in (273, 279)
        count = 3 if tag == 258 else 1  # bits of each channel, which stand at byte 8
        file += struct.pack("<HHII", tag, 4 if long else 3, count, value)
    return file + struct.pack("<I", 0)


def in_8_bits(values: np.ndarray) -> np.ndarray:
    return np.rint(values / 257).astype(np.uint8)


def png_bytes(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


PNG = png_bytes(Image.fromarray(colours()))
DEEP = png_of(colours(np.uint16), colour=2)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_ordinary_file_is_what_detectron2_reads(tmp_path: Path, order: str) -> None:
    path = save(tmp_path / "image.jpg", Image.fromarray(colours()), quality=90)
    expected = detection_utils.read_image(str(path), order)
    assert np.array_equal(read(path, order), expected)
    assert np.array_equal(read_image(str(path), order, MAX_PIXELS), expected)


def test_grey_image_has_three_equal_channels(tmp_path: Path) -> None:
    grey = colours()[:, :, 0]
    path = save(tmp_path / "grey.png", Image.fromarray(grey))
    assert np.array_equal(read(path), np.dstack([grey] * 3))


def test_black_and_white_become_0_and_255(tmp_path: Path) -> None:
    bits = colours()[:, :, 0] > 127
    path = save(tmp_path / "bits.png", Image.fromarray(bits))
    assert np.array_equal(read(path), np.dstack([bits * 255] * 3))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    # Cyan, magenta, yellow and black ink in full: no red, no green, no blue, nothing.
    inks = np.kron(255 * np.eye(4, dtype=np.uint8)[None], np.ones((8, 8, 1), np.uint8))
    path = save(tmp_path / "inks.jpg", Image.fromarray(inks, "CMYK"), quality=100)
    expected = [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    assert np.abs(read(path)[4, 4::8].astype(int) - expected).max() <= 3


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 100, 255])])
def test_palette_becomes_its_colours(tmp_path: Path, transparency: object) -> None:
    indices = np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8)
    palette = np.array([[255, 0, 0], [10, 20, 30], [0, 0, 255]], np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    path = save(tmp_path / "palette.png", image, **options)
    assert np.array_equal(read(path), palette[indices])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(tmp_path: Path, mode: str) -> None:
    rgb = colours()
    if mode == "LA":
        rgb[:] = rgb[:, :, :1]
    alpha = np.arange(240, dtype=np.uint8).reshape(SIZE)
    channels = np.dstack([rgb if mode == "RGBA" else rgb[:, :, 0], alpha])
    path = save(tmp_path / "alpha.png", Image.fromarray(channels, mode))
    assert np.array_equal(read(path), rgb)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_is_divided_by_257(tmp_path: Path, colour: int, channels: int) -> None:
    values = np.dstack([colours(np.uint16), colours(np.uint16)])[:, :, :channels]
    values[0, :4] = np.array([0, 128, 129, 65535])[:, None]  # 0, 0, 1, 255
    path = tmp_path / "deep.png"
    path.write_bytes(png_of(values, colour))
    expected = in_8_bits(values)
    assert expected[0, :4, 0].tolist() == [0, 0, 1, 255]
    own = expected[:, :, :3] if channels > 2 else np.dstack([expected[:, :, 0]] * 3)
    assert np.array_equal(read(path), own)
    assert np.array_equal(read(path, "BGR"), own[:, :, ::-1])


def test_16_bit_tiff_and_pgm_are_divided_by_257(tmp_path: Path) -> None:
    values = colours(np.uint16)
    for name, pixels in (("rgb.tiff", values), ("grey.tiff", values[:, :, 0])):
        assert cv2.imwrite(str(tmp_path / name), pixels)
    header = b"P5 %d %d 65535\n" % (SIZE[1], SIZE[0])
    (tmp_path / "grey.pgm").write_bytes(header + values[:, :, 0].astype(">u2").tobytes())
    expected = in_8_bits(values)
    assert np.array_equal(read(tmp_path / "rgb.tiff", "BGR"), expected)
    for name in ("grey.tiff", "grey.pgm"):
        assert np.array_equal(read(tmp_path / name), np.dstack([expected[:, :, 0]] * 3))


@pytest.mark.parametrize(
    ("dtype", "named"), [(np.float32, "mode 'F', float"), (np.int32, "mode 'I', 32-bit")]
)
def test_float_and_32_bit_images_are_refused_by_name(
    tmp_path: Path, dtype: type, named: str
) -> None:
    path = save(tmp_path / "values.tiff", Image.fromarray(np.ones(SIZE, dtype)))
    with pytest.raises(ImageError, match=rf"values\.tiff.*{named}.*scale them"):
        read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "deep png", "tif", "deep tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    upright = cv2.resize(np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 50, (48, 32))
    upright = np.dstack([upright, upright // 2, 255 - upright])
    # How a camera that is held like this stores the picture: the inverse turn.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"turned.{kind[-3:]}"
    if kind == "deep png":
        data = png_of(stored.astype(np.uint16) * 257, colour=2)
        tag = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        path.write_bytes(data[:33] + tag + data[33:])  # behind the header
    elif kind[-3:] == "tif":
        path.write_bytes(tiff_of(stored if kind == "tif" else stored * np.uint16(257), orientation))
    else:
        save(path, Image.fromarray(stored), exif=exif, quality=100)
    pixels = read(path)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= (8 if kind == "jpg" else 0)
    if kind in ("jpg", "png"):  # Detectron2 turns the same way (TIFF twice)
        assert np.array_equal(pixels, detection_utils.read_image(str(path), "RGB"))


def test_damaged_exif_data_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(PNG[:33] + chunk(b"eXIf", b"MM\0*\xff\xff") + PNG[33:])
    assert np.array_equal(read(path), colours())


@pytest.mark.parametrize("side", [13_000, 9_500, 20_000])
def test_decompression_bomb_is_refused_from_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    # 169 million pixels in 20 KB: Pillow warns. It says nothing of 90 million, refuses 400 million.
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(b"\0" * 1_000_000) for _ in range(20)) + rows.flush()
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, data))
    assert path.stat().st_size < 21_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match=r"bomb\.png.*pixels.*smaller"):
        read_image(path, "BGR", 89_478_485)


def test_limit_of_pixels_is_the_last_that_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "image.png", Image.fromarray(colours()))
    assert read_image(path, "BGR", 240).shape == (*SIZE, 3)
    with pytest.raises(ImageError, match=r"20 x 12 pixels are more than INPUT\.MAX_PIXELS 239"):
        read_image(path, "BGR", 239)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"not an image", "no image that Pillow knows"),
        (PNG[:20], "no image that Pillow knows"),
        (PNG[:-100], "damaged, or cut off"),
        (PNG[:41] + b"\xff" * 40 + PNG[81:], "damaged, or cut off"),
        (DEEP[:-300], "damaged, or cut off"),  # OpenCV would fill in the rest
        (DEEP[:300] + b"\xff" * 40 + DEEP[340:], "damaged, or cut off"),
    ],
)
def test_bad_file_is_refused_with_path_and_reason(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"{path}.*{reason}"):
        read(path)


def test_16_bit_colours_that_opencv_does_not_know_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep.png").write_bytes(DEEP)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    with pytest.raises(ImageError, match=r"deep\.png.*OpenCV does not know; save it with 8 bits"):
        read(tmp_path / "deep.png")


def test_jpeg_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "image.jpg", Image.fromarray(colours()))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ImageError, match=r"image\.jpg.*cut off"):
        read(path)


def test_folder_and_name_with_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=f"{tmp_path}.*directory"):
        read(tmp_path)
    with pytest.raises(ImageError, match="null byte"):
        read_image("a\0b", "BGR", MAX_PIXELS)


def test_other_order_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT must be 'BGR' or 'RGB', got 'L'"):
        to_array(Image.fromarray(colours()), "L", MAX_PIXELS)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1, 100_000), (30, 40), (900, 31)])
def test_resizing_keeps_a_pixel_and_else_is_detectron2s(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    ours = ResizeShortestEdge([800, 800], 1333).get_transform(image)
    theirs = T.ResizeShortestEdge([800, 800], 1333).get_transform(image)
    assert (ours.new_h, ours.new_w) == (max(theirs.new_h, 1), max(theirs.new_w, 1))
    assert ours.apply_image(image).shape == (ours.new_h, ours.new_w, 3)


def test_shorter_side_0_does_not_resize() -> None:
    image = colours()
    transform = ResizeShortestEdge([0, 0], 1333).get_transform(image)
    assert np.array_equal(transform.apply_image(image), image)
