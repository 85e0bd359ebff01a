"""Reading image files: which are read, and what of them is trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from gpu_agent.lora.errors import DatasetError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
#: Photographs that Pillow does not read by itself.
FOREIGN = frozenset({".heic", ".heif", ".jxl", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw"})
#: Nobody trains on more by intention.
MOST_PIXELS = 100_000_000
_EXIF_ORIENTATION = 0x0112
#: EXIF orientations that exchange width and height.
_TURNED = frozenset({5, 6, 7, 8})
_TRANSPARENT = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
#: Brands of an ISO media file that hold a photograph in HEVC.
_HEIC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"})


@dataclass(frozen=True)
class Look:
    """What an image's header says.

    Attributes:
        size: width and height in pixels, upright.
        animated: it has several frames, of which the first is taken.
    """

    size: tuple[int, int]
    transparent: bool
    animated: bool


def look(path: Path) -> Look:
    """Read the header alone. Raises: DatasetError `dataset.image`."""

    def read(image: Image.Image) -> Look:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise _unfit(path, f"has too many pixels ({width}x{height}, at most 100 million)")
        if image.getexif().get(_EXIF_ORIENTATION) in _TURNED:
            width, height = height, width
        # a phone's JPEG may carry small copies of itself, which makes it an MPO
        several = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
        return Look((width, height), _is_transparent(image), several)

    return _with(path, read)


def rgb(path: Path, shape: tuple[int, int]) -> Image.Image:
    """The first frame, on white, cut to a shape (width, height). Raises: as `look`."""
    return _read_upright(
        path,
        lambda image: ImageOps.fit(_on_white(_eight_bits(image)), shape, Image.Resampling.LANCZOS),
    )


def grey(path: Path, shape: tuple[int, int], *, alpha: bool = False) -> Image.Image:
    """As `rgb`, but the brightness alone (mode L), or with `alpha` the opacity."""

    def read(image: Image.Image) -> Image.Image:
        one = image.convert("RGBA").getchannel("A") if alpha else _eight_bits(image).convert("L")
        return ImageOps.fit(one, shape, Image.Resampling.BOX)

    return _read_upright(path, read)


def _read_upright(path: Path, read: Callable[[Image.Image], Image.Image]) -> Image.Image:
    cut: Image.Image = _with(path, lambda image: read(ImageOps.exif_transpose(image)))
    return cut


def _with(path: Path, read: Callable[[Image.Image], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            # what it warns of, a bomb or an odd tag, is refused above or does no harm
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return read(image)
    except (DatasetError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise _unfit(path, _why_no_image(path)) from None
    except Image.DecompressionBombError:
        raise _unfit(path, "has too many pixels (at most 100 million)") from None
    except Exception as error:  # noqa: BLE001 -- of damaged files, each decoder raises what it likes
        raise _unfit(path, f"cannot be read as an image: {error}") from None


def _unfit(path: Path, why: str) -> DatasetError:
    return DatasetError("dataset.image", f"{path.name} {why}")


def _why_no_image(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(12)
    if not head:
        return "is empty (0 bytes)"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "is a HEIC image, which is not read here; save it as JPEG or PNG"
    if head[4:12] == b"ftypavif":
        return "is an AVIF image, which this Pillow does not read; save it as JPEG or PNG"
    return "is not an image"


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in _TRANSPARENT or "transparency" in image.info


def _on_white(image: Image.Image) -> Image.Image:
    if not _is_transparent(image):
        return image.convert("RGB")
    colours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deeper grey levels scaled to 256 of them, where Pillow would cut off what is above 255.

    16-bit and 32-bit whole numbers count to 65535, 32-bit fractions to 1.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    import numpy

    levels = numpy.asarray(image, dtype=numpy.float32) / (1.0 if image.mode == "F" else 65535.0)
    if not numpy.isfinite(levels).all():
        raise ValueError("it has pixels that are no numbers (NaN or infinite)")
    if levels.min() < 0 or levels.max() > 1:
        raise ValueError("its levels are neither fractions from 0 to 1 nor 16-bit numbers")
    return Image.fromarray((levels * 255 + 0.5).astype(numpy.uint8))
