"""Single files of the families that have a transformer: read to the bit, known by their names."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from PIL import Image
from safetensors.torch import load_file, save_file

from gpu_agent.lora import tiny_base
from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import family, flux, ldm, sd3, single_file
from gpu_agent.lora.families.base import reading
from gpu_agent.recipe import Recipe

MODULES = {"flux": flux, "sd3": sd3}
CPU = torch.device("cpu")
TRANSFORMER = "model.diffusion_model."
#: Prefix in the file, by the component's folder; `text_model.` is transformers 4's.
ENCODERS = {
    "flux": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    },
    "sd3": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
}
VAE = {"flux": "vae.", "sd3": "first_stage_model."}
WIDTH = 64


@pytest.fixture(scope="module", params=MODULES)
def tiny(request, tmp_path_factory):
    """A family's name, its tiny folder, and the tensors of the single file that says the same."""
    name = request.param
    folder = tiny_base.write(tmp_path_factory.mktemp(name) / "tiny", 0, name)
    return name, folder, dict(_tensors(name, folder))


def _tensors(name, folder):
    placing = MODULES[name].placing
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for original, tensor in single_file.originals(weights, placing, WIDTH):
        yield TRANSFORMER + original, tensor.contiguous()
    for key, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        convolution = ".attentions." in key and tensor.ndim == 2
        yield (
            VAE[name] + ldm.vae_name(key, levels=4),
            tensor[:, :, None, None] if convolution else tensor,
        )
    for component, prefix in ENCODERS[name].items():
        for key, tensor in load_file(folder / component / "model.safetensors").items():
            bare = key.removeprefix("text_model.")
            clip = "t5xxl" not in prefix and not bare.startswith("text_projection")
            yield f"{prefix}{'text_model.' if clip else ''}{bare}", tensor


def load(name, base, dtype=torch.float32):
    recipe = Recipe.from_dict({"resolution": 64}, name)
    return family(name).load(base, base.parent, recipe, CPU, dtype)


def parts(model):
    return {"denoiser": model.denoiser, "vae": model.vae, **model.text_encoders}


def assert_equal(ours, theirs):
    assert parts(ours).keys() == parts(theirs).keys()
    for name, part in parts(ours).items():
        there = parts(theirs)[name].state_dict()
        here = part.state_dict()
        assert here.keys() == there.keys()
        assert [key for key in here if not torch.equal(here[key], there[key])] == []


def written(folder, tensors, beside=(), of=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    for component in beside:
        shutil.copytree(of / component, folder / component)
    return folder / "model.safetensors"


def test_a_file_with_everything_is_the_folder_to_the_bit(tiny, tmp_path):
    name, folder, tensors = tiny
    words = "tokenizer_2" if name == "flux" else "tokenizer_3"
    file = written(tmp_path, tensors, [words], folder)
    assert family(name).check(file)
    assert_equal(load(name, file), load(name, folder))


def test_users_of_diffusers_get_the_same_image_from_the_file(tiny, tmp_path):
    name, folder, tensors = tiny
    words = "tokenizer_2" if name == "flux" else "tokenizer_3"
    file = written(tmp_path, tensors, [words], folder)

    def image(base):
        pipeline = family(name).pipeline(base, tmp_path)
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return pipeline("a cat", height=64, width=64, num_inference_steps=2, generator=noise)

    assert image(file).images[0].tobytes() == image(folder).images[0].tobytes()


def test_a_transformer_alone_takes_the_rest_from_the_folders_beside_it(tiny, tmp_path):
    name, folder, tensors = tiny
    bare = {
        key.removeprefix(TRANSFORMER): tensor
        for key, tensor in tensors.items()
        if key.startswith(TRANSFORMER)
    }
    beside = [
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name not in {"transformer", "scheduler"}
    ]
    file = written(tmp_path, bare, beside, folder)
    assert family(name).check(file)
    assert_equal(load(name, file), load(name, folder))


def test_what_is_nowhere_is_named_with_where_to_get_it(tiny, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name, _, tensors = tiny
    encoders = tuple(ENCODERS[name].values())
    file = written(tmp_path, {k: v for k, v in tensors.items() if not k.startswith(encoders)})
    with pytest.raises(ModelError) as raised:
        load(name, file)
    assert raised.value.code == "model.component"
    assert raised.value.retryable
    assert "text_encoder" in str(raised.value)
    assert family(name).repository in str(raised.value)


@torch.no_grad()
def test_a_file_of_eight_bit_floats_is_read_as_the_numbers_they_stand_for(tiny, tmp_path):
    name, folder, tensors = tiny
    eight = {
        key: tensor.to(torch.float8_e4m3fn if tensor.ndim == 2 else torch.bfloat16)
        for key, tensor in tensors.items()
    }
    layer = (
        TRANSFORMER
        + {
            "flux": "double_blocks.0.img_mlp.0.",
            "sd3": "joint_blocks.0.x_block.mlp.fc1.",
        }[name]
    )
    words = "tokenizer_2" if name == "flux" else "tokenizer_3"
    scale = {f"{layer}scale_weight": torch.tensor([0.5])}
    model = load(name, written(tmp_path, {**eight, **scale}, [words], folder))
    got = model.denoiser.transformer_blocks[0].ff.net[0].proj.weight
    assert torch.equal(got, eight[f"{layer}weight"].float() * 0.5)
    moments = model.encode_image(Image.new("RGB", (64, 64)))
    told = model.encode_texts(["a cat"])
    noisy = model.draw_latents(moments[None], torch.zeros(1, 16, 8, 8))
    assert model.predict(noisy, torch.tensor([0.5]), told).isfinite().all()


@pytest.mark.parametrize("spoil", ["quantised", "incomplete"])
def test_a_file_that_nothing_can_be_trained_from_is_refused(tiny, tmp_path, spoil):
    name, _, tensors = tiny
    broken = dict(tensors)
    key = next(key for key in tensors if key.startswith(TRANSFORMER) and "mlp" in key)
    if spoil == "quantised":
        broken[key] = torch.zeros(tensors[key].shape, dtype=torch.uint8)
    else:
        del broken[key]
    with pytest.raises(ModelError) as raised:
        load(name, written(tmp_path, broken))
    assert raised.value.code in {"model.format", "model.incomplete"}


def test_a_file_of_another_family_is_named_before_anything_heavy_starts(tiny, tmp_path):
    name, _, tensors = tiny
    other = {"flux": "sd3", "sd3": "flux"}[name]
    with pytest.raises(ModelError) as raised:
        family(other).check(written(tmp_path, tensors))
    assert raised.value.code == "model.family"
    assert f"is a {family(name).title} model, not {family(other).title}" in str(raised.value)


def test_diffusers_own_converter_reads_our_names_to_the_bit(tiny):
    name, folder, tensors = tiny
    if name == "flux":
        # it knows one width only; a column of each tensor is enough to tell rows apart
        with torch.device("meta"):
            model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        ours = {
            key: torch.arange(tensor.shape[0], dtype=torch.float32) + 1e5 * number
            for number, (key, tensor) in enumerate(model.state_dict().items())
        }
        originals = dict(single_file.originals(ours, flux.placing, model.inner_dim))
        theirs = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(originals)
    else:
        ours = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        originals = {k: v for k, v in tensors.items() if k.startswith(TRANSFORMER)}
        theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(originals)
    assert theirs.keys() == ours.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


# --- the published models, without their weights --------------------------------------------------

SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35 = {**SD3, "qk_norm": "rms_norm"}
#: Configuration beside diffusers' defaults; millions of weights; layers of a LoRA by preset in
#: diffusers' naming, and in sd-scripts', whose rule gives 10 per double block and 3 per single one
#: (diffusers' converter of kohya's FLUX.1 files has the same 304), 10 per joint block, 2 more for a
#: second attention, 3 fewer in the last.
PUBLISHED = {
    "FLUX.1-dev": (FluxTransformer2DModel, {"guidance_embeds": True}, 11901, (266, 494), 304),
    "sd3-medium": (
        SD3Transformer2DModel,
        {**SD3, "pos_embed_max_size": 192},
        2028,
        (191, 333),
        237,
    ),
    "sd3.5-medium": (
        SD3Transformer2DModel,
        {**SD35, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))},
        2243,
        (243, 385),
        263,
    ),
    "sd3.5-large": (
        SD3Transformer2DModel,
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        8057,
        (303, 529),
        377,
    ),
}


@pytest.mark.parametrize("title", PUBLISHED)
def test_published_models_are_told_from_their_tensors_and_get_the_published_layers(title):
    kind, said, millions, layers, theirs = PUBLISHED[title]
    module, model_class = (
        (flux, flux.Flux) if kind is FluxTransformer2DModel else (sd3, sd3.StableDiffusion3)
    )
    with torch.device("meta"):
        model = kind(**said)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions

    originals = dict(single_file.originals(model.state_dict(), module.placing, model.inner_dim))
    shapes = {name: tuple(tensor.shape) for name, tensor in originals.items()}
    told = module.transformer_config(single_file.Part(None, "", shapes, None))
    assert {key: _plain(model.config[key]) for key in told} == {
        key: _plain(value) for key, value in told.items()
    }

    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    found = {}
    for preset in ("attention", "full"):
        config = LoraConfig(target_modules=model_class.targets(None, preset))
        found[preset] = [name for name in linear if check_target_module_exists(config, name)]
    assert tuple(map(len, found.values())) == layers

    lora = {}
    for name in found["full"]:
        rows, columns = model.get_submodule(name).weight.shape
        lora[f"transformer.{name}.lora_A.weight"] = torch.empty((1, columns), device="meta")
        lora[f"transformer.{name}.lora_B.weight"] = torch.empty((rows, 1), device="meta")
    exported = module.kohya(lora, 1.0)
    inside = ("double_blocks.", "single_blocks.", "joint_blocks.")
    by_rule = {
        "lora_unet_" + name.removesuffix(".weight").replace(".", "_"): shape
        for name, shape in shapes.items()
        if name.startswith(inside) and len(shape) == 2
    }
    assert len(by_rule) == theirs
    assert {name.split(".")[0] for name in exported} == by_rule.keys()
    for name, (rows, columns) in by_rule.items():
        assert exported[f"{name}.lora_up.weight"].shape[0] == rows
        assert exported[f"{name}.lora_down.weight"].shape[1] == columns


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), torch.OutOfMemoryError("72 GiB")],
)
def test_what_the_machine_cannot_do_is_not_said_of_the_base(error):
    with pytest.raises(type(error)) as caught, reading(Path("b.safetensors")):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "vae"), OSError("no such file in b"), RuntimeError("shape")],
)
def test_what_a_library_cannot_read_is_the_bases_fault(error):
    with pytest.raises(ModelError, match="cannot be loaded") as caught, reading(Path("b")):
        raise error
    assert (caught.value.code, caught.value.retryable) == ("model.unreadable", False)
