"""What every family's model is to the rest of the trainer.

A family is one module with `load(base, work, recipe, device, dtype) -> Model`, and a row in
`families`. Its model says how texts are encoded, how the denoiser is called, which layers a preset
means, and what its LoRA's names are elsewhere. What most families share is here. The denoiser is
loaded to the host; `gpu_agent.lora.fit` brings it to the device when texts and images are encoded.

Tensors are torch's. Latents are (n, c, h, w), or (n, c, 1, h, w) where the family counts frames;
*conditions* are what the denoiser is told besides them: tensors by name, batch first.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.objective import Objective

#: peft's list, which all diffusers-style trainers use.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
#: What it has besides where texts and image are attended to together.
JOINT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

#: By name, each (n, …): what the denoiser is told of the texts.
Conditions = dict[str, Any]


class Model(ABC):
    """A loaded base model, its weights frozen."""

    #: What diffusers calls the denoiser in a LoRA file: `unet` or `transformer`.
    prefix: ClassVar[str] = "transformer"
    #: Attributes of the denoiser that list its repeated blocks: where checkpoints, compilation and
    #: swapping have their seams.
    block_lists: ClassVar[tuple[str, ...]] = ()
    #: The text encoders that a LoRA file can hold, by diffusers' name.
    adaptable_encoders: ClassVar[tuple[str, ...]] = ()
    #: Whether sample images need a second pass without a prompt, and how far to go from it.
    sample_guidance: ClassVar[float] = 1.0
    #: Shift of the sample images' noise levels.
    sample_shift: float = 1.0
    #: Of the text encoders that which reads farthest: its tokenizer, and how many tokens of a text
    #: it reads, special ones not counted.
    reads: tuple[Any, int]

    def __init__(
        self,
        *,
        denoiser: Any,
        vae: Any,
        text_encoders: Mapping[str, Any],
        objective: Objective,
        device: Any,
    ) -> None:
        self.denoiser = denoiser
        self.vae = vae
        self.text_encoders = dict(text_encoders)
        self.objective = objective
        self.device = device

    # --- what each family says itself ---------------------------------------------------------

    @abstractmethod
    def targets(self, preset: str) -> list[str] | str:
        """peft's `target_modules` of the preset `attention` or `full`."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Conditions:
        """Texts → conditions of a length that is always the same, on the model's device.

        Differentiable: who wants no gradients says so around it.
        """

    @abstractmethod
    def predict(self, noisy: Any, levels: Any, conditions: Conditions) -> Any:
        """What the denoiser says, of the latents' shape, in the objective's terms."""

    def losses(
        self, latents: Any, noise: Any, levels: Any, conditions: Conditions, mask: Any = None
    ) -> Any:
        """The mean squared error of each of n samples, (n,), with the graph behind it.

        Args:
            mask: (n, 1, …, h, w), or None where every latent counts alike.
        """
        noisy = self.objective.mix(latents, noise, levels)
        said = self.predict(noisy, levels, conditions)
        squares = (said.float() - self.objective.target(latents, noise, levels)).square()
        return (squares if mask is None else squares * mask).flatten(1).mean(dim=1)

    # --- what most families share -------------------------------------------------------------

    @property
    def latent_factor(self) -> int:
        """Image pixels per latent along a side."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def side_factor(self) -> int:
        """Sides of images must be multiples of this many pixels."""
        return self.latent_factor

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Of the latents of one image of so many pixels."""
        factor = self.latent_factor
        return (int(self.vae.config["latent_channels"]), height // factor, width // factor)

    def framing(self, original: tuple[int, int], bucket: tuple[int, int]) -> Conditions:
        """Conditions (without batch) that follow from an image's size (width, height) alone."""
        return {}

    @torch.no_grad()
    def encode_image(self, image: Any) -> Any:
        """A `PIL.Image` → mean and log variance of its latents, (2 c, …, h, w) on the CPU."""
        return self.vae.encode(pixels_of(image).to(self.device)).latent_dist.parameters[0].cpu()

    def draw_latents(self, moments: Any, noise: Any) -> Any:
        """Moments (n, 2 c, …), noise (n, c, …) → latents as the denoiser takes them."""
        mean, log_variance = moments.chunk(2, dim=1)
        drawn = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return self._scaled(drawn)

    @torch.no_grad()
    def decode(self, latents: Any) -> Any:
        """Latents (1, c, …, h, w) → a `PIL.Image`."""
        self.vae.to(self.device)
        said = self.vae.decode(self._unscaled(latents)).sample
        self.vae.to("cpu")
        return image_of(said[0])

    def _scaled(self, latents: Any) -> Any:
        """The VAE's latents → the denoiser's."""
        config = self.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    def _unscaled(self, latents: Any) -> Any:
        config = self.vae.config
        return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)

    def release_encoders(self, *, texts: bool) -> None:
        """Free what only `encode_image` and, with `texts`, what only `encode_texts` needs."""
        if texts:
            self.text_encoders.clear()
        # the decoder waits on the host for the sample images
        self.vae.encoder = None
        self.vae.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def blocks(self) -> list[Any]:
        """The denoiser's repeated blocks, in the order in which they run."""
        return [block for name in self.block_lists for block in getattr(self.denoiser, name)]

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        self.denoiser.enable_gradient_checkpointing()

    def freeze(self) -> None:
        for part in (self.denoiser, self.vae, *self.text_encoders.values()):
            part.requires_grad_(False).eval()


def pixels_of(image: Any) -> Any:
    """An RGB `PIL.Image` → (1, 3, h, w) from -1 to 1, fp32."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    raw = raw.view(image.height, image.width, 3).permute(2, 0, 1)[None]
    return raw.to(torch.float32) / 127.5 - 1


def image_of(pixels: Any) -> Any:
    """(3, h, w) from -1 to 1 → an RGB `PIL.Image`."""
    levels = ((pixels.float().permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).nan_to_num()
    return Image.fromarray(levels.round().to(torch.uint8).cpu().numpy())


def settle(part: nn.Module) -> None:
    """Copy the weights out of the mapped file.

    There they lie at whatever offset the file has them, and on a CPU the rounding of a product
    depends on how its operands are aligned: the same weights would train differently.
    """
    for tensor in part.parameters():
        tensor.data = tensor.data.clone()


#: Errors of the system that say something of the base, and not of the machine.
_NOT_THERE = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


@contextmanager
def reading(base: Path) -> Iterator[None]:
    """What libraries raise over a base that they cannot read is its fault, `model.unreadable`; that
    a disk is full or memory out is the machine's, and goes through.

    Raises:
        ModelError: the base cannot be loaded.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        of_system = isinstance(error, OSError) and error.errno not in _NOT_THERE
        if of_system or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError("model.unreadable", f"{base.name} cannot be loaded: {error}") from error


def check_whole(base: Path, part: nn.Module) -> None:
    """Raises: ModelError, where a weight is missing or not finite."""
    name = type(part).__name__
    for key, tensor in part.named_parameters():
        if tensor.is_meta:
            raise ModelError("model.incomplete", f"{base.name} has no {key} for its {name}")
        if not torch.isfinite(tensor).all():
            raise ModelError("model.not_finite", f"{key} of {base.name}'s {name} is not finite")
