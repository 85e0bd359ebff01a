"""What is computed once: the latents of every picture and the embedding of every caption.

Afterwards the VAE's encoder and the text encoder are not needed any more. Kept are the *moments* of
the latents, so that each step can still draw from them as training without a cache would. All of it
lies in the host's memory (0.3 MB per 512 px picture, 5 to 10 MB per text of a large encoder), or in
files that are mapped into it, and crosses to the GPU batch by batch.

A file is named by everything that its content depends on and holds a checksum, so that a training
which goes on or comes again on the same disk takes it, and takes nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from gpu_agent.lora import draws, tensor_file
from gpu_agent.lora.data import Bucket, Picture
from gpu_agent.lora.errors import DatasetError, JobError
from gpu_agent.lora.families.base import Conditions, Model
from gpu_agent.recipe import Recipe

#: Ways in which one caption is said, with `caption_shuffle`.
ORDERS = 8
#: Share of the free memory that `auto` fills; more goes to the disk.
_SHARE = 0.5
_CHECKSUM = "sha256"
#: Changed whenever a file of the same name would hold something else.
_FORMAT = 1


@dataclass(frozen=True)
class Sample:
    """One picture as the denoiser sees it.

    Attributes:
        moments: (1 or 2, 2 c, …, h, w): upright, and mirrored where the recipe flips.
        texts: the ways in which the picture's caption is said, the first as it was written.
        conditions: those of each text, without batch.
        mask: (1 or 2, 1, …, h, w), like the moments, 1 on average: how much each latent counts.
            None where the recipe has no masks.
    """

    digest: str
    bucket: Bucket
    moments: Any
    texts: tuple[str, ...]
    conditions: tuple[Conditions, ...]
    mask: Any = None


class Cache:
    """Encodes pictures and texts, each distinct text once.

    Args:
        folder: for its files, where the recipe or the machine's memory wants them.
        origin: tells apart what encodes: base model, precision, kind of device.
    """

    def __init__(self, model: Model, recipe: Recipe, folder: Path, origin: str) -> None:
        self._model, self._recipe = model, recipe
        self._folder, self.origin = folder, origin
        self.on_disk = recipe.cache == "disk"
        #: What a customer should know of: captions that are cut.
        self.warnings: list[str] = []
        self._texts: dict[str, Conditions] = {}

    def expect(self, pictures: Sequence[Picture]) -> None:
        """With `auto`, take the disk for so many pictures where memory would be short."""
        if self._recipe.cache == "auto":
            self.on_disk = self._bytes_of(pictures) > _SHARE * free_memory()

    def text(self, text: str) -> Conditions:
        """The conditions of a text, without batch, on the host."""
        if text not in self._texts:
            self._texts[text] = self._kept(["text", text], lambda: self._encode_text(text))
        return self._texts[text]

    def sample(self, picture: Picture) -> Sample:
        """Encode one picture alone, so that its latents do not depend on its neighbours.

        Raises:
            DatasetError: `dataset.image` or `dataset.mask`.
        """
        recipe = self._recipe
        masked = picture.mask_digest if recipe.masked_loss else None
        place = [picture.digest, *picture.bucket, recipe.flip, masked]
        kept = self._kept(["picture", *place], lambda: self._encode_picture(picture))
        framing = self._model.framing(picture.size, picture.bucket)
        texts = tuple(orders(picture.caption, recipe))
        self._measure(picture)
        return Sample(
            digest=picture.digest,
            bucket=picture.bucket,
            moments=kept["moments"],
            texts=texts,
            conditions=tuple({**self.text(text), **framing} for text in texts),
            mask=kept.get("mask"),
        )

    def _measure(self, picture: Picture) -> None:
        tokenizer, most = self._model.reads
        # verbose would have it warn in its own words
        words = tokenizer(picture.caption, add_special_tokens=False, verbose=False).input_ids
        if len(words) > most:
            self.warnings.append(
                f"the caption of {picture.path.name} is cut: "
                f"of its {len(words)} tokens the first {most} are read"
            )

    def _encode_text(self, text: str) -> Conditions:
        with torch.no_grad():
            said = self._model.encode_texts([text])
        return {name: tensor[0].cpu() for name, tensor in said.items()}

    def _encode_picture(self, picture: Picture) -> dict[str, Any]:
        if any(side % self._model.side_factor for side in picture.bucket):
            width, height = picture.bucket
            raise JobError(
                "recipe.invalid",
                f"resolution {self._recipe.resolution} makes images of {width}x{height} pixels, "
                f"but this model's sides are multiples of {self._model.side_factor}; take 256",
            )
        moments = torch.stack(
            [self._model.encode_image(view) for view in self._views(picture.pixels())]
        )
        if not torch.isfinite(moments).all():
            raise DatasetError(
                "dataset.image",
                f"{picture.path.name}: the base model's VAE makes no finite numbers of it",
            )
        if not self._recipe.masked_loss:
            return {"moments": moments}
        return {"moments": moments, "mask": self._mask(picture, moments)}

    def _mask(self, picture: Picture, moments: Any) -> Any:
        """The share of each latent's pixels that counts, then scaled to 1 on average.

        So a mask of nothing but white is no mask, and a small white part weighs as much in all as
        a whole image does.
        """
        views, _, *sides = moments.shape
        counting = picture.counting()
        if counting is None:
            return torch.ones(views, 1, *sides)
        pixels = torch.stack([_levels(view) for view in self._views(counting)])
        latents = torch.nn.functional.adaptive_avg_pool2d(pixels, sides[-2:])
        return (latents / latents[0].mean()).view(views, 1, *sides)

    def _views(self, image: Any) -> list[Any]:
        if not self._recipe.flip:
            return [image]
        return [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]

    def _bytes_of(self, pictures: Sequence[Picture]) -> int:
        views = 2 if self._recipe.flip else 1
        latents = sum(math.prod(self._model.latent_shape(*picture.bucket)) for picture in pictures)
        texts = {said for picture in pictures for said in orders(picture.caption, self._recipe)}
        one = sum(tensor.nbytes for tensor in self.text("").values())
        # mean and variance, 4 bytes each
        return latents * views * 2 * 4 + len(texts) * one

    # --- on the disk --------------------------------------------------------------------------

    def _kept(self, place: Sequence[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not self.on_disk:
            return make()
        told = json.dumps([_FORMAT, self.origin, *place]).encode()
        file = self._folder / f"{hashlib.sha256(told).hexdigest()}.safetensors"
        kept = _read(file)
        if kept is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            made = make()
            # of one's own, for several processes may encode the same
            part = file.with_suffix(f".{os.getpid()}")
            tensor_file.write(part, made, {_CHECKSUM: _checksum(made)})
            part.replace(file)
            kept = _read(file)
        return kept if kept is not None else made


def orders(caption: str, recipe: Recipe) -> list[str]:
    """The ways in which a caption is said, the first as it was written.

    With `caption_shuffle` the comma-separated parts after the first `keep_tokens` change places:
    in every way there is, or in `ORDERS` ways.
    """
    parts = [part.strip() for part in caption.split(",")]
    still, moving = parts[: recipe.keep_tokens], parts[recipe.keep_tokens :]
    if not recipe.caption_shuffle or len(moving) < 2:
        return [caption]
    if math.factorial(len(moving)) <= ORDERS:
        mixed: Iterable[Sequence[str]] = itertools.islice(itertools.permutations(moving), 1, None)
    else:  # some of them twice, so more than are wanted
        mixed = (
            draws.shuffled(moving, recipe.seed, "caption", caption, number)
            for number in range(4 * ORDERS)
        )
    distinct = dict.fromkeys([caption, *(", ".join([*still, *some]) for some in mixed)])
    return list(distinct)[:ORDERS]


def origin_of(base: Path, *about: str) -> str:
    """Tells base models apart by their files' names, sizes and times, without reading them."""
    files = sorted(base.rglob("*")) if base.is_dir() else [base]
    stats = [(file.name, file.stat()) for file in files]
    return json.dumps([*about, *((name, seen.st_size, seen.st_mtime_ns) for name, seen in stats)])


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        free = told["MemAvailable"] * 1024
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):
        return free  # no such file, or no limit ("max")


def move(tensors: Sequence[Any], device: Any) -> Any:
    """Stack and send to the device; to a GPU without making the host wait."""
    stacked = torch.stack(list(tensors))
    if device.type == "cuda":
        return stacked.pin_memory().to(device, non_blocking=True)
    return stacked


def move_conditions(several: Sequence[Mapping[str, Any]], device: Any) -> Conditions:
    """As `move`, for the conditions of each sample of a batch."""
    return {name: move([one[name] for one in several], device) for name in several[0]}


def _levels(image: Any) -> Any:
    """A grey `PIL.Image` → (1, h, w) from 0 to 1."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(1, image.height, image.width) / 255


def _read(file: Path) -> dict[str, Any] | None:
    """The tensors of a file, mapped; None where it is not there or is not what was written."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            told = (opened.metadata() or {}).get(_CHECKSUM)
    except (OSError, SafetensorError):
        return None
    return tensors if told == _checksum(tensors) else None


def _checksum(tensors: Mapping[str, Any]) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()
