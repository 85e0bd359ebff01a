"""Single files of the families that have a transformer: whose tensors they hold, under which names.

Such a file holds the transformer alone, or with it the VAE and the text encoders, each under a
prefix that Stability AI's and ComfyUI's files share. The names inside are those of the original
code, which keeps in one tensor what diffusers has in several: queries, keys and values lie below
each other. A family says by a `Place` per layer where each of diffusers' layers lies there; from
that alone follow reading a file, writing one, and naming a LoRA as kohya's and ComfyUI's programs
read it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open

from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import ldm, naming
from gpu_agent.lora.families.base import check_whole, settle

DENOISER = ("model.diffusion_model.",)
VAE = ("first_stage_model.", "vae.")
CLIP_L = ("text_encoders.clip_l.transformer.",)
CLIP_G = ("text_encoders.clip_g.transformer.",)
T5 = ("text_encoders.t5xxl.transformer.",)

#: Channels per attention head in CLIP text encoders.
_CLIP_HEAD = 64


# --- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One component's tensors in a file, by their names behind its prefix; read when asked for."""

    base: Path
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    _file: Any

    def tensor(self, name: str, start: int = 0, rows: int | None = None) -> Any:
        """A tensor, or so many of its rows; eight-bit floats as the numbers they stand for.

        Raises:
            ModelError: it is missing, or of a kind that nothing is trained from.
        """
        if name not in self.shapes:
            raise ModelError("model.incomplete", f"{self.base.name} has no {self.prefix}{name}")
        if rows is None:
            found = self._file.get_tensor(self.prefix + name)
        else:
            found = self._file.get_slice(self.prefix + name)[start : start + rows]
        if not found.is_floating_point():
            raise ModelError(
                "model.format",
                f"{self.base.name} is quantised ({found.dtype}); take its bf16, fp16 or fp8 file",
            )
        scale = name.removesuffix("weight") + "scale_weight"
        if found.element_size() == 1 and scale in self.shapes:
            return found.float() * self._file.get_tensor(self.prefix + scale).float()
        return found

    def count(self, pattern: str) -> int:
        """How many of ``pattern.format(0)``, ``pattern.format(1)``, … begin some name."""
        before, after = (re.escape(part) for part in pattern.split("{}"))
        found = re.compile(f"{before}(\\d+){after}")
        return len({match[1] for match in map(found.match, self.shapes) if match})


class Source:
    """Where the components of a base come from: a single file, folders beside it, the hub.

    Args:
        base: a single file or a diffusers folder, which must have everything itself.
        repository: on the Hugging Face hub.
    """

    def __init__(self, base: Path, repository: str) -> None:
        self.base = base
        self.folder = base if base.is_dir() else base.parent
        self._repository = repository
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        if not base.is_dir():
            self._shapes = ldm.read_header(base).shapes
            self._file = safe_open(base, framework="pt")

    def part(self, prefixes: tuple[str, ...]) -> Part | None:
        """The component that a single file has under one of these prefixes."""
        for prefix in prefixes:
            shapes = {
                name.removeprefix(prefix): shape
                for name, shape in self._shapes.items()
                if name.startswith(prefix)
            }
            if shapes:
                return Part(self.base, prefix, shapes, self._file)
        return None

    def denoiser(self) -> Part | None:
        """The transformer of a single file, which has no prefix where it is alone."""
        if self.base.is_dir():
            return None
        return self.part(DENOISER) or Part(self.base, "", self._shapes, self._file)

    def get(self, load: Callable[..., Any], component: str, **settings: Any) -> Any:
        """What a library's `from_pretrained` makes of a component that is in no single file.

        Raises:
            ModelError: `model.component`; it can be had nowhere.
        """
        there = (self.folder / component).is_dir()
        if self.base.is_dir() and not there:
            # transformers would make an empty tokenizer out of nothing
            raise ModelError("model.component", f"{self.base.name} lacks its folder {component}")
        beside = self.base.is_dir() or there
        where = str(self.folder) if beside else self._repository
        try:
            return load(where, subfolder=component, local_files_only=beside, **settings)
        except (OSError, ValueError) as error:
            raise ModelError(
                "model.component",
                f"{self.base.name} lacks a usable {component}: put the folder {component} of "
                f"{self._repository} beside it, or take a file that has everything "
                f"({_first_line(error)})",
                retryable=not beside,
            ) from error

    def words(self, kind: Any, component: str, **settings: Any) -> Any:
        """A tokenizer of transformers, which makes one without words where it finds no file.

        Raises:
            ModelError: it can be had nowhere.
        """

        def load(where: str, **told: Any) -> Any:
            tokenizer = kind.from_pretrained(where, **told)
            if tokenizer.get_vocab().keys() <= kind().get_vocab().keys():
                raise OSError("no words are there")
            return tokenizer

        return self.get(load, component, **settings)

    def encoder(self, kind: Any, component: str, dtype: Any) -> Any:
        """A text encoder of transformers, which fills what is missing with random numbers.

        Raises:
            ModelError: weights are missing.
        """
        encoder, told = self.get(
            kind.from_pretrained, component, torch_dtype=dtype, output_loading_info=True
        )
        if told["missing_keys"]:
            lacks = sorted(told["missing_keys"])[:3]
            raise ModelError("model.incomplete", f"{component} lacks {', '.join(lacks)}")
        return encoder


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def filled(
    make: Callable[[], Any],
    read: Callable[[str, tuple[int, ...]], Any],
    device: Any,
    dtype: Any,
) -> Any:
    """The model that `make` makes, each tensor read and sent to where and what it is to be.

    Args:
        read: a tensor by its name and shape in the model's `state_dict`.
    """
    with init_empty_weights():
        model = make()
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(
        {name: read(name, shape).to(device, dtype) for name, shape in names.items()}, assign=True
    )
    return model.eval()


def placed(base: Path, part: Any, device: Any, *, waits: bool = False) -> Any:
    """A checked component, on the device.

    Args:
        waits: leave it where its file is mapped, for `fit` to bring over when texts and images are
            encoded: not every GPU holds a denoiser beside T5.

    Raises:
        ModelError: weights are missing or not finite.
    """
    check_whole(base, part)
    if device.type == "cpu":
        settle(part)
    return part if waits else part.to(device)


# --- where diffusers' layers lie in the original code's ------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a layer lies.

    Attributes:
        name: of the original layer.
        part, of: which of how many widths of rows it begins at; 0 of 0 where it has its own tensor.
        pair: its rows are shift and scale, and diffusers has scale first, unless there are more.
    """

    name: str
    part: int = 0
    of: int = 0
    pair: bool = False

    def numbered(self, block: str) -> Place:
        """The same layer of a certain block."""
        return replace(self, name=self.name.format(block))

    def turned(self, rows: Any, width: int) -> Any:
        """The rows in the other program's order."""
        if self.pair and len(rows) == 2 * width:
            return torch.cat(rows.chunk(2)[::-1])
        return rows


#: A tensor's name in diffusers → where its layer lies, and what the tensor is called there.
Placing = Callable[[str], tuple[Place, str]]


def read_placed(part: Part, placing: Placing, width: int) -> Callable[[str, tuple[int, ...]], Any]:
    """For `filled`: reads a transformer of so many channels by diffusers' names."""

    def read(name: str, shape: tuple[int, ...]) -> Any:
        place, leaf = placing(name)
        original = f"{place.name}.{leaf}" if leaf else place.name
        if not place.of:
            return place.turned(part.tensor(original), width)
        return part.tensor(original, place.part * width, shape[0])

    return read


def originals(
    tensors: Mapping[str, Any], placing: Placing, width: int
) -> Iterator[tuple[str, Any]]:
    """Diffusers-named tensors of a transformer → the original names and tensors."""
    parts: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for name, tensor in tensors.items():
        place, leaf = placing(name)
        original = f"{place.name}.{leaf}" if leaf else place.name
        parts[original].append((place.part, place.turned(tensor, width)))
    for original, found in parts.items():
        ordered = [tensor for _, tensor in sorted(found, key=lambda one: one[0])]
        yield original, torch.cat(ordered) if len(ordered) > 1 else ordered[0]


# --- a LoRA by the original layers ----------------------------------------------------------------

#: What a diffusers file calls a text encoder → what kohya's and ComfyUI's programs do.
_ENCODERS = {
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
}


@dataclass(frozen=True)
class Update:
    """What a LoRA does to one original layer.

    Attributes:
        down, up: (rank, columns), (rows, rank).
        alpha: up @ down counts alpha / rank times.
        magnitudes: of DoRA, (rows,).
    """

    down: Any
    up: Any
    alpha: float
    magnitudes: Any

    def named(self, layer: str) -> dict[str, Any]:
        """As kohya's and ComfyUI's programs name it."""
        said = {
            f"{layer}.lora_down.weight": self.down,
            f"{layer}.lora_up.weight": self.up,
            f"{layer}.alpha": torch.tensor(self.alpha),
        }
        if self.magnitudes is not None:
            said[f"{layer}.dora_scale"] = self.magnitudes[:, None]
        return said


def updates(
    tensors: Mapping[str, Any], alpha: float, placing: Placing, unit: int | None = None
) -> dict[str, Update]:
    """The part of a LoRA that is for the transformer, by the original layer's name.

    Layers that share an original tensor are put side by side: their A below each other, their B
    along the diagonal, which gives exactly their updates. The rank is then the sum of theirs, and
    alpha grows with it.

    Args:
        unit: of the rows that a `Place` counts in; None means the layer's columns.

    Returns: nothing where it cannot be said: DoRA's magnitudes of rows that it does not train.
    """
    layers: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, leaf = naming.split(name)
        if layer.startswith("transformer."):
            layers[layer.removeprefix("transformer.")][leaf] = tensor
    together: dict[str, list[tuple[Place, dict[str, Any]]]] = defaultdict(list)
    for layer, found in layers.items():
        place, _ = placing(layer + ".weight")
        together[place.name].append((place, found))
    said: dict[str, Update] = {}
    for name, parts in together.items():
        parts.sort(key=lambda part: part[0].part)
        down = torch.cat([found["lora_A.weight"] for _, found in parts])
        up, magnitudes = _beside_each_other(parts, unit), None
        if "lora_magnitude_vector" in parts[0][1]:
            magnitudes = torch.cat([found["lora_magnitude_vector"] for _, found in parts])
            magnitudes = parts[0][0].turned(magnitudes, unit or down.shape[1])
            if len(magnitudes) < len(up):
                return {}
        said[name] = Update(down, up, alpha * len(parts), magnitudes)
    return said


def kohya(
    tensors: Mapping[str, Any], alpha: float, placing: Placing, unit: int | None = None
) -> dict[str, Any]:
    """A LoRA as sd-scripts writes it and ComfyUI reads it; see `updates`."""
    said: dict[str, Any] = {}
    for layer, update in updates(tensors, alpha, placing, unit).items():
        said |= update.named(f"lora_unet_{layer.replace('.', '_')}")
    encoders = {name: one for name, one in tensors.items() if name.split(".")[0] in _ENCODERS}
    return said | naming.renamed(encoders, alpha, _encoder_layer) if said else {}


def _encoder_layer(layer: str) -> str:
    component, rest = layer.split(".", 1)
    return f"{_ENCODERS[component]}_{rest.replace('.', '_')}"


def _beside_each_other(parts: list[tuple[Place, dict[str, Any]]], unit: int | None) -> Any:
    """The B of layers that lie in one: (rows of the original layer, sum of their ranks)."""
    first, found = parts[0]
    unit = unit or found["lora_A.weight"].shape[1]
    if not first.of:
        return first.turned(found["lora_B.weight"], unit)
    ranks = [found["lora_B.weight"].shape[1] for _, found in parts]
    whole = found["lora_B.weight"].new_zeros((first.of * unit, sum(ranks)))
    for number, (place, found) in enumerate(parts):
        rows, at = place.part * unit, sum(ranks[:number])
        up = found["lora_B.weight"]
        whole[rows : rows + len(up), at : at + ranks[number]] = up
    return whole


# --- components that several families share -----------------------------------------------------


def vae(part: Part, *, scaling: float, shift: float) -> Any:
    """The `AutoencoderKL` of 16 channels of SD3 and FLUX.1, in fp32 on the CPU."""
    from diffusers import AutoencoderKL

    levels = part.count("encoder.down.{}.")
    widths = [part.shapes[f"encoder.down.{n}.block.0.conv1.weight"][0] for n in range(levels)]
    config = {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": part.count("encoder.down.0.block.{}."),
        "latent_channels": part.shapes["decoder.conv_in.weight"][1],
        "sample_size": 1024,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }

    def read(name: str, shape: tuple[int, ...]) -> Any:
        # the original's attention is made of 1x1 convolutions
        return part.tensor(ldm.vae_name(name, levels=levels)).reshape(shape)

    return filled(
        lambda: AutoencoderKL.from_config(config), read, torch.device("cpu"), torch.float32
    )


def clip(part: Part, *, projected: bool) -> Any:
    """A CLIP text encoder, in fp32 on the CPU.

    Args:
        projected: with a projection of its pooled output, the identity where a file has none.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words, width = part.shapes["text_model.embeddings.token_embedding.weight"]
    projection = "text_projection.weight"
    config = CLIPTextConfig(
        hidden_size=width,
        projection_dim=part.shapes.get(projection, (width,))[0],
        intermediate_size=part.shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        max_position_embeddings=part.shapes["text_model.embeddings.position_embedding.weight"][0],
        num_attention_heads=max(1, width // _CLIP_HEAD),
        num_hidden_layers=part.count("text_model.encoder.layers.{}."),
        # OpenAI's CLIP has an approximation of the GELU that its larger successors do not
        hidden_act="quick_gelu" if part.prefix in CLIP_L else "gelu",
        vocab_size=words,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
    )

    def read(name: str, shape: tuple[int, ...]) -> Any:
        if name == projection:
            # Stability AI's own code takes CLIP-L's pooled output as it is, whatever the file says
            given = part.prefix not in CLIP_L and projection in part.shapes
            return part.tensor(projection) if given else torch.eye(*shape)
        # transformers 4 says text_model.…, transformers 5 does not
        return part.tensor("text_model." + name.removeprefix("text_model."))

    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return filled(lambda: kind(config), read, torch.device("cpu"), torch.float32)
