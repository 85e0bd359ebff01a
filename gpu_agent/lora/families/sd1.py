"""Stable Diffusion 1.x: a UNet that predicts the noise, CLIP's text encoder, a VAE of factor 8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import ldm
from gpu_agent.lora.families.clip_words import tokenizer_for

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
#: What sd-scripts trains: every linear layer and 1x1 convolution inside a Transformer2DModel.
_FULL = [*_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
_GUIDANCE = 7.5


class Sd1:
    """A loaded SD 1.x model; see `families.Model`."""

    prefix = "unet"

    def __init__(
        self, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Any, device: Any
    ) -> None:
        self.denoiser = unet
        self.latent_channels = vae.config["latent_channels"]
        self.latent_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self._vae = vae
        self._text_encoder = text_encoder
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._device = device
        kept = scheduler.alphas_cumprod.to(device=device, dtype=torch.float32)
        self._signal, self._noise = kept.sqrt(), (1 - kept).sqrt()
        self._snr = kept / (1 - kept)
        self._velocity = scheduler.config["prediction_type"] == "v_prediction"

    def targets(self, preset: str) -> list[str]:
        return _FULL if preset == "full" else _ATTENTION

    @torch.no_grad()
    def encode_image(self, image: Any) -> Any:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)[None]
        # in fp32, because SD's VAE overflows in fp16
        scaled = pixels.to(self._device, torch.float32) / 127.5 - 1
        return self._vae.encode(scaled).latent_dist.parameters[0].cpu()

    @torch.no_grad()
    def encode_text(self, text: str) -> Any:
        words = self._tokenizer(
            text,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self._text_encoder(words.to(self._device))[0][0].cpu()

    def release_encoders(self) -> None:
        self._text_encoder = None
        # the decoder waits on the host for the sample images
        self._vae.encoder = None
        self._vae.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def draw_latents(self, moments: Any, noise: Any) -> Any:
        mean, log_variance = moments.chunk(2, dim=1)
        spread = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return (mean + spread * noise) * self._vae.config["scaling_factor"]

    def losses(self, latents: Any, text: Any, noise: Any, quantiles: Any) -> Any:
        times = self._times(quantiles)
        signal, spread = (part[times][:, None, None, None] for part in (self._signal, self._noise))
        wanted = signal * noise - spread * latents if self._velocity else noise
        got = self.denoiser(signal * latents + spread * noise, times, text).sample
        return (got.float() - wanted).square().mean(dim=(1, 2, 3))

    def weights(self, quantiles: Any, gamma: float) -> Any:
        snr = self._snr[self._times(quantiles)]
        return snr.clamp(max=gamma) / (snr + 1 if self._velocity else snr)

    @torch.no_grad()
    def render(
        self, text: Any, empty: Any, noise: Any, steps: int, beat: Callable[[int], None]
    ) -> Any:
        scheduler = DDIMScheduler.from_config(self._scheduler.config)
        scheduler.set_timesteps(steps, device=self._device)
        both = torch.stack([empty, text]).to(self._device)
        latents = noise[None].to(self._device)
        for done, time in enumerate(scheduler.timesteps):
            beat(done)
            got = self.denoiser(latents.repeat(2, 1, 1, 1), time, both).sample.float()
            guided = got[:1] + _GUIDANCE * (got[1:] - got[:1])
            latents = scheduler.step(guided, time, latents).prev_sample
        return self._decode(latents)

    def _decode(self, latents: Any) -> Any:
        self._vae.to(self._device)
        pixels = self._vae.decode(latents / self._vae.config["scaling_factor"]).sample[0]
        self._vae.to("cpu")
        levels = ((pixels.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).nan_to_num()
        return Image.fromarray(levels.round().to(torch.uint8).cpu().numpy())

    def _times(self, quantiles: Any) -> Any:
        # training is uniform over SD's thousand noise levels
        count = len(self._signal)
        return (quantiles * count).long().clamp(max=count - 1).to(self._device)


def load(base: Path, work: Path, device: Any, dtype: Any) -> Sd1:
    """Load a single file or a diffusers folder.

    Raises:
        ModelError: weights are missing, of the wrong shape, or not finite.
    """
    try:
        if base.is_dir():
            parts, beside = _from_folder(base, dtype), base
        else:
            parts, beside = _from_file(base, work / "base_config", dtype), base.parent
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError("model.unreadable", f"{base.name} cannot be loaded: {error}") from error
    unet, vae, text_encoder, scheduler = parts
    for part in (unet, vae, text_encoder):
        _check_whole(base, part)
        part.requires_grad_(False).eval()
        _settle(part)
    config = text_encoder.config
    tokenizer = tokenizer_for(config.vocab_size, config.max_position_embeddings, beside)
    return Sd1(
        unet.to(device),
        vae.to(device),
        text_encoder.to(device),
        tokenizer,
        scheduler,
        device,
    )


def _from_file(base: Path, configs: Path, dtype: Any) -> tuple[Any, Any, Any, Any]:
    folder = str(ldm.write_folder(ldm.read_header(base), configs))
    tensors = load_file(base)
    ours = {"config": folder, "local_files_only": True}
    unet = UNet2DConditionModel.from_single_file(
        tensors, subfolder="unet", torch_dtype=dtype, **ours
    )
    vae = AutoencoderKL.from_single_file(
        tensors, subfolder="vae", torch_dtype=torch.float32, **ours
    )
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))
    _fill(text_encoder, ldm.text_tensors(tensors))
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    return unet, vae, text_encoder, scheduler


def _fill(text_encoder: Any, tensors: dict[str, Any]) -> None:
    # transformers 4 says text_model.…, transformers 5 does not
    wrapped = any(name.startswith("text_model.") for name in text_encoder.state_dict())
    prefix = "text_model." if wrapped else ""
    text_encoder.load_state_dict(
        {prefix + name: tensor.float() for name, tensor in tensors.items()}, strict=True
    )


def _from_folder(base: Path, dtype: Any) -> tuple[Any, Any, Any, Any]:
    whole = {"local_files_only": True, "torch_dtype": torch.float32}
    text_encoder, told = CLIPTextModel.from_pretrained(
        base, subfolder="text_encoder", output_loading_info=True, **whole
    )
    if told["missing_keys"]:
        raise ValueError(f"the text encoder lacks {sorted(told['missing_keys'])[:3]}")
    return (
        UNet2DConditionModel.from_pretrained(
            base, subfolder="unet", local_files_only=True, torch_dtype=dtype
        ),
        AutoencoderKL.from_pretrained(base, subfolder="vae", **whole),
        text_encoder,
        DDIMScheduler.from_pretrained(base, subfolder="scheduler"),
    )


def _settle(part: Any) -> None:
    """Copy the weights out of the mapped file.

    There they lie at whatever offset the file has them, and on a CPU the rounding of a product
    depends on how its operands are aligned: the same weights would train differently.
    """
    for tensor in part.parameters():
        tensor.data = tensor.data.clone()


def _check_whole(base: Path, part: Any) -> None:
    name = type(part).__name__
    for key, tensor in part.named_parameters():
        if tensor.is_meta:
            raise ModelError("model.incomplete", f"{base.name} has no {key} for its {name}")
        if not torch.isfinite(tensor).all():
            raise ModelError("model.not_finite", f"{key} of {base.name}'s {name} is not finite")
