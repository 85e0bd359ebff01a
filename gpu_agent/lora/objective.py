"""What a denoiser learns: how latents and noise are mixed, what it must say, what that weighs.

Two kinds exist. `Diffusion` is the noise schedule of Stable Diffusion 1.x, 2.x and SDXL, whose
denoiser predicts the noise or the velocity. `Flow` is the straight path from image to noise of
all later families (rectified flow, arXiv:2209.03003), whose denoiser predicts its direction.

A *level* in (0, 1) says how much noise there is: near 0 hardly any, near 1 hardly anything else.
Levels come from *quantiles* in [0, 1) of the recipe's density, so that random and stratified levels
are drawn alike for every family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler

from gpu_agent.recipe import Recipe

#: Latents (n, c, …, h, w) and levels (n,) → what the denoiser says, of the latents' shape.
Predict = Callable[[Any, Any], Any]

#: FLUX.1's shift by resolution: mu runs linearly from 256 to 4096 tokens of 16 x 16 pixels
#: (`calculate_shift` of Black Forest Labs' sampling code).
_FEW_TOKENS, _FEW_MU = 256, 0.5
_MANY_TOKENS, _MANY_MU = 4096, 1.15
#: Quantiles nearer to 0 and 1 than this would be infinitely far out in a normal density.
_EDGE = 1e-4
#: SNR above which debiased estimation weighs no less, as in sd-scripts.
_MOST_SNR = 1000.0


class Objective(Protocol):
    """All tensors of n samples; levels are (n,)."""

    def mix(self, latents: Any, noise: Any, levels: Any) -> Any:
        """What the denoiser is shown."""

    def target(self, latents: Any, noise: Any, levels: Any) -> Any:
        """What it must say."""

    def weights(self, levels: Any, recipe: Recipe) -> Any:
        """How much the loss of each sample counts, (n,)."""

    def sample(
        self, predict: Predict, noise: Any, steps: int, shift: float, beat: Callable[[int], None]
    ) -> Any:
        """From noise to latents in so many steps. `beat` is told the steps done."""


@dataclass(frozen=True)
class Density:
    """Of the noise levels. `area` is that of the images in pixels, for `flux_shift`."""

    sampling: str
    shift: float

    @classmethod
    def of(cls, recipe: Recipe) -> Density:
        return cls(recipe.timestep_sampling, recipe.timestep_shift)

    def levels(self, quantiles: Any, area: int) -> Any:
        """The levels, (n,) in (0, 1), at these quantiles, (n,) in [0, 1)."""
        inner = quantiles.clamp(_EDGE, 1 - _EDGE)
        if self.sampling == "uniform":
            return shifted(inner, self.shift)
        levels = torch.special.ndtri(inner).sigmoid()
        resolution = flux_shift(area) if self.sampling == "flux_shift" else 1.0
        return shifted(levels, self.shift * resolution)


def shifted(levels: Any, shift: float) -> Any:
    """Levels moved toward more noise, for shifts above 1 (Esser et al., arXiv:2403.03206)."""
    return shift * levels / (1 + (shift - 1) * levels)


def flux_shift(area: int) -> float:
    """The shift that FLUX.1 was trained with at images of so many pixels."""
    tokens = area / 256
    slope = (_MANY_MU - _FEW_MU) / (_MANY_TOKENS - _FEW_TOKENS)
    return math.exp(_FEW_MU + slope * (tokens - _FEW_TOKENS))


class Diffusion:
    """A thousand levels of noise whose variance and signal add up to one.

    Args:
        config: of a diffusers scheduler: betas and `prediction_type`.
        prediction: the recipe's; `auto` takes the scheduler's.
    """

    def __init__(self, config: Mapping[str, Any], prediction: str, device: Any) -> None:
        chosen = config["prediction_type"] if prediction == "auto" else prediction
        self._scheduler = DDIMScheduler.from_config({**config, "prediction_type": chosen})
        kept = self._scheduler.alphas_cumprod.to(device=device, dtype=torch.float32)
        self._signal, self._spread = kept.sqrt(), (1 - kept).sqrt()
        self._snr = kept / (1 - kept)
        self._velocity = chosen == "v_prediction"

    def times(self, levels: Any) -> Any:
        """The numbers of the levels, (n,), as the denoiser counts them."""
        count = len(self._signal)
        return (levels * count).long().clamp(max=count - 1)

    def mix(self, latents: Any, noise: Any, levels: Any) -> Any:
        signal, spread = self._parts(levels)
        return signal * latents + spread * noise

    def target(self, latents: Any, noise: Any, levels: Any) -> Any:
        if not self._velocity:
            return noise
        signal, spread = self._parts(levels)
        return signal * noise - spread * latents

    def weights(self, levels: Any, recipe: Recipe) -> Any:
        snr = self._snr[self.times(levels)]
        per_target = snr + 1 if self._velocity else snr
        if recipe.min_snr_gamma is not None:
            return snr.clamp(max=recipe.min_snr_gamma) / per_target
        if recipe.debiased:
            return snr.clamp(max=_MOST_SNR).rsqrt()
        return torch.ones_like(snr)

    def sample(
        self, predict: Predict, noise: Any, steps: int, shift: float, beat: Callable[[int], None]
    ) -> Any:
        scheduler = self._scheduler
        scheduler.set_timesteps(steps, device=noise.device)
        latents = noise
        for done, time in enumerate(scheduler.timesteps):
            beat(done)
            # the middle of the level's own share of (0, 1), from which `times` finds it again
            level = (time.float() + 0.5) / len(self._signal)
            said = predict(latents, level.expand(len(latents)))
            latents = scheduler.step(said, time, latents).prev_sample
        return latents

    def _parts(self, levels: Any) -> tuple[Any, Any]:
        times = self.times(levels)
        return self._signal[times][:, None, None, None], self._spread[times][:, None, None, None]


class Flow:
    """The straight way from image (level 0) to noise (level 1)."""

    def mix(self, latents: Any, noise: Any, levels: Any) -> Any:
        part = _beside(levels, latents)
        return (1 - part) * latents + part * noise

    def target(self, latents: Any, noise: Any, levels: Any) -> Any:
        return noise - latents

    def weights(self, levels: Any, recipe: Recipe) -> Any:
        return torch.ones_like(levels)

    def sample(
        self, predict: Predict, noise: Any, steps: int, shift: float, beat: Callable[[int], None]
    ) -> Any:
        ends = shifted(torch.linspace(1, 0, steps + 1, device=noise.device), shift)
        latents = noise
        for done in range(steps):
            beat(done)
            said = predict(latents, ends[done].expand(len(latents)))
            latents = latents + (ends[done + 1] - ends[done]) * said
        return latents


def _beside(levels: Any, latents: Any) -> Any:
    return levels.view(-1, *[1] * (latents.ndim - 1))
