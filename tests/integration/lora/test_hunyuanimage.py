"""What is HunyuanImage 2.1's alone: letters, a VAE of 32, two layouts of files, diffusers' gaps."""

import json
import shutil

import pytest
import torch
from diffusers import HunyuanImagePipeline, HunyuanImageTransformer2DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from gpu_agent.lora import tiny_base
from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import family, hunyuanimage, single_file
from gpu_agent.recipe import Recipe

CPU = torch.device("cpu")
HUNYUAN = family("hunyuanimage")
TEXTS = ['a sign that says "open"', "a cat", ""]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_base.write(tmp_path_factory.mktemp("hunyuanimage") / "tiny", 0, "hunyuanimage")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same model with its transformer in a file of its own."""
    out = tmp_path_factory.mktemp("hunyuanimage-file") / "tiny.safetensors"
    return tiny_base.write(out, 0, "hunyuanimage")


def load(base):
    recipe = Recipe.from_dict({"resolution": 128}, "hunyuanimage")
    return HUNYUAN.load(base, base.parent, recipe, CPU, torch.float32)


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny)


@pytest.fixture(scope="module")
def pipeline(tiny):
    pipeline = HUNYUAN.pipeline(tiny, tiny.parent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_texts_and_letters_are_read_as_diffusers_reads_them(model, pipeline):
    told = model.encode_texts(TEXTS)
    text, mask, letters, letters_mask = pipeline.encode_prompt(TEXTS, batch_size=3)
    # the tiny tokenizers say that they have fewer tokens; what is left out is empty
    theirs = {"text": text, "mask": mask, "letters": letters, "letters_mask": letters_mask}
    for name, of in (("text", "mask"), ("letters", "letters_mask")):
        length = told[of].shape[1]
        assert torch.equal(told[of], theirs[of][:, :length])
        assert not theirs[of][:, length:].any()
        there = told[of].bool()
        assert torch.allclose(told[name][there], theirs[name][:, :length][there], atol=1e-5)
    assert told["letters_mask"].any(dim=1).tolist() == [True, False, False]


@torch.no_grad()
def test_a_sample_image_is_the_one_that_diffusers_paints(model, pipeline):
    shape = (1, *model.latent_shape(96, 64))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert noise.shape == (1, 16, 2, 3)
    told = model.encode_texts(TEXTS[:1])
    latents = model.objective.sample(
        lambda noisy, levels: model.predict(noisy, levels, told),
        noise,
        3,
        model.sample_shift,
        lambda done: None,
    )
    pipeline.guider = pipeline.ocr_guider = None
    theirs = pipeline(
        TEXTS[0],
        height=64,
        width=96,
        num_inference_steps=3,
        latents=noise,
        output_type="latent",
    ).images
    assert torch.allclose(latents, theirs, atol=1e-4)


def test_checkpointed_blocks_give_the_gradients_of_whole_ones(model):
    told = {name: one.detach() for name, one in model.encode_texts(TEXTS[:1]).items()}
    noisy = torch.randn((1, 16, 4, 4), requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.checkpoint_gradients()
        said = model.predict(noisy, torch.tensor([0.5]), told)
        gradients += torch.autograd.grad(said.square().sum(), noisy)
    model.denoiser.disable_gradient_checkpointing()
    assert gradients[0].any()
    assert torch.allclose(*gradients, atol=1e-6)


# --- single files -------------------------------------------------------------------------------


def assert_equal(ours, theirs):
    here, there = ours.denoiser.state_dict(), theirs.denoiser.state_dict()
    assert here.keys() == there.keys()
    assert [name for name in here if not torch.equal(here[name], there[name])] == []


def test_the_authors_file_is_the_folder_to_the_bit(alone, model):
    assert HUNYUAN.check(alone)
    assert_equal(load(alone), model)


def beside(alone, tmp_path, tensors):
    folder = shutil.copytree(alone.parent, tmp_path / "model")
    save_file(tensors, folder / alone.name)
    return folder / alone.name


def test_the_file_that_comfyui_saves_is_too(alone, model, tmp_path):
    placing = hunyuanimage.comfyui_placing
    tensors = {
        f"model.diffusion_model.{name}": tensor
        for name, tensor in hunyuanimage.originals(model.denoiser, placing)
    }
    # names of ComfyUI's comfy/ldm/hunyuan_video/model.py and comfy/ldm/flux/layers.py
    for name in (
        "double_blocks.0.img_attn.qkv.bias",
        "double_blocks.0.txt_attn.norm.query_norm.scale",
        "double_blocks.0.img_mlp.0.weight",
        "double_blocks.0.txt_mod.lin.weight",
        "single_blocks.0.modulation.lin.weight",
        "single_blocks.0.norm.key_norm.scale",
        "single_blocks.0.linear1.weight",
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight",
        "txt_in.individual_token_refiner.blocks.0.mlp.2.weight",
        "txt_in.c_embedder.in_layer.weight",
        "time_in.out_layer.weight",
        "final_layer.adaLN_modulation.1.weight",
    ):
        assert f"model.diffusion_model.{name}" in tensors
    file = beside(alone, tmp_path, {name: one.contiguous() for name, one in tensors.items()})
    assert HUNYUAN.check(file)
    assert_equal(load(file), model)


def test_a_file_of_another_family_is_named(alone):
    with pytest.raises(ModelError, match=r"is a HunyuanImage 2\.1 model, not FLUX"):
        family("flux").check(alone)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_distilled_model_is_refused(tiny, alone, tmp_path, kind):
    if kind == "file":
        tensors = load_file(alone)
        for layer in ("guidance_in", "time_r_in"):
            for name in [name for name in tensors if name.startswith("time_in.")]:
                tensors[name.replace("time_in", layer)] = tensors[name].clone()
        base = beside(alone, tmp_path, tensors)
    else:
        base = shutil.copytree(tiny, tmp_path / "distilled")
        config = json.loads((base / "transformer" / "config.json").read_text())
        told = {**config, "guidance_embeds": True, "use_meanflow": True}
        made = HunyuanImageTransformer2DModel.from_config(told)
        made.save_pretrained(base / "transformer")
    with pytest.raises(ModelError, match="the distilled model") as raised:
        load(base)
    assert raised.value.code == "model.distilled"
    assert not raised.value.retryable


# --- the published model, without its weights -----------------------------------------------------


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return HunyuanImageTransformer2DModel(text_embed_2_dim=1472)


def lora(model, preset, rank, device="cpu"):
    """A LoRA of whole numbers, whose products are exact."""
    config = LoraConfig(target_modules=hunyuanimage.HunyuanImage.targets(None, preset))
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and check_target_module_exists(config, name):
            rows, columns = module.weight.shape
            for leaf, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                numbers = torch.randint(-8, 8, shape, device=device).float()
                tensors[f"transformer.{name}.lora_{leaf}.weight"] = numbers
    return tensors


def test_the_published_model_is_told_from_its_tensors_and_gets_the_published_layers(published):
    assert sum(one.numel() for one in published.parameters()) == 17_425_795_520
    shapes = {name: tuple(one.shape) for name, one in hunyuanimage.originals(published)}
    told = hunyuanimage.transformer_config(single_file.Part(None, "", shapes, None))
    assert {name: published.config[name] for name in told} == told

    attention = lora(published, "attention", 1, "meta")
    full = lora(published, "full", 1, "meta")
    assert len(attention) == 2 * (20 * 8 + 40 * 3)
    assert len(full) == 2 * (20 * 14 + 40 * 6)
    # sd-scripts (networks/lora_hunyuan_image.py): the linear layers of every MMDoubleStreamBlock,
    # ten, and of every MMSingleStreamBlock, three
    by_rule = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": shape
        for name, shape in shapes.items()
        if name.startswith(("double_blocks.", "single_blocks.")) and len(shape) == 2
    }
    assert len(by_rule) == 20 * 10 + 40 * 3
    exported = hunyuanimage.kohya(full, 1.0)
    assert {name.split(".")[0] for name in exported} == by_rule.keys()
    for name, (rows, columns) in by_rule.items():
        assert exported[f"{name}.lora_up.weight"].shape[0] == rows
        assert exported[f"{name}.lora_down.weight"].shape[1] == columns
    # its converter to ComfyUI's names (networks/convert_hunyuan_image_lora_to_comfy.py)
    renamed = {
        name.replace("mlp_fc1", "mlp_0")
        .replace("mlp_fc2", "mlp_2")
        .replace("mod_linear", "mod_lin")
        .replace("modulation_linear", "modulation_lin")
        for name in by_rule
    }
    comfyui = {name.rsplit(".lora_", 1)[0] for name in hunyuanimage.comfyui(full, 1.0)}
    layers = {name.removesuffix(".alpha") for name in comfyui}
    ours = {name.replace("diffusion_model.", "lora_unet_").replace(".", "_") for name in layers}
    assert ours == renamed


# --- other programs' names ------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["attention", "full"])
def test_the_updates_of_an_original_layer_are_those_of_its_parts(model, preset):
    denoiser = HunyuanImageTransformer2DModel.from_config(model.denoiser.config)
    tensors = lora(denoiser, preset, 2)
    weights = {name: torch.zeros_like(one) for name, one in denoiser.state_dict().items()}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            update = tensors[f"{layer}.lora_B.weight"] @ tensors[name] * (8.0 / 2)
            weights[f"{layer.removeprefix('transformer.')}.weight"] = update
    denoiser.load_state_dict(weights)
    wanted = {name: one for name, one in hunyuanimage.originals(denoiser) if one.any()}
    kohya = hunyuanimage.kohya(tensors, 8.0)
    assert len(kohya) == 3 * len(wanted)
    for name, update in wanted.items():
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        down, up = kohya[f"{layer}.lora_down.weight"], kohya[f"{layer}.lora_up.weight"]
        assert torch.equal(up @ down * (kohya[f"{layer}.alpha"] / len(down)), update)


def test_dora_of_a_part_of_an_original_layer_is_not_written_under_its_name(model):
    tensors = lora(model.denoiser, "attention", 1)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        magnitudes = torch.ones(len(tensors[name]))
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = magnitudes
    assert hunyuanimage.kohya(tensors, 1.0) == {}
    assert hunyuanimage.comfyui(tensors, 1.0) == {}


# --- why we do ourselves what diffusers does for other families -----------------------------------


def test_diffusers_own_gradient_checkpoints_are_still_broken(model):
    told = model.encode_texts(TEXTS[1:2])
    model.denoiser.enable_gradient_checkpointing()
    noisy = torch.randn((1, 16, 2, 2), requires_grad=True)
    try:
        with pytest.raises(TypeError, match="unexpected keyword argument 'attention_mask'"):
            model.predict(noisy, torch.tensor([0.5]), told)
    finally:
        model.denoiser.disable_gradient_checkpointing()


def test_diffusers_still_has_no_loader_of_single_files_nor_of_loras(alone):
    assert not hasattr(HunyuanImagePipeline, "load_lora_weights")
    with pytest.raises(ValueError, match="FromOriginalModelMixin is currently only compatible"):
        HunyuanImageTransformer2DModel.from_single_file(str(alone))
