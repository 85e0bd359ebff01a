"""The base models that a LoRA can be trained for: one row and one module per family.

A base is a diffusers folder, or a single safetensors file in the layout that Civitai and ComfyUI
know. Which family it belongs to shows without torch: by the pipeline that a folder names, by the
names of a file's tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_agent.lora.errors import JobError, ModelError
from gpu_agent.lora.families import ldm
from gpu_agent.recipe import REPOSITORIES, Recipe

if TYPE_CHECKING:
    from gpu_agent.lora.families.base import Model
    from gpu_agent.lora.families.naming import Export


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of base models.

    Attributes:
        module: in this package; its `load` makes a `base.Model`, its `pipeline` diffusers' own, its
            `EXPORTS` are other namings of a LoRA.
        pipelines: what `model_index.json` calls such a model.
        components: the folders of a diffusers model that hold weights.
        marks: parts of tensor names; a single file in which all occur is of this family.
        architecture: its name in `modelspec.architecture`.
        kohya_version: its name in `ss_base_model_version`.
    """

    name: str
    title: str
    module: str
    pipelines: tuple[str, ...]
    components: tuple[str, ...]
    marks: tuple[str, ...]
    architecture: str
    kohya_version: str

    @property
    def repository(self) -> str:
        """On the Hugging Face hub; what a single file lacks comes from there."""
        return REPOSITORIES[self.name]

    def check(self, base: Path) -> str:
        """Read a base's names without torch; returns a fingerprint.

        Raises:
            ModelError: it is missing, broken, or of another family.
        """
        if not base.exists():
            raise ModelError("model.missing", f"{base.name} is not there")
        return self._check_folder(base) if base.is_dir() else self._check_file(base)

    def load(self, base: Path, work: Path, recipe: Recipe, device: Any, dtype: Any) -> Model:
        """Load a base; `work` is a folder for what must lie on the disk meanwhile.

        Raises:
            ModelError: weights are missing, of the wrong shape, or not finite.
        """
        model: Model = self._module().load(base, work, recipe, device, dtype)
        return model

    def pipeline(self, base: Path, work: Path) -> Any:
        """The base as users of diffusers load it: a `DiffusionPipeline`."""
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return self._module().pipeline(base, work)

    def _module(self) -> Any:
        return import_module(f"gpu_agent.lora.families.{self.module}")  # torch, diffusers: 5 s

    def exports(self) -> Mapping[str, Export]:
        """How the family's further files are made from diffusers-named tensors, by file name."""
        exports: Mapping[str, Export] = import_module(
            f"gpu_agent.lora.families.{self.module}"
        ).EXPORTS
        return exports

    def _check_file(self, base: Path) -> str:
        header = ldm.read_header(base)
        found = of_names(header.shapes)
        if found != self.name:
            said = f"a {_FAMILIES[found].title} model" if found else "no model that is known here"
            raise ModelError("model.family", f"{base.name} is {said}, not {self.title}")
        if self.name in ldm.LAYOUTS:
            ldm.configs(header)
        told = json.dumps([sorted(header.shapes.items()), base.stat().st_size])
        return hashlib.sha256(told.encode()).hexdigest()

    def _check_folder(self, base: Path) -> str:
        found = _of_folder(base)
        if found != self.name:
            said = f"a {_FAMILIES[found].title} model" if found else f"a {_pipeline_of(base)}"
            raise ModelError("model.family", f"{base.name} is {said}, not {self.title}")
        told = []
        for component in self.components:
            weights = sorted((base / component).glob("*.safetensors"))
            if not weights:
                raise ModelError("model.format", f"{base.name}/{component} has no safetensors file")
            for file in weights:
                ldm.read_header(file)
                told.append((component, file.name, file.stat().st_size))
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def family(name: str) -> Family:
    """Raises `JobError` for a family that this version does not train."""
    if name not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise JobError("job.family", f"base family {name!r} is not trained here; known are {known}")
    return _FAMILIES[name]


def of_names(names: Iterable[str]) -> str | None:
    """The family whose single file has tensors of these names."""
    text = "\n".join(names)
    fits = (row.name for row in _ROWS if all(mark in text for mark in row.marks))
    return next(fits, None)


def _of_folder(folder: Path) -> str | None:
    """The family of a diffusers folder."""
    kind = _pipeline_of(folder)
    fits = [row.name for row in _ROWS if kind in row.pipelines]
    if len(fits) > 1:
        # SD 1.x and 2.x: the older one's attentions stand between convolutions
        linear = bool(_json(folder / "unet" / "config.json").get("use_linear_projection"))
        return "sd2" if linear else "sd1"
    return fits[0] if fits else None


def _json(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _pipeline_of(folder: Path) -> str:
    for name in ("model_index.json", "modular_model_index.json"):
        if kind := _json(folder / name).get("_class_name"):
            return str(kind)
    raise ModelError("model.format", f"{folder.name} has no readable model_index.json")


# where marks of one are also in another, the stricter one comes first
_ROWS = (
    Family(
        name="sdxl",
        title="SDXL",
        module="sdxl",
        pipelines=("StableDiffusionXLPipeline",),
        components=("unet", "vae", "text_encoder", "text_encoder_2"),
        marks=("model.diffusion_model.input_blocks.", "conditioner.embedders.1."),
        architecture="stable-diffusion-xl-v1-base",
        kohya_version="sdxl_base_v1-0",
    ),
    Family(
        name="sd2",
        title="Stable Diffusion 2.x",
        module="sd",
        pipelines=("StableDiffusionPipeline",),
        components=("unet", "vae", "text_encoder"),
        marks=("model.diffusion_model.input_blocks.", "cond_stage_model.model."),
        architecture="stable-diffusion-v2-768-v",
        kohya_version="sd_v2",
    ),
    Family(
        name="sd1",
        title="Stable Diffusion 1.x",
        module="sd",
        pipelines=("StableDiffusionPipeline",),
        components=("unet", "vae", "text_encoder"),
        marks=("model.diffusion_model.input_blocks.", "cond_stage_model.transformer."),
        architecture="stable-diffusion-v1",
        kohya_version="sd_v1",
    ),
    Family(
        name="hunyuanimage",
        title="HunyuanImage 2.1",
        module="hunyuanimage",
        pipelines=("HunyuanImagePipeline",),
        components=("transformer", "vae", "text_encoder", "text_encoder_2"),
        # HunyuanVideo 1.5 has no single blocks
        marks=("double_blocks.", "single_blocks.", "byt5_in."),
        architecture="hunyuan-image-2.1",
        kohya_version="hunyuan-image-2.1",
    ),
    Family(
        name="flux",
        title="FLUX.1",
        module="flux",
        pipelines=("FluxPipeline",),
        components=("transformer", "vae", "text_encoder", "text_encoder_2"),
        # Chroma and FLUX.2 have no vector_in, HunyuanVideo no img_attn.qkv
        marks=("double_blocks.", "single_blocks.", ".img_attn.qkv.", "vector_in."),
        architecture="flux-1-dev",
        kohya_version="flux1",
    ),
    Family(
        name="sd3",
        title="Stable Diffusion 3",
        module="sd3",
        pipelines=("StableDiffusion3Pipeline",),
        components=("transformer", "vae", "text_encoder", "text_encoder_2"),
        marks=("joint_blocks.", "x_embedder.proj."),
        architecture="stable-diffusion-3",
        kohya_version="sd3m",
    ),
    Family(
        name="lumina2",
        title="Lumina Image 2.0",
        module="lumina2",
        pipelines=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
        components=("transformer", "vae", "text_encoder"),
        # Z-Image's modulation is a single layer
        marks=("noise_refiner.", "cap_embedder.", "layers.0.adaLN_modulation.1."),
        architecture="lumina-2",
        kohya_version="lumina2",
    ),
    Family(
        name="anima",
        title="Anima",
        module="anima",
        pipelines=("AnimaModularPipeline", "AnimaAutoBlocks"),
        components=("transformer", "vae", "text_encoder", "text_conditioner"),
        marks=("llm_adapter.",),
        architecture="anima",
        kohya_version="anima",
    ),
)
_FAMILIES = {row.name: row for row in _ROWS}
