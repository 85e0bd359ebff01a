"""What is Anima's alone: two tokenizers, a conditioner, frames, a VAE with a mean per channel."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_agent.lora import check, tiny_base
from gpu_agent.lora.adapter import Adapter
from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import anima, family, naming
from gpu_agent.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_base.write(tmp_path_factory.mktemp("anima") / "tiny", 0, "anima")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny_base.write(tmp_path_factory.mktemp("anima") / "tiny.safetensors", 0, "anima")


def load(base, **recipe):
    said = Recipe.from_dict({"resolution": 64, **recipe}, "anima")
    return family("anima").load(base, base.parent, said, CPU, torch.float32)


def test_a_single_file_with_folders_beside_it_is_bit_for_bit_the_folder(file, folder):
    one, two = load(file), load(folder)
    for ours, theirs in (
        (one.denoiser, two.denoiser),
        (one.vae, two.vae),
        *zip(one.text_encoders.values(), two.text_encoders.values(), strict=True),
    ):
        tensors = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, tensors.pop(name)), name
        assert not tensors
    assert one.sample_shift == two.sample_shift == 3.0


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_file_may_be_one_that_comfyui_or_a_finetuner_saved(file, tmp_path, prefix):
    base = shutil.copytree(file.parent, tmp_path / "copy") / "again.safetensors"
    tensors = load_file(file)
    save_file({prefix + name.removeprefix("net."): tensors[name] for name in tensors}, base)
    assert family("anima").check(base)
    ours, theirs = load(base).denoiser.state_dict(), load(file).denoiser.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@torch.no_grad()
def test_a_sample_image_is_the_one_that_diffusers_paints(folder):
    model = load(folder)
    noise = torch.randn(
        (1, *model.latent_shape(64, 64)), generator=torch.Generator().manual_seed(0)
    )
    told, untold = model.encode_texts(["a cat"]), model.encode_texts([""])

    def predict(noisy, levels):
        plain = model.predict(noisy, levels, untold)
        return plain + model.sample_guidance * (model.predict(noisy, levels, told) - plain)

    latents = model.objective.sample(predict, noise, 3, model.sample_shift, lambda done: None)
    pipeline = family("anima").pipeline(folder, folder.parent)
    theirs = pipeline(
        prompt="a cat", height=64, width=64, num_inference_steps=3, latents=noise, output_type="np"
    )
    assert torch.allclose(latents, theirs.latents, atol=1e-4)
    image = torch.tensor(theirs.images[0]) * 255
    model.release_encoders(texts=True)
    ours = torch.tensor(np.array(model.decode(latents)))
    assert (ours - image).abs().max() <= 1


@torch.no_grad()
def test_latents_are_scaled_as_diffusers_scales_them(folder):
    from diffusers.modular_pipelines.anima.encoders import encode_vae_image

    model = load(folder)
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = model.vae.encode(pixels[:, :, None]).latent_dist.parameters
    ours = model.draw_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
    theirs = encode_vae_image(pixels, model.vae, None, CPU, torch.float32)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_texts_are_the_same_alone_and_beside_longer_ones(folder):
    model = load(folder)
    with torch.no_grad():
        together = model.encode_texts(["a cat on a mat", "a", ""])["text"]
        alone = torch.cat(
            [model.encode_texts([text])["text"] for text in ("a cat on a mat", "a", "")]
        )
    assert together.shape == (3, 512, 32)
    assert torch.allclose(together, alone, atol=1e-5)


def test_diffusers_still_needs_torchvision_to_resize_a_mask(folder, monkeypatch):
    """Otherwise our own `_resize` in its place can go."""
    from diffusers.models.transformers import transformer_cosmos

    model = load(folder)
    inputs = (torch.zeros(1, 16, 1, 4, 4), torch.tensor([0.5]), {"text": torch.zeros(1, 512, 32)})
    assert model.predict(*inputs).shape == (1, 16, 1, 4, 4)
    monkeypatch.delattr(transformer_cosmos, "transforms")
    with pytest.raises(NameError, match="transforms"):
        model.predict(*inputs)


def test_a_lora_is_the_same_in_comfyuis_names(folder, tmp_path):
    """Of the transformer and of the conditioner, with an alpha that is not the rank."""
    from gpu_agent.lora import export

    said = {"resolution": 64, "rank": 2, "alpha": 8.0, "targets": "full", "text_encoder_rate": 1e-4}
    recipe = Recipe.from_dict(said, "anima")
    adapter = Adapter(load(folder), recipe)
    place = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.2 * torch.randn(tensor.shape, generator=place)
        for name, tensor in adapter.tensors().items()
    }
    assert any(name.startswith("text_conditioner.") for name in tensors)
    export.write(
        tmp_path,
        tensors,
        family=family("anima"),
        recipe=recipe,
        configs=adapter.configs,
        pictures=[],
        steps=1,
    )
    twin = tmp_path / naming.COMFYUI
    proof = check.prove(tmp_path / export.DIFFUSERS, folder, twin, family="anima")
    assert proof.holds, proof
    assert proof.changed > 1
    assert proof.kohya_differs == 0
    assert not any(name.endswith(".alpha") for name in load_file(twin))


def test_the_real_model_is_recognised_counted_and_adapted_as_published(tmp_path):
    """1956 M and 134.7 M parameters; sd-scripts trains 280 layers of the transformer."""
    from accelerate import init_empty_weights
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    kinds = {"transformer": CosmosTransformer3DModel, "text_conditioner": AnimaTextConditioner}
    real = {
        "transformer": {
            "num_attention_heads": 16,
            "rope_scale": (1.0, 4.0, 4.0),
            "extra_pos_embed_type": None,
        },
        "text_conditioner": {},
    }
    with init_empty_weights():
        parts = {name: kinds[name](**config) for name, config in real.items()}
    millions = {
        name: sum(tensor.numel() for tensor in part.parameters()) / 1e6
        for name, part in parts.items()
    }
    assert millions == pytest.approx({"transformer": 1956, "text_conditioner": 134.7}, rel=3e-4)

    shapes = {
        anima.original(f"{name}.{tensor}"): tuple(value.shape)
        for name, part in parts.items()
        for tensor, value in part.state_dict().items()
    }
    found = anima.Part(tmp_path, "", shapes, None)
    for name, config in (
        ("transformer", anima.transformer_config(found)),
        ("text_conditioner", anima.conditioner_config(found)),
    ):
        assert config == {key: parts[name].config[key] for key in config}

    chosen = {
        preset: [
            name
            for name, _ in parts["transformer"].named_modules()
            if check_target_module_exists(LoraConfig(target_modules=targets), name)
        ]
        for preset, targets in (("attention", anima.ATTENTION), ("full", anima.FULL))
    }
    assert [len(names) for names in chosen.values()] == [224, 280]
    tensors = {f"transformer.{name}.lora_A.weight": torch.zeros(1, 1) for name in chosen["full"]}
    layers = [
        *(
            f"{attention}_{layer}_proj"
            for attention in ("self_attn", "cross_attn")
            for layer in ("q", "k", "v", "output")
        ),
        "mlp_layer1",
        "mlp_layer2",
    ]
    theirs = {f"lora_unet_blocks_{block}_{layer}" for block in range(28) for layer in layers}
    assert {name.split(".")[0] for name in anima.kohya(tensors, 1.0)} == theirs


@pytest.mark.parametrize("component", ["vae", "t5_tokenizer", "text_conditioner"])
def test_a_folder_that_lacks_something_says_what(folder, tmp_path, component):
    base = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(base / component)
    with pytest.raises(ModelError, match=component):
        load(base)
