"""From an image, in a file or decoded, to the pixels that the network is given.

Every image of the project that is trained on, evaluated or predicted from a file is read here.
"""

import contextlib
import io
import os
import sys
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image

from .find_file import find_file

with contextlib.suppress(ImportError):  # the extra `heic`
    from pi_heif import register_heif_opener

    register_heif_opener()

# What Pillow reads, HEIC with the extra `heic`; of a kind that it does not know it says so.
SUFFIXES = {
    *(".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heics", ".heif", ".heifs", ".hif"),
    *(".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".psd", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
}
HEIC = (b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")  # brands of files
ORIENTATION = 274  # of the EXIF tags: how the camera was held


class ImageError(ValueError):
    """An image that cannot be read, or must not be; the message says which and why."""


def read_image(path: str | os.PathLike[str], format: str, max_pixels: int) -> np.ndarray:
    """Read an image file as 8-bit colours, upright.

    Grey, palette, CMYK and the like become colours; alpha is dropped, as Detectron2 and OpenCV do;
    16-bit values v become v / 257, rounded; the orientation in the EXIF data is applied; of an
    animation the first picture is read.

    Args:
        path: of the file, as Detectron2's `PathManager` understands it.
        format: order of the channels, "BGR" or "RGB" (``INPUT.FORMAT``).
        max_pixels: images of more are refused before they are decoded (``INPUT.MAX_PIXELS``).

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: the file is missing, no image, damaged, too large, or has float or 32-bit
            values; the message names the path.
    """
    path = os.fspath(path)
    try:
        with PathManager.open(find_file(path), "rb") as file:
            data = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path}: cannot be read: {reason}") from error
    if not data:
        raise ImageError(f"{path}: the file is empty; copy or download it anew")
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: {error} Make the image smaller") from error
    except Exception as error:
        is_heic = data[4:8] == b"ftyp" and data[8:12] in HEIC
        hint = " HEIC is read after pip install 'inspose_d2[heic]'" if is_heic else ""
        raise ImageError(
            f"{path}: no image that Pillow knows, or its beginning is damaged; does another "
            f"program open it?{hint}"
        ) from error
    with image:
        try:
            return to_array(image, format, max_pixels, data)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error.__cause__


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read the size of an image from its header.

    Args:
        path: of the file, as Detectron2's `PathManager` understands it.

    Returns:
        (width, height) of the upright image, as :func:`read_image` gives it.

    Raises:
        ImageError: the file is missing, or no image.
    """
    try:
        with PathManager.open(find_file(os.fspath(path)), "rb") as file, Image.open(file) as image:
            width, height = image.size
            return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)
    except OSError as error:
        reason = error.strerror or "no image that Pillow knows"
        raise ImageError(f"{os.fspath(path)}: {reason}") from error
    except Exception as error:
        raise ImageError(f"{os.fspath(path)}: {error or type(error).__name__}") from error


def to_array(
    image: Image.Image,
    format: str,
    max_pixels: int,
    data: bytes | None = None,
) -> np.ndarray:
    """Turn a Pillow image into what :func:`read_image` makes of its file.

    Args:
        image: not changed; decoded, if it is not yet.
        format: see :func:`read_image`.
        max_pixels: the same.
        data: the file's content; Pillow keeps but 8 bits of 16-bit colours.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: it is damaged, too large, or has float or 32-bit values.
    """
    if format not in ("BGR", "RGB"):
        raise ValueError(f"INPUT.FORMAT must be 'BGR' or 'RGB', got {format!r}")
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{width} x {height} pixels are more than INPUT.MAX_PIXELS {max_pixels}; make the "
            "image smaller, or raise the limit if it can be trusted"
        )
    if width * height == 0:
        raise ImageError(f"{width} x {height}: the image has no pixels")
    # Pillow forgets it when it decodes.
    has_16_bit_colours = image.format in ("PNG", "TIFF") and _is_16_bit_colour(image)
    try:
        # Before the EXIF data, for which Pillow decodes some formats; a second time it does not
        # say what is wrong. Also before OpenCV, which paints over what is damaged.
        image.load()
        pixels = _decode_16_bits(data) if data and has_16_bit_colours else _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:
        reason = error or type(error).__name__
        raise ImageError(
            f"damaged, or cut off: {reason}; copy or download the image anew"
        ) from error
    pixels = _upright(pixels, _orientation(image))
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if format == "BGR" else pixels.copy()


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Copy pixels (H, W, 3) uint8 into the form (3, H, W) that models take."""
    # A copy: ascontiguousarray would leave a flipped image of one pixel, which torch refuses.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8; 1 of a TIFF file, which Pillow and OpenCV turn already."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  the EXIF data is damaged, the pixels are not
        return 1


def _is_16_bit_colour(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has 16 bits in each of several channels."""
    tiles: list[Any] = getattr(image, "tile", [])
    return image.mode[0] in "RL" and any(";16" in str(tile[3]) for tile in tiles)


def _decode_16_bits(data: bytes) -> np.ndarray:
    """Decode 16-bit colours to 8-bit RGB (H, W, 3); alpha is dropped."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise ImageError(
            "damaged, or of a kind of 16-bit colours that OpenCV does not know; save it with 8 bits"
        )
    return _to_8_bits(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a decoded image to 8-bit RGB (H, W, 3)."""
    # Mode I is 32 bits wide; Pillow before 11.3 gives it to 16-bit PNG, and still to 16-bit PGM.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return np.repeat(_to_8_bits(np.asarray(image))[:, :, None], 3, axis=2)
    if image.mode in ("F", "I"):
        values = "float" if image.mode[0] == "F" else "32-bit"
        raise ImageError(
            f"mode {image.mode!r}, {values} values, whose range is unknown; scale them to 0..255 "
            "and save them with 8 bits"
        )
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns where transparency is lost on the way
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit values to uint8: 65535 = 257 * 255."""
    return ((values.astype(np.int32) + 128) // 257).astype(np.uint8)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo how the camera was held: EXIF orientation 1 to 8, anything else is 1."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's augmentation, whose sides here have a pixel at least.

    It rounds the shorter side of an image of 1 x 5000 to 0, which nothing can be resized to. With
    OpenCV sizes and pixels are those of mmdetection, which the authors' model was trained with.
    """

    def __init__(
        self,
        short_edge_length: Any,
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = Image.Resampling.BILINEAR,
        library: str = "pillow",
    ) -> None:
        """Set the sizes.

        Args:
            short_edge_length: as Detectron2 takes it, pixels; 0 does not resize.
            max_size: of the longer side, pixels.
            sample_style: "range" or "choice".
            interp: of Pillow.
            library: "pillow" or "opencv" (``INPUT.RESIZE``). OpenCV interpolates between two
                pixels along each side, where Pillow averages when it makes an image smaller.
        """
        super().__init__(short_edge_length, max_size, sample_style, interp)
        self.library = library

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Choose a size for an image (H, W, 3)."""
        if self.library == "opencv":
            return self._opencv_transform(*image.shape[:2])
        return _at_least_a_pixel(super().get_transform(image))

    def _opencv_transform(self, height: int, width: int) -> T.Transform:
        sizes = self.short_edge_length
        chosen = np.random.randint(sizes[0], sizes[1] + 1) if self.is_range else None
        size = np.random.choice(sizes) if chosen is None else chosen
        if size == 0:
            return T.NoOpTransform()
        # One factor, rounded once; Detectron2 rounds the limits of both sides one after the other.
        factor = min(self.max_size / max(height, width), size / min(height, width))
        new = (max(int(side * factor + 0.5), 1) for side in (height, width))
        return OpenCVResizeTransform(height, width, *new)


class OpenCVResizeTransform(T.ResizeTransform):
    """Resizes 8-bit images by OpenCV's bilinear interpolation."""

    def __init__(self, h: int, w: int, new_h: int, new_w: int) -> None:
        """Take sizes (H, W) before and after."""
        super().__init__(h, w, new_h, new_w, Image.Resampling.BILINEAR)

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize (H, W, 3) uint8; with `interp`, for segmentations, as Detectron2 does."""
        if interp is not None:
            return super().apply_image(img, interp)
        return cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)


class ResizeScale(T.ResizeScale):
    """Detectron2's augmentation, whose sides here have a pixel at least."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Choose a size for an image (H, W, 3)."""
        return _at_least_a_pixel(super().get_transform(image))


def _at_least_a_pixel(transform: T.Transform) -> T.Transform:
    if isinstance(transform, T.ResizeTransform):
        transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
    return transform
