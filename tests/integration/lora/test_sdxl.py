"""What is SDXL's and SD 2.x's alone: their files, text encoders, framing, velocity."""

import json
import shutil
from functools import cache

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gpu_agent.lora import check, images, tiny_base
from gpu_agent.lora.adapter import Adapter
from gpu_agent.lora.errors import ModelError
from gpu_agent.lora.families import family, ldm, naming, sdxl
from gpu_agent.lora.families.sd import FULL
from gpu_agent.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Both forms of a family's tiny base, each written once."""
    folder = tmp_path_factory.mktemp("tiny")
    written = {}

    def of(name, form="file"):
        out = folder / (f"{name}.safetensors" if form == "file" else name)
        if out not in written:
            written[out] = tiny_base.write(out, 0, name)
        return out

    return of


def load(base, name, **recipe):
    said = Recipe.from_dict({"resolution": 64, **recipe}, name)
    return family(name).load(base, base.parent, said, CPU, torch.float32)


@pytest.fixture(scope="module")
def loaded(tiny):
    """A tiny base as a model that nobody changes."""
    return cache(lambda name, form="file": load(tiny(name, form), name))


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_a_single_file_holds_bit_for_bit_what_the_folder_holds(loaded, name):
    file, folder = loaded(name), loaded(name, "folder")
    assert file.text_encoders.keys() == folder.text_encoders.keys()
    for one, two in (
        (file.denoiser, folder.denoiser),
        (file.vae, folder.vae),
        *zip(file.text_encoders.values(), folder.text_encoders.values(), strict=True),
    ):
        ours, theirs = one.state_dict(), two.state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key


def test_a_folder_of_half_precision_files_alone_is_read(tiny, loaded, tmp_path):
    base = shutil.copytree(tiny("sdxl", "folder"), tmp_path / "copy")
    for file in base.rglob("*.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    assert family("sdxl").check(base)
    assert family("sdxl").pipeline(base, tmp_path)
    model, whole = load(base, "sdxl"), loaded("sdxl").denoiser.state_dict()
    for name, tensor in model.denoiser.state_dict().items():
        assert torch.equal(tensor, whole[name].half().float()), name


@torch.no_grad()
def test_texts_are_read_as_diffusers_reads_them(tiny, loaded):
    base = tiny("sdxl", "folder")
    ours = loaded("sdxl", "folder").encode_texts(["a cat on a mat", "!"])
    pipeline = family("sdxl").pipeline(base, base.parent)
    theirs = pipeline.encode_prompt(["a cat on a mat", "!"], do_classifier_free_guidance=False)
    assert torch.allclose(ours["text"], theirs[0], atol=1e-5)
    assert torch.allclose(ours["pooled"], theirs[2], atol=1e-5)


def test_the_second_tokenizer_fills_up_with_openclips_zero(loaded):
    model = loaded("sdxl")
    first, second = (model.words(name, ["a"])[0].tolist() for name in model.text_encoders)
    assert first[:3] == second[:3]
    assert set(first[3:]) == {513}
    assert set(second[3:]) == {0}


@pytest.mark.parametrize(("size", "bucket"), [((300, 200), (64, 64)), ((90, 310), (64, 96))])
def test_the_framing_says_where_the_picture_was_cut(tmp_path, size, bucket):
    across = Image.linear_gradient("L").rotate(90).resize(size)  # from 0 left to 255 right
    down = Image.linear_gradient("L").resize(size)
    Image.merge("RGB", (across, down, down)).save(tmp_path / "ramp.png")
    cut = images.rgb(tmp_path / "ramp.png", bucket)
    told = sdxl.StableDiffusionXL.framing(None, size, bucket)["framing"].tolist()
    height, width, top, left, *now = told
    assert (width, height) == size
    assert now == [bucket[1], bucket[0]]
    scale = max(bucket[0] / width, bucket[1] / height)
    corner = cut.getpixel((0, 0))
    assert corner[0] / 255 * width * scale == pytest.approx(left, abs=2)
    assert corner[1] / 255 * height * scale == pytest.approx(top, abs=2)
    assert max(top, left) > 10


def test_a_lora_of_unet_and_both_encoders_is_the_same_in_kohyas_names(tiny, tmp_path):
    """The image drawn with either file is the same, and every layer of either changes it."""
    from gpu_agent.lora import export

    base = tiny("sdxl")
    said = {"resolution": 64, "rank": 2, "alpha": 4.0, "targets": "full", "text_encoder_rate": 1e-4}
    recipe = Recipe.from_dict(said, "sdxl")
    adapter = Adapter(load(base, "sdxl"), recipe)
    place = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.1 * torch.randn(tensor.shape, generator=place)
        for name, tensor in adapter.tensors().items()
    }
    export.write(
        tmp_path,
        tensors,
        family=family("sdxl"),
        recipe=recipe,
        configs=adapter.configs,
        pictures=[],
        steps=1,
    )
    twin = tmp_path / naming.KOHYA
    proof = check.prove(tmp_path / export.DIFFUSERS, base, twin, family="sdxl")
    assert proof.holds, proof
    assert proof.changed > 1
    names = {name.split(".")[0] for name in load_file(twin)}
    assert {name.split("_text_model")[0] for name in names if "_te" in name} == {
        "lora_te1",
        "lora_te2",
    }


def published_names():
    """sd-scripts' rule, spelt out: each layer of the Transformer2DModels of SDXL's UNet."""
    depths = {f"input_blocks_{n}_1": 2 for n in (4, 5)} | {
        f"input_blocks_{n}_1": 10 for n in (7, 8)
    }
    depths |= {"middle_block_1": 10}
    depths |= {f"output_blocks_{n}_1": 10 for n in (0, 1, 2)}
    depths |= {f"output_blocks_{n}_1": 2 for n in (3, 4, 5)}
    inside = [f"attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")]
    for place, depth in depths.items():
        yield from (f"lora_unet_{place}_{end}" for end in ("proj_in", "proj_out"))
        for number in range(depth):
            for layer in (*inside, "ff_net_0_proj", "ff_net_2"):
                yield f"lora_unet_{place}_transformer_blocks_{number}_{layer}"


#: Parameters of the published UNets in millions; layers that diffusers' scripts train (to_q, to_k,
#: to_v, to_out.0) and that sd-scripts trains (`UNET_TARGET_REPLACE_MODULE` of its networks/lora.py,
#: which prints "create LoRA for U-Net: 192 modules" or 722).
PUBLISHED = {"sd1": (860, 128, 192), "sd2": (866, 128, 192), "sdxl": (2567, 560, 722)}


@pytest.fixture(scope="module")
def real():
    """The modules of a family's real UNet and the shapes in its real file, without weights."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def of(layout):
        with init_empty_weights():
            unet = UNet2DConditionModel.from_config(layout.template("unet/config.json"))
            vae = AutoencoderKL.from_config(layout.template("vae/config.json"))
        attends = tuple("CrossAttn" in kind for kind in unet.config["up_block_types"])
        shapes = {
            ldm.UNET + ldm.unet_name(name, layers=2, attends=attends): tuple(tensor.shape)
            for name, tensor in unet.state_dict().items()
        }
        for name, tensor in vae.state_dict().items():
            shapes[ldm.VAE + ldm.vae_name(name, levels=4)] = tuple(tensor.shape)
        return unet, shapes

    return of


def open_clip_shapes(encoder, config):
    """Of the file of an OpenCLIP text encoder, which has layers that SD 2.x does without."""
    width, inside = config["hidden_size"], config["intermediate_size"]
    yield f"{encoder.prefix}token_embedding.weight", (config["vocab_size"], width)
    yield f"{encoder.prefix}positional_embedding", (config["max_position_embeddings"], width)
    yield f"{encoder.prefix}text_projection", (width, width)
    for layer in range(config["num_hidden_layers"] + encoder.unused):
        yield f"{encoder.prefix}transformer.resblocks.{layer}.mlp.c_fc.weight", (inside, width)


def clip_shapes(encoder, config):
    width, inside = config["hidden_size"], config["intermediate_size"]
    prefix = f"{encoder.prefix}text_model."
    yield f"{prefix}embeddings.token_embedding.weight", (config["vocab_size"], width)
    positions = (config["max_position_embeddings"], width)
    yield f"{prefix}embeddings.position_embedding.weight", positions
    for layer in range(config["num_hidden_layers"]):
        yield f"{prefix}encoder.layers.{layer}.mlp.fc1.weight", (inside, width)


@pytest.mark.parametrize("layout", ldm.LAYOUTS.values(), ids=lambda layout: layout.name)
def test_the_real_model_is_recognised_counted_and_adapted_as_published(layout, real):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    unet, shapes = real(layout)
    for encoder in layout.encoders:
        config = layout.template(f"{encoder.component}/config.json")
        shapes |= dict((open_clip_shapes if encoder.open_clip else clip_shapes)(encoder, config))
    found = ldm.configs(ldm.Header(shapes, {}))
    for component, config in found.items():
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        assert config == layout.template(f"{component}/{file}"), component

    millions, attention, full = PUBLISHED[layout.name]
    assert round(sum(tensor.numel() for tensor in unet.parameters()) / 1e6) == millions
    names = [name for name, _ in unet.named_modules()]
    chosen = {}
    for preset, targets in (
        ("attention", sdxl.UNetModel.targets(None, "attention")),
        ("full", FULL),
    ):
        config = LoraConfig(target_modules=targets)
        chosen[preset] = [name for name in names if check_target_module_exists(config, name)]
    assert (len(chosen["attention"]), len(chosen["full"])) == (attention, full)
    if layout is ldm.SDXL:
        tensors = {f"unet.{name}.lora_A.weight": torch.zeros(1, 1) for name in chosen["full"]}
        ours = {name.split(".")[0] for name in sdxl.kohya(tensors, 1.0)}
        assert ours == set(published_names())


@pytest.mark.parametrize(("one", "other"), [("sd1", "sd2"), ("sd2", "sd1"), ("sdxl", "sd2")])
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_base_of_the_other_family_is_named(tiny, one, other, form):
    titles = {"sd1": r"1\.x", "sd2": r"2\.x", "sdxl": "SDXL"}
    base = tiny(one, form)
    assert family(one).check(base)
    with pytest.raises(ModelError, match=f"{titles[one]} model, not .*{titles[other]}") as caught:
        family(other).check(base)
    assert caught.value.code == "model.family"


def targets_of(model):
    """What the model must say at little noise: the noise, or nearly the image's opposite."""
    latents, noise = torch.full((1, 4, 1, 1), 2.0), torch.full((1, 4, 1, 1), 5.0)
    return float(model.objective.target(latents, noise, torch.tensor([0.0005])).mean())


@pytest.mark.parametrize("form", ["file", "folder"])
def test_what_an_sd2_model_predicts_is_what_it_says_unless_the_recipe_says_otherwise(
    tiny, loaded, form
):
    assert targets_of(loaded("sd2", form)) != 5.0
    assert targets_of(load(tiny("sd2", form), "sd2", prediction="epsilon")) == 5.0


def test_an_sd2_file_that_says_nothing_is_told_by_its_weights(tiny, tmp_path):
    tensors = load_file(tiny("sd2"))
    silent = tmp_path / "silent.safetensors"
    save_file(tensors, silent)
    assert targets_of(load(silent, "sd2")) == 5.0
    name = f"{ldm.UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors[name] = torch.randn(tensors[name].shape)
    save_file(tensors, silent)
    assert targets_of(load(silent, "sd2")) != 5.0


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_folders_have_the_names_that_transformers_4_reads(tiny, name):
    """transformers 5 would write others, which transformers 4 fills with random weights."""
    base = tiny(name, "folder")
    for encoder in ldm.LAYOUTS[name].encoders:
        names = load_file(base / encoder.component / "model.safetensors")
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
        words = json.loads(
            (
                base / encoder.component.replace("text_encoder", "tokenizer") / "vocab.json"
            ).read_text()
        )
        assert words["a</w>"] == 320
