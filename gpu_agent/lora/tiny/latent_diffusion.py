"""Very small SD 1.x, SD 2.x and SDXL models, as the file that Civitai serves or as a folder.

A folder has the text encoders' tensors under the published names, with ``text_model.`` before them.
transformers 5 would leave that out, and transformers 4 then fills the encoder with random weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_agent.lora import tensor_file
from gpu_agent.lora.families import ldm
from gpu_agent.lora.families.clip_words import (
    BYTE_WORDS,
    HUGGING_FACE_PAD,
    OPEN_CLIP_PAD,
    tokenizer_for,
)

#: Multiples of 32 (normalisation groups).
VAE_WIDTHS = (32, 32, 64, 64)
#: Log variance of the latents: an untrained VAE would drown the image in its own noise.
_LOG_VARIANCE = -8.0


def write(
    out: Path,
    seed: int,
    layout: ldm.Layout,
    unet: Mapping[str, Any],
    encoders: Mapping[str, int],
    metadata: Mapping[str, str],
    prediction: str = "epsilon",
) -> None:
    """Write the model: a file, or a folder where `out` does not end in ``.safetensors``.

    Args:
        unet: how its configuration differs from the real one.
        encoders: the width of each text encoder.
        metadata: of the file.
        prediction: what a folder says that the UNet predicts.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        parts = {"unet": _unet(layout, unet), "vae": _vae(layout)}
        for name, width in encoders.items():
            parts[name] = _text_encoder(layout, name, width)
    if out.suffix == ".safetensors":
        tensor_file.write(out, dict(_tensors(layout, parts)), {"format": "pt", **metadata})
    else:
        _write_folder(out, layout, parts, prediction)


def _tensors(layout: ldm.Layout, parts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    unet, vae = parts["unet"], parts["vae"]
    layers = unet.config["layers_per_block"]
    attends = tuple("CrossAttn" in kind for kind in unet.config["up_block_types"])
    for name, tensor in unet.state_dict().items():
        yield ldm.UNET + ldm.unet_name(name, layers=layers, attends=attends), tensor
    for name, tensor in vae.state_dict().items():
        # LDM's VAE attention is made of 1x1 convolutions
        convolution = ".attentions." in name and tensor.ndim == 2
        stored = tensor[:, :, None, None] if convolution else tensor
        yield ldm.VAE + ldm.vae_name(name, levels=len(VAE_WIDTHS)), stored
    for encoder in layout.encoders:
        tensors = {
            name.removeprefix("text_model."): tensor
            for name, tensor in parts[encoder.component].state_dict().items()
        }
        if encoder.open_clip:
            yield from _open_clip(tensors, encoder)
        else:
            for name, tensor in tensors.items():
                yield f"{encoder.prefix}text_model.{name}", tensor


def _open_clip(tensors: dict[str, Any], encoder: ldm.Encoder) -> Iterator[tuple[str, Any]]:
    import torch

    layers = sum(name.endswith("mlp.fc1.weight") for name in tensors)
    for name, tensor in tensors.items():
        place, _, leaf = name.partition(".q_proj.")
        if leaf:
            thirds = [tensors[f"{place}.{part}_proj.{leaf}"] for part in "qkv"]
            stored, tensor = ldm.open_clip_name(f"{place}.in_proj_{leaf}"), torch.cat(thirds)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif name == "text_projection.weight":
            stored, tensor = "text_projection", tensor.T
        else:
            stored = ldm.open_clip_name(name)
        yield encoder.prefix + stored, tensor
        # as the published files, this one has layers that nobody uses
        for more in range(encoder.unused):
            last = f"resblocks.{layers - 1}."
            if last in stored:
                yield (
                    encoder.prefix + stored.replace(last, f"resblocks.{layers + more}."),
                    tensor.clone(),
                )
    if "text_projection.weight" not in tensors:
        width = tensors["final_layer_norm.bias"].shape[0]
        yield f"{encoder.prefix}text_projection", torch.eye(width)


def _write_folder(out: Path, layout: ldm.Layout, parts: Mapping[str, Any], prediction: str) -> None:
    for name, part in parts.items():
        folder = out / name
        folder.mkdir(parents=True)
        tensors = part.state_dict()
        if name.startswith("text_encoder"):
            part.config.architectures = [type(part).__name__]
            part.config.save_pretrained(folder)
            _write_words(out / name.replace("text_encoder", "tokenizer"), part.config)
            tensors = {_published(tensor): value for tensor, value in tensors.items()}
            tensor_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
        else:
            part.save_config(folder)
            weights = folder / "diffusion_pytorch_model.safetensors"
            tensor_file.write(weights, tensors, {"format": "pt"})
    scheduler = layout.template("scheduler/scheduler_config.json")
    for file, said in (
        ("scheduler/scheduler_config.json", {**scheduler, "prediction_type": prediction}),
        ("model_index.json", layout.template("model_index.json")),
    ):
        (out / file).parent.mkdir(exist_ok=True)
        (out / file).write_text(json.dumps(said), encoding="utf-8")


def _published(name: str) -> str:
    if name.startswith("text_projection."):
        return name
    return f"text_model.{name.removeprefix('text_model.')}"


def _write_words(folder: Path, config: Any) -> None:
    pad = HUGGING_FACE_PAD if config.hidden_act == "quick_gelu" else OPEN_CLIP_PAD
    tokenizer = tokenizer_for(BYTE_WORDS, config.max_position_embeddings, folder, pad=pad)
    tokenizer.save_pretrained(folder)
    # transformers 4 reads these two instead of tokenizer.json
    words = json.dumps(tokenizer.get_vocab(), ensure_ascii=False)
    (folder / "vocab.json").write_text(words, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def _unet(layout: ldm.Layout, changes: Mapping[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config({**layout.template("unet/config.json"), **changes})


def _vae(layout: ldm.Layout) -> Any:
    from diffusers import AutoencoderKL

    config = layout.template("vae/config.json")
    config.update(block_out_channels=VAE_WIDTHS)
    vae = AutoencoderKL.from_config(config)
    channels = config["latent_channels"]
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = _LOG_VARIANCE
    return vae


def _text_encoder(layout: ldm.Layout, name: str, width: int) -> Any:
    import transformers

    config = layout.template(f"{name}/config.json")
    config.update(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 64,
        num_hidden_layers=2,
        vocab_size=BYTE_WORDS,
        bos_token_id=BYTE_WORDS - 2,
        eos_token_id=BYTE_WORDS - 1,
    )
    kind = getattr(transformers, config["architectures"][0])
    return kind(transformers.CLIPTextConfig(**config))
