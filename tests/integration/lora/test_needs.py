"""The estimate of a training's memory beside what real networks take, without their weights."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gpu_agent import needs
from gpu_agent.lora import families
from gpu_agent.lora.families.base import ATTENTION, JOINT
from gpu_agent.recipe import Recipe

GIB = 2**30
CONFIGS = Path(families.__file__).parents[1] / "configs"


@pytest.fixture
def autocast(monkeypatch):
    """As CUDA's does it; a "meta" device has none of its own, and a function mode would not be
    there where checkpoints compute again."""

    def cast(name, dtype):
        plain = getattr(functional, name)

        def wrapped(*args, **kwargs):
            args, kwargs = tree_map_only(torch.Tensor, lambda item: item.to(dtype), (args, kwargs))
            return plain(*args, **kwargs)

        monkeypatch.setattr(functional, name, wrapped)

    def attention(query, key, value, **_):
        # no matrix of all pairs is kept, as by every GPU's kernel
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(*(item.to(torch.bfloat16) for item in (query, key, value)))[0]

    for name in ("linear", "conv2d"):
        cast(name, torch.bfloat16)
    for name in ("layer_norm", "group_norm"):
        cast(name, torch.float32)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)


class Allocated(TorchDispatchMode):
    """Counts bytes, but for those of `known` tensors."""

    def __init__(self, known):
        super().__init__()
        self.now = self.most = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata)
                    self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return made

    def _forget(self, key):
        self.now -= self.sizes.pop(key)


def unet(family, side, width, **more):
    config = json.loads((CONFIGS / family / "unet" / "config.json").read_text())
    return UNet2DConditionModel.from_config(config), {
        "sample": torch.zeros(1, 4, side // 8, side // 8),
        "timestep": torch.zeros(1, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(1, 77, width),
        **more,
    }


def sd1(side):
    return unet("sd1", side, 768)


def sdxl(side):
    framing = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    return unet("sdxl", side, 2048, added_cond_kwargs=framing)


def flux(side):
    tokens = (side // 16) ** 2
    return FluxTransformer2DModel(guidance_embeds=True), {
        "hidden_states": torch.zeros(1, tokens, 64),
        "encoder_hidden_states": torch.zeros(1, 512, 4096),
        "pooled_projections": torch.zeros(1, 768),
        "timestep": torch.zeros(1),
        "guidance": torch.zeros(1),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(512, 3),
    }


@pytest.mark.parametrize(
    ("make", "side", "again"),
    [
        (sd1, 512, True),
        pytest.param(sdxl, 1024, False, marks=pytest.mark.slow),
        pytest.param(flux, 512, False, marks=pytest.mark.slow),
    ],
    ids=["sd1-again", "sdxl", "flux"],
)
@pytest.mark.usefixtures("autocast")
def test_the_estimate_is_what_the_real_network_takes(make, side, again):
    with torch.device("meta"):
        made, told = make(side)
        made.requires_grad_(False).eval()
        made.add_adapter(LoraConfig(r=16, target_modules=[*ATTENTION, *JOINT]))
    trained = [item for item in made.parameters() if item.requires_grad]
    frozen = [item for item in made.parameters() if not item.requires_grad]
    for item in frozen:
        item.data = item.data.to(torch.bfloat16)
    if again:
        made.enable_gradient_checkpointing()
    counted = Allocated([*made.parameters(), *made.buffers()])
    with counted, torch.device("meta"):
        made(**told).sample.float().square().mean().backward()
    # AdamW's two states, and the weights in fp32
    stays = 2 * sum(item.numel() for item in frozen) + 12 * sum(item.numel() for item in trained)
    recipe = Recipe.from_dict({"resolution": side}, make.__name__)
    geometry = needs.GEOMETRIES[make.__name__]
    estimate = needs.training(recipe, geometry, needs.Way(checkpointing=again))
    assert (stays + counted.most) / GIB == pytest.approx(estimate, rel=0.05)
    assert sum(item.numel() for item in made.parameters()) / 1e9 == pytest.approx(
        geometry.parameters + 16 * geometry.adapter[0] / 1e3, rel=0.01
    )
