"""What is Lumina Image 2.0's alone: time that runs backwards, grouped heads, ComfyUI's files."""

import shutil

import pytest
import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.loaders import single_file_utils
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from gpu_agent.lora import tiny_base
from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import family, lumina2, single_file
from gpu_agent.recipe import Recipe

CPU = torch.device("cpu")
LUMINA = family("lumina2")
TRANSFORMER = "model.diffusion_model."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_base.write(tmp_path_factory.mktemp("lumina2") / "tiny", 0, "lumina2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same model as ComfyUI has it: one file, and a tokenizer beside it."""
    out = tmp_path_factory.mktemp("lumina2-file") / "tiny.safetensors"
    return tiny_base.write(out, 0, "lumina2")


def load(base):
    return LUMINA.load(base, base.parent, Recipe.from_dict({}, "lumina2"), CPU, torch.float32)


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny)


@pytest.fixture(scope="module")
def pipeline(tiny):
    pipeline = LUMINA.pipeline(tiny, tiny.parent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_texts_are_read_as_diffusers_reads_them(model, pipeline):
    told = model.encode_texts(["a cat", ""])
    text, mask, no_text, no_mask = pipeline.encode_prompt(["a cat"])
    assert torch.equal(told["text"], torch.cat([text, no_text]))
    assert torch.equal(told["mask"], torch.cat([mask, no_mask]))


@torch.no_grad()
def test_a_sample_image_is_the_one_that_diffusers_paints(model, pipeline):
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(0))
    told = model.encode_texts(["a cat"])
    latents = model.objective.sample(
        lambda noisy, levels: model.predict(noisy, levels, told),
        noise,
        3,
        model.sample_shift,
        lambda done: None,
    )
    theirs = pipeline(
        "a cat",
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=1.0,
        latents=noise,
        output_type="latent",
    ).images
    assert torch.allclose(latents, theirs, atol=1e-4)


# --- single files -------------------------------------------------------------------------------


def parts(model):
    return {"denoiser": model.denoiser, "vae": model.vae, **model.text_encoders}


def assert_equal(ours, theirs):
    for name, part in parts(ours).items():
        here, there = part.state_dict(), parts(theirs)[name].state_dict()
        assert here.keys() == there.keys()
        assert [key for key in here if not torch.equal(here[key], there[key])] == []


def test_a_file_with_everything_is_the_folder_to_the_bit(whole, model):
    assert LUMINA.check(whole)
    assert_equal(load(whole), model)


def test_a_transformer_alone_takes_the_rest_from_the_folders_beside_it(
    whole, tiny, model, tmp_path
):
    bare = {
        name.removeprefix(TRANSFORMER): tensor
        for name, tensor in load_file(whole).items()
        if name.startswith(TRANSFORMER)
    }
    # the authors' own file has this one, which their model does not use
    bare["norm_final.weight"] = torch.ones(48)
    for component in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(tiny / component, tmp_path / component)
    file = tmp_path / "lumina.safetensors"
    save_file(bare, file)
    assert LUMINA.check(file)
    assert_equal(load(file), model)


def test_what_is_nowhere_is_named_with_where_to_get_it(whole, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = shutil.copy(whole, tmp_path / "lumina.safetensors")
    with pytest.raises(ModelError, match="lacks a usable tokenizer") as raised:
        load(file)
    assert raised.value.code == "model.component"
    assert LUMINA.repository in str(raised.value)


def test_a_transformer_of_the_same_ancestry_is_told_apart(whole, tmp_path):
    # Z-Image's has one layer where Lumina's has an activation and a layer
    tensors = {
        name.replace("layers.0.adaLN_modulation.1.", "layers.0.adaLN_modulation.0."): tensor
        for name, tensor in load_file(whole).items()
    }
    save_file(tensors, tmp_path / "z.safetensors")
    with pytest.raises(ModelError, match="no model that is known here"):
        LUMINA.check(tmp_path / "z.safetensors")
    with pytest.raises(ModelError, match=r"is a Lumina Image 2\.0 model, not FLUX"):
        family("flux").check(whole)


# --- the published model, without its weights -----------------------------------------------------


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return Lumina2Transformer2DModel(cap_feat_dim=2304)


def targeted(model, preset):
    config = LoraConfig(target_modules=lumina2.Lumina2.targets(None, preset))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and check_target_module_exists(config, name)
    ]


def lora(model, preset, rank):
    """A LoRA of whole numbers, whose products are exact."""
    drawn = torch.Generator().manual_seed(0)
    tensors = {}
    for name in targeted(model, preset):
        rows, columns = model.get_submodule(name).weight.shape
        for leaf, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            numbers = torch.randint(-8, 8, shape, generator=drawn).float()
            tensors[f"transformer.{name}.lora_{leaf}.weight"] = numbers
    return tensors


def test_the_published_model_is_told_from_its_tensors_and_gets_the_published_layers(published):
    assert sum(one.numel() for one in published.parameters()) == 2_609_769_152
    shapes = {name: tuple(one.shape) for name, one in lumina2.originals(published)}
    told = lumina2.transformer_config(single_file.Part(None, "", shapes, None))
    assert {name: published.config[name] for name in told} == told

    assert len(targeted(published, "attention")) == 4 * 30
    full = lora(published, "full", 1)
    assert len(full) == 2 * 240
    # sd-scripts (networks/lora_lumina.py): the linear layers of every JointTransformerBlock, six
    # or, without modulation, five, and the two of the FinalLayer
    blocks = ("layers.", "noise_refiner.", "context_refiner.", "final_layer.")
    by_rule = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": shape
        for name, shape in shapes.items()
        if name.startswith(blocks) and len(shape) == 2
    }
    assert len(by_rule) == (26 + 2) * 6 + 2 * 5 + 2
    exported = lumina2.kohya(full, 1.0)
    assert {name.split(".")[0] for name in exported} == by_rule.keys()
    for name, (rows, columns) in by_rule.items():
        assert exported[f"{name}.lora_up.weight"].shape[0] == rows
        assert exported[f"{name}.lora_down.weight"].shape[1] == columns


# --- other programs' names ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short():
    """As wide as the published model, the one width that diffusers' converters know."""
    with torch.device("meta"):
        return Lumina2Transformer2DModel(cap_feat_dim=2304, num_layers=1)


def test_diffusers_own_converter_reads_our_names_to_the_bit(short):
    # a column of each tensor is enough to tell rows apart
    ours = {
        name: torch.arange(tensor.shape[0], dtype=torch.float32) + 1e5 * number
        for number, (name, tensor) in enumerate(short.state_dict().items())
    }
    originals = dict(single_file.originals(ours, lumina2.placing(3), 768))
    theirs = single_file_utils.convert_lumina2_to_diffusers(originals)
    assert theirs.keys() == ours.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def _update(tensors, layer):
    # some columns stand for all
    return tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"][:, ::97]


def test_diffusers_reads_comfyuis_names_back_to_the_same_update_of_each_layer(short):
    tensors = lora(short, "full", 2)
    comfyui = lumina2.comfyui(tensors, 8.0)
    assert "diffusion_model.layers.0.attention.qkv.lora_A.weight" in comfyui
    blocks = {name: one for name, one in comfyui.items() if "final_layer" not in name}
    read = Lumina2Pipeline.lora_state_dict(blocks)
    layers = {name.rsplit(".", 2)[0] for name in tensors if "norm_out" not in name}
    assert {name.rsplit(".", 2)[0] for name in read} == layers
    for layer in layers:
        assert torch.equal(_update(read, layer), _update(tensors, layer) * (8.0 / 2)), layer


def test_kohyas_names_say_the_same_as_comfyuis(short):
    tensors = lora(short, "attention", 2)
    kohya, comfyui = lumina2.kohya(tensors, 8.0), lumina2.comfyui(tensors, 8.0)
    layers = {name.split(".lora_A")[0] for name in comfyui if "lora_A" in name}
    # of the five blocks: qkv and out
    assert len(layers) == 5 * 2
    for layer in layers:
        theirs = "lora_unet_" + layer.removeprefix("diffusion_model.").replace(".", "_")
        down, up = kohya[f"{theirs}.lora_down.weight"], kohya[f"{theirs}.lora_up.weight"]
        update = up @ down[:, ::97] * (kohya[f"{theirs}.alpha"] / len(down))
        assert torch.equal(update, _update(comfyui, layer)), layer


def test_doras_magnitudes_lie_below_each_other_like_the_rows(short):
    tensors = lora(short, "attention", 1)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        magnitudes = torch.arange(len(tensors[name]), dtype=torch.float32)
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = magnitudes
    kohya = lumina2.kohya(tensors, 1.0)
    rows = [torch.arange(count) for count in (2304, 768, 768)]
    scales = kohya["lora_unet_layers_0_attention_qkv.dora_scale"]
    assert torch.equal(scales[:, 0], torch.cat(rows).float())


# --- why we read and write the original names ourselves -------------------------------------------


def from_single_file(tensors, config):
    return Lumina2Transformer2DModel.from_single_file(
        tensors, config=str(config), subfolder="transformer", local_files_only=True
    )


def test_diffusers_still_reads_single_files_of_one_width_only(model, tiny):
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        from_single_file(dict(lumina2.originals(model.denoiser)), tiny)


def test_diffusers_still_reads_no_file_with_comfyuis_prefix(whole, tiny):
    with pytest.raises(KeyError, match="cap_embedder"):
        from_single_file(load_file(whole), tiny)


def test_diffusers_still_reads_comfyuis_names_of_all_layers_of_blocks_only(short):
    everything = lumina2.comfyui(lora(short, "full", 1), 1.0)
    with pytest.raises(ValueError, match="final_layer"):
        Lumina2Pipeline.lora_state_dict(everything)
    attention = lumina2.comfyui(lora(short, "attention", 1), 1.0)
    with pytest.raises(KeyError, match="feed_forward"):
        Lumina2Pipeline.lora_state_dict(attention)
