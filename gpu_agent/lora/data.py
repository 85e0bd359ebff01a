"""Which images are trained on, what they are called, and into which shape each is cut.

::

    images/                  any folders below it, but for these:
        a.jpg                a picture of the subject
        a.txt                its caption (see `captions`)
        a.mask.png           for `masked_loss`: white counts, black does not
        regularization/      pictures of the subject's class, for prior preservation
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_agent.lora import images
from gpu_agent.lora.captions import METADATA, Captions, template
from gpu_agent.lora.errors import DatasetError
from gpu_agent.recipe import Recipe

#: Fewer images than this are all used for training and for validation.
LEAST_FOR_HOLD_OUT = 8
#: Where the images of the subject's class are.
REGULARIZATION = "regularization"
MASK = ".mask.png"
_CLUTTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
#: No bucket is longer than this many times its width.
_LONGEST = 2.0
#: An image that must be enlarged more than this is refused, one above the other is warned of.
_MOST_ENLARGED = 4.0
_ENLARGED = 1.25
#: Files that one message names.
_NAMED = 5

#: Width and height of a training image, in pixels.
Bucket = tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """An image as it will be trained on.

    Attributes:
        digest: the SHA-256 of the file, in hex.
        size: width and height in pixels, upright, before it is cut to its bucket.
        mask: the file that says what of it counts: its mask, or itself for its alpha channel.
        mask_digest: that file's; empty where there is none.
    """

    path: Path
    digest: str
    caption: str
    size: tuple[int, int]
    bucket: Bucket
    mask: Path | None = None
    mask_digest: str = ""

    def pixels(self) -> Any:
        """The image, cut to its bucket, as an RGB `PIL.Image`.

        Raises:
            DatasetError: the file ends too early or is broken inside.
        """
        return images.rgb(self.path, self.bucket)

    def counting(self) -> Any:
        """Its mask, cut as the image is, as a grey `PIL.Image`; None where it has none.

        Raises:
            DatasetError: `dataset.mask`: it cannot be read, or is all black there.
        """
        if self.mask is None:
            return None
        try:
            cut = images.grey(self.mask, self.bucket, alpha=self.mask == self.path)
        except DatasetError as error:
            raise DatasetError("dataset.mask", str(error)) from None
        if cut.getextrema() == (0, 0):
            raise DatasetError(
                "dataset.mask", f"by {self.mask.name} nothing of {self.path.name} is trained on"
            )
        return cut


@dataclass(frozen=True)
class Dataset:
    """What was found in a folder.

    Attributes:
        pictures: of the subject.
        regularization: of its class.
        warnings: what a customer should know of, but may want.
    """

    pictures: tuple[Picture, ...]
    regularization: tuple[Picture, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Which pictures are trained on, and which the validation loss is taken over.

    `label` is `held-out`, or `train-eval` where both are the same pictures.
    """

    train: tuple[Picture, ...]
    validation: tuple[Picture, ...]
    label: str


def collect(folder: Path, recipe: Recipe) -> Dataset:
    """All images below `folder`, in the order of their names. Reads headers, decodes nothing.

    Raises:
        DatasetError: `dataset.empty`, `dataset.image`, `dataset.small`, `dataset.caption` or
            `dataset.mask`, naming the files.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_clutter(path, folder)
    ]
    return _Collector(folder, files, recipe).collect()


class _Collector:
    """Looks at each file once; what is odd but usable becomes a warning."""

    def __init__(self, folder: Path, files: Sequence[Path], recipe: Recipe) -> None:
        self._folder, self._recipe = folder, recipe
        self._shapes = buckets(recipe.resolution)
        self._captions = Captions(files, recipe)
        self._masks = {path for path in files if path.name.lower().endswith(MASK)}
        self._images = [
            path
            for path in files
            if path.suffix.lower() in images.SUFFIXES and path not in self._masks
        ]
        self._written = {path: self._captions.of(path) for path in self._images}
        self._others = [
            path
            for path in files
            if path.suffix.lower() not in {*images.SUFFIXES, ".txt"}
            and path.name.lower() != METADATA
        ]
        self._seen: dict[str, Path] = {}
        self._notes: dict[str, list[str]] = {}

    def collect(self) -> Dataset:
        foreign = [path for path in self._others if path.suffix.lower() in images.FOREIGN]
        if foreign:
            kinds = ", ".join(sorted({path.suffix[1:].upper() for path in foreign}))
            raise DatasetError(
                "dataset.image",
                f"{kinds} is not read here; save as JPEG or PNG: {_some(map(_name, foreign))}",
            )
        of_class = [path for path in self._images if self._is_of_class(path)]
        subject = [path for path in self._images if not self._is_of_class(path)]
        if not subject:
            beside = f" beside those of {REGULARIZATION}" if of_class else ""
            raise DatasetError("dataset.empty", f"there is no image in {self._folder.name}{beside}")
        pictures = [picture for path in subject if (picture := self._picture(path))]
        regularization = [picture for path in of_class if (picture := self._picture(path))]
        self._refuse_small([*pictures, *regularization])
        self._note_unused([*pictures, *regularization])
        told = tuple(f"{what}: {_some(which)}" for what, which in self._notes.items())
        return Dataset(tuple(pictures), tuple(regularization), told + self._said(pictures))

    def _picture(self, path: Path) -> Picture | None:
        """None for a picture that was there already."""
        seen = images.look(path)
        mask = self._mask_of(path, seen) if self._recipe.masked_loss else None
        digest = digest_of(path)
        if digest in self._seen:
            twin = f"{path.name} (as {self._seen[digest].name})"
            self._note("the same picture twice is trained on once", twin)
            return None
        self._seen[digest] = path
        if seen.animated:
            self._note("of several frames the first is trained on", path.name)
        return Picture(
            path=path,
            digest=digest,
            caption=self._caption_of(path),
            size=seen.size,
            bucket=nearest(self._shapes, *seen.size),
            mask=mask,
            mask_digest=digest_of(mask) if mask else "",
        )

    def _mask_of(self, path: Path, seen: images.Look) -> Path | None:
        beside = path.with_suffix(MASK)
        if beside not in self._masks:
            if not seen.transparent and not self._is_of_class(path):
                self._note("without a mask all of an image is trained on", path.name)
            return path if seen.transparent else None
        try:
            size = images.look(beside).size
        except DatasetError as error:
            raise DatasetError("dataset.mask", str(error)) from None
        if size != seen.size:
            raise DatasetError(
                "dataset.mask",
                f"{beside.name} is {_times(size)}, but {path.name} is {_times(seen.size)} pixels",
            )
        return beside

    def _caption_of(self, path: Path) -> str:
        if written := self._written[path]:
            return written
        if not self._is_of_class(path):
            called = template(self._recipe)
            self._note(f"no caption, so called {called!r}", path.name)
            return called
        if not self._recipe.prior_prompt:
            raise DatasetError(
                "dataset.caption",
                f"{REGULARIZATION}/{path.name} has no caption; the recipe's prior_prompt would be "
                "that of all of them",
            )
        return self._recipe.prior_prompt

    def _refuse_small(self, pictures: Sequence[Picture]) -> None:
        enlarged = {picture: _enlarged(picture) for picture in pictures}
        small = [picture for picture, times in enlarged.items() if times > _MOST_ENLARGED]
        if small:
            said = _some(
                f"{picture.path.name} is {_times(picture.size)} and needs {_times(_least(picture))}"
                for picture in small
            )
            raise DatasetError(
                "dataset.small",
                f"too small for a resolution of {self._recipe.resolution}: {said}",
            )
        for picture, times in enlarged.items():
            if times > _ENLARGED:
                self._note(
                    "smaller than they are trained at, so they are enlarged",
                    f"{picture.path.name} ({_times(picture.size)})",
                )

    def _note_unused(self, pictures: Sequence[Picture]) -> None:
        used = {picture.mask for picture in pictures}
        for path in self._others:
            self._note("not read", path.name)
        for name in self._captions.without_image(self._images):
            self._note("captions without an image", name)
        for path in sorted(self._masks - used):
            why = "without an image" if self._recipe.masked_loss else "but masked_loss is off"
            self._note(f"masks {why}", path.name)

    def _said(self, pictures: Sequence[Picture]) -> tuple[str, ...]:
        """What is odd about the recipe, given these pictures."""
        recipe, said = self._recipe, []
        trigger = recipe.trigger.lower()
        if not trigger and not any(self._written[picture.path] for picture in pictures):
            said.append(
                "neither captions nor a trigger word: nothing in a prompt will call the subject"
            )
        if trigger and not any(trigger in picture.caption.lower() for picture in pictures):
            said.append(f"no caption has the trigger word {recipe.trigger!r}")
        of_class = any(map(self._is_of_class, self._images))
        if recipe.prior_prompt and not recipe.prior_images and not of_class:
            said.append(f"prior_prompt needs prior_images or a folder {REGULARIZATION}: not used")
        return tuple(said)

    def _is_of_class(self, path: Path) -> bool:
        return path.relative_to(self._folder).parts[0].lower() == REGULARIZATION

    def _note(self, what: str, which: str) -> None:
        self._notes.setdefault(what, []).append(which)


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


def digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


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


def _enlarged(picture: Picture) -> float:
    return max(picture.bucket[0] / picture.size[0], picture.bucket[1] / picture.size[1])


def _least(picture: Picture) -> tuple[int, int]:
    """The size from which a picture of its bucket is taken."""
    width, height = (math.ceil(side / _MOST_ENLARGED) for side in picture.bucket)
    return width, height


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _name(path: Path) -> str:
    return path.name


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more


def _is_clutter(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return any(part.startswith(".") or part in _CLUTTER for part in parts)
