"""The base models that a LoRA can be trained for. One door, one module per family behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gpu_agent.lora.errors import JobError, ModelError
from gpu_agent.lora.families import ldm


class Model(Protocol):
    """A loaded base model, its weights frozen.

    Tensors are torch's. A *quantile* in [0, 1) says where in the family's density of noise levels
    a sample lies, so that random and stratified levels are drawn alike for every family.
    """

    #: The network that the LoRA goes into.
    denoiser: Any
    #: What diffusers calls it in a LoRA file: `unet` or `transformer`.
    prefix: str
    #: Channels of the latents, and image pixels per latent along a side.
    latent_channels: int
    latent_factor: int

    def targets(self, preset: str) -> list[str]:
        """The names of the layers that the preset `attention` or `full` trains."""

    def encode_image(self, image: Any) -> Any:
        """A `PIL.Image` → mean and log variance of its latents, (2 c, h, w) on the CPU."""

    def encode_text(self, text: str) -> Any:
        """A caption → what the denoiser is conditioned on, on the CPU."""

    def release_encoders(self) -> None:
        """Free what only the two methods above need."""

    def draw_latents(self, moments: Any, noise: Any) -> Any:
        """Moments (n, 2 c, h, w), noise (n, c, h, w) → latents as the denoiser takes them."""

    def losses(self, latents: Any, text: Any, noise: Any, quantiles: Any) -> Any:
        """The mean squared error of each of n samples, (n,), with the graph behind it."""

    def weights(self, quantiles: Any, gamma: float) -> Any:
        """Min-SNR weights of the losses, (n,)."""

    def render(
        self, text: Any, empty: Any, noise: Any, steps: int, beat: Callable[[int], None]
    ) -> Any:
        """One text, one noise (c, h, w) → a `PIL.Image`. `beat` is told the steps done."""


@dataclass(frozen=True)
class Family:
    """A family of base models.

    Attributes:
        check: reads a base without torch and returns its fingerprint; raises `ModelError`.
        load: (base, work folder, device, dtype of the frozen weights) → a model.
        architecture: its name in `modelspec.architecture`, and `ss_base_model_version`.
    """

    name: str
    check: Callable[[Path], str]
    load: Callable[[Path, Path, Any, Any], Model]
    architecture: str
    kohya_version: str


def family(name: str) -> Family:
    """Raises `JobError` for a family that this version does not train."""
    if name not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise JobError("job.family", f"base family {name!r} is not trained here; known are {known}")
    return _FAMILIES[name]


def _check_sd1(base: Path) -> str:
    if not base.exists():
        raise ModelError("model.missing", f"{base.name} is not there")
    return ldm.check_folder(base) if base.is_dir() else ldm.check_file(base)


def _load_sd1(base: Path, work: Path, device: Any, dtype: Any) -> Model:
    from gpu_agent.lora.families import sd1  # imports torch and diffusers: 5 s

    return sd1.load(base, work, device, dtype)


_FAMILIES = {
    "sd1": Family(
        name="sd1",
        check=_check_sd1,
        load=_load_sd1,
        architecture="stable-diffusion-v1",
        kohya_version="sd_v1",
    )
}
