"""Images and captions: which there are, what they say, and into which shape each is cut."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from gpu_agent.lora.errors import DatasetError
from gpu_agent.recipe import Recipe

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
#: Fewer images than this are all used for training and for validation.
LEAST_FOR_HOLD_OUT = 8
#: No bucket is longer than this many times its width.
_LONGEST = 2.0
#: EXIF orientations that exchange width and height.
_EXIF_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})

#: Width and height of a training image, in pixels.
Bucket = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """An image as it will be trained on.

    Attributes:
        digest: the SHA-256 of the file, in hex.
        size: width and height in pixels, upright, before it is cut to its bucket.
    """

    path: Path
    digest: str
    caption: str
    size: tuple[int, int]
    bucket: Bucket

    def pixels(self) -> Any:
        """The image, cut to its bucket, as an RGB `PIL.Image`.

        Raises:
            DatasetError: the file ends too early or is broken inside.
        """
        try:
            with _open(self.path) as image:
                upright = ImageOps.exif_transpose(image)
                return ImageOps.fit(_on_white(upright), self.bucket, Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise _broken(self.path, error) from None


@dataclass(frozen=True)
class Split:
    """Which pictures are trained on, and which the validation loss is taken over.

    `label` is `held-out`, or `train-eval` where both are the same pictures.
    """

    train: tuple[Picture, ...]
    validation: tuple[Picture, ...]
    label: str


def collect(folder: Path, recipe: Recipe) -> list[Picture]:
    """All images below `folder`, in the order of their names. Reads headers, decodes nothing.

    Raises:
        DatasetError: `dataset.empty`, `dataset.image` or `dataset.caption`, naming the file.
    """
    shapes = buckets(recipe.resolution)
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file() and not _is_clutter(path, folder)
    ]
    if not found:
        raise DatasetError("dataset.empty", f"there is no image in {folder.name}")
    return [_picture(path, shapes, recipe) for path in found]


def _picture(path: Path, shapes: Sequence[Bucket], recipe: Recipe) -> Picture:
    size = _size(path)
    return Picture(
        path=path,
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        caption=caption_of(path, recipe),
        size=size,
        bucket=nearest(shapes, *size),
    )


def split(pictures: Sequence[Picture], recipe: Recipe) -> Split:
    """Hold some pictures out for validation, chosen by seed and content, not by order."""
    everything = tuple(pictures)
    if len(everything) < LEAST_FOR_HOLD_OUT or recipe.validation_share == 0:
        return Split(everything, everything, "train-eval")
    count = max(1, round(recipe.validation_share * len(everything)))

    def draw(picture: Picture) -> bytes:
        return hashlib.sha256(f"{recipe.seed}/hold-out/{picture.digest}".encode()).digest()

    held = sorted(everything, key=draw)[:count]
    train = tuple(picture for picture in everything if picture not in held)
    return Split(train, tuple(held), "held-out")


def caption_of(image: Path, recipe: Recipe) -> str:
    """The caption file beside an image, or the template; `{trigger}` is replaced in both.

    Raises:
        DatasetError: the caption file is not UTF-8.
    """
    file = image.with_suffix(".txt")
    try:
        written = " ".join(file.read_text(encoding="utf-8-sig").split()) if file.is_file() else ""
    except UnicodeDecodeError:
        raise DatasetError("dataset.caption", f"{file.name} is not UTF-8 text") from None
    return written.replace("{trigger}", recipe.trigger) or template_caption(recipe)


def template_caption(recipe: Recipe) -> str:
    """What an image without a caption file is called."""
    return recipe.caption_template.replace("{trigger}", recipe.trigger).strip()


def distinct(parts: Split) -> list[Picture]:
    """Every picture of a split once."""
    return list(dict.fromkeys([*parts.train, *parts.validation]))


def buckets(resolution: int) -> list[Bucket]:
    """Every shape of about the square's area (never more), whose sides fit the network.

    Sides are multiples of 64 (8 pixels per latent, 3 halvings in the denoiser), or of a quarter
    of a small resolution, where steps of 64 would leave nothing but the square.
    """
    step = min(64, max(16, resolution // 4))
    sides = range(step, int(resolution * math.sqrt(_LONGEST)) + 1, step)
    shapes: set[Bucket] = set()
    for width in sides:
        most = min(resolution * resolution // width, int(_LONGEST * width))
        height = most // step * step
        if 2 * width * height >= resolution * resolution and width <= _LONGEST * height:
            shapes |= {(width, height), (height, width)}
    return sorted(shapes)


def nearest(shapes: Iterable[Bucket], width: int, height: int) -> Bucket:
    """The bucket whose proportions are closest to an image's; the larger one of equals."""
    wanted = math.log(width / height)
    return min(
        shapes,
        key=lambda shape: (
            round(abs(math.log(shape[0] / shape[1]) - wanted), 9),
            -shape[0] * shape[1],
        ),
    )


def count_buckets(pictures: Iterable[Picture]) -> dict[str, int]:
    """How many pictures each bucket holds, by ``"512x768"``."""
    counted = Counter(f"{picture.bucket[0]}x{picture.bucket[1]}" for picture in pictures)
    return dict(sorted(counted.items()))


def _open(path: Path) -> Image.Image:
    # A bomb's warning is an error here: nobody trains on 90 megapixels by intention.
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


def _size(path: Path) -> tuple[int, int]:
    try:
        with _open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DatasetError("dataset.image", f"{path.name} has too many pixels") from None
    except UnidentifiedImageError:
        raise DatasetError("dataset.image", f"{path.name} is not an image") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise _broken(path, error) from None
    return (height, width) if turned else (width, height)


def _broken(path: Path, error: Exception) -> DatasetError:
    return DatasetError("dataset.image", f"{path.name} cannot be read as an image: {error}")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def _is_clutter(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)
