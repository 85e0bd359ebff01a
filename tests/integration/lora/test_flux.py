"""What is FLUX.1's alone: packed latents, distilled guidance, fused layers, schnell."""

import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import ImageChops
from safetensors.torch import load_file

from gpu_agent.lora import tiny_base
from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import family, flux, single_file
from gpu_agent.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_base.write(tmp_path_factory.mktemp("flux") / "tiny", 0, "flux")


def load(base, **recipe):
    recipe = Recipe.from_dict({"resolution": 64, **recipe}, "flux")
    return family("flux").load(base, base.parent, recipe, CPU, torch.float32)


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny)


@torch.no_grad()
def test_a_sample_image_is_the_one_that_diffusers_paints(tiny, model):
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(0))
    told = model.encode_texts(["a cat"])
    latents = model.objective.sample(
        lambda noisy, levels: model.predict(noisy, levels, told),
        noise,
        3,
        model.sample_shift,
        lambda done: None,
    )
    pipeline = FluxPipeline.from_pretrained(tiny, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    packed = flux.packed(noise)
    theirs = pipeline("a cat", height=64, width=64, num_inference_steps=3, latents=packed)
    # rounding may put a pixel one level higher or lower
    far = ImageChops.difference(model.decode(latents), theirs.images[0]).getextrema()
    assert max(most for _, most in far) <= 1


@torch.no_grad()
def test_training_says_the_recipes_guidance_and_sample_images_their_own(tiny, model):
    latents, noise, levels = torch.zeros(1, 16, 8, 8), torch.ones(1, 16, 8, 8), torch.tensor([0.5])
    told = model.encode_texts([""])
    other = load(tiny, guidance=4.0)
    assert model.losses(latents, noise, levels, told) != other.losses(latents, noise, levels, told)
    assert torch.equal(model.predict(noise, levels, told), other.predict(noise, levels, told))


@torch.no_grad()
def test_schnell_reads_256_words_and_is_told_no_guidance(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "schnell")
    config = json.loads((base / "transformer" / "config.json").read_text())
    made = FluxTransformer2DModel.from_config({**config, "guidance_embeds": False})
    made.save_pretrained(base / "transformer")
    schnell = load(base)
    told = schnell.encode_texts(["a cat"])
    assert told["text"].shape[1] == 256
    assert schnell.sample_shift == 1.0
    assert schnell.predict(torch.ones(2, 16, 8, 8), torch.tensor([0.5, 0.7]), told).isfinite().all()


def test_a_model_that_takes_more_than_latents_is_refused(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "fill")
    config = json.loads((base / "transformer" / "config.json").read_text())
    made = FluxTransformer2DModel.from_config({**config, "in_channels": 128, "out_channels": 64})
    made.save_pretrained(base / "transformer")
    with pytest.raises(ModelError, match="fill, depth and canny"):
        load(base)


@pytest.mark.parametrize("preset", ["attention", "full"])
def test_diffusers_reads_the_kohya_file_back_to_the_same_update_of_each_layer(preset):
    tensors = _lora(preset)
    read = FluxPipeline.lora_state_dict(flux.kohya(tensors, 8.0))
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    assert len(layers) == {"attention": 11, "full": 20}[preset]
    for layer in layers:
        # some columns stand for all
        ours = _update(tensors, layer) * (8.0 / 4)
        assert torch.equal(ours, _update(read, layer)), layer
    rest = {name.rsplit(".", 2)[0] for name in read} - set(layers)
    assert not any(_update(read, layer).any() for layer in rest)


def _lora(preset):
    """A LoRA of rank 4 for one block of each kind, as wide as the real ones."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    config = LoraConfig(target_modules=flux.Flux.targets(None, preset))
    drawn = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and check_target_module_exists(config, name):
            rows, columns = module.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns, generator=drawn)
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=drawn)
    return tensors


def _update(tensors, layer):
    down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
    # summed one by one, so that further zeros change nothing
    return sum(up[:, [n]] * down[[n], ::97] for n in range(len(down)))


# --- why we read and write the original names ourselves -------------------------------------------


def test_diffusers_still_reads_single_files_of_one_width_only(tiny):
    weights = load_file(tiny / "transformer" / "diffusion_pytorch_model.safetensors")
    originals = dict(single_file.originals(weights, flux.placing, 64))
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        FluxTransformer2DModel.from_single_file(
            originals, config=str(tiny), subfolder="transformer", local_files_only=True
        )


def test_diffusers_still_reads_kohya_files_of_one_width_only():
    lora = {
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 64),
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(64, 4),
    }
    with pytest.raises(AssertionError):
        FluxPipeline.lora_state_dict(flux.kohya(lora, 4.0))
