"""Every kind of adapter: what is exported does in its readers what it did in the training."""

import copy
import functools
import json

import pytest

from gpu_agent.recipe import Recipe

KINDS = ("lora", "dora", "lokr", "oft")


@pytest.fixture(scope="module")
def bases(tmp_path_factory, base):
    """A tiny base by its family's name."""
    from gpu_agent.lora import tiny_base

    folder = tmp_path_factory.mktemp("bases")
    sdxl = tiny_base.write(folder / "sdxl.safetensors", 0, "sdxl")
    return {"sd1": base, "sdxl": sdxl}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def pipeline_of(bases, work):
    """The base as users of diffusers load it; who changes it takes it back."""
    from gpu_agent.lora.families import family

    return functools.cache(
        lambda name: family(name).pipeline(bases[name], work / f"pipeline-{name}")
    )


@pytest.fixture(scope="module")
def adapted(bases, work):
    """A model with an adapter that has weights as if it were trained, and its files."""
    import torch

    from gpu_agent.lora import export
    from gpu_agent.lora.adapter import Adapter
    from gpu_agent.lora.families import family
    from gpu_agent.lora.inversion import Inversion

    @functools.cache
    def make(name, **said):
        recipe = Recipe.from_dict({"rank": 4, "trigger": "sks", "resolution": 64, **said}, name)
        row = family(name)
        model = row.load(bases[name], work / name, recipe, torch.device("cpu"), torch.float32)
        if recipe.adapter == "embedding":
            adapter = Inversion(model, recipe, ["a photo of sks"])
        else:
            adapter = Adapter(model, recipe)
        place = torch.Generator().manual_seed(1)
        adapter.fill(
            {
                key: value + 0.1 * torch.randn(value.shape, generator=place)
                for key, value in adapter.tensors().items()
            }
        )
        folder = work / f"{name}-{len(list(work.iterdir()))}"
        folder.mkdir()
        export.write(
            folder,
            adapter.tensors(),
            family=row,
            recipe=recipe,
            configs=adapter.configs,
            pictures=[],
            steps=1,
        )
        return model, adapter, folder

    return make


@pytest.fixture(scope="module")
def said_of():
    """What a UNet of the tiny SD 1.x base says of always the same noise."""
    import torch

    place = torch.Generator().manual_seed(2)
    noisy, text = torch.randn(1, 4, 8, 8, generator=place), torch.randn(1, 77, 64, generator=place)

    def predict(unet):
        with torch.no_grad():
            return unet(noisy, torch.tensor([500]), text).sample

    return predict


@pytest.mark.parametrize("kind", KINDS)
def test_its_reader_makes_of_an_adapter_what_was_trained(adapted, pipeline_of, said_of, kind):
    # alpha is not the rank
    model, _, folder = adapted("sd1", adapter=kind, alpha=2.0, targets="full")
    pipeline = pipeline_of("sd1")
    plain = said_of(pipeline.unet)
    if kind == "oft":
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(pipeline.unet, folder / "oft")
        said = said_of(loaded)
        loaded.unload()
    elif kind == "lokr":
        pipeline.unet.load_lora_adapter(folder, weight_name="lora.safetensors", prefix="unet")
        said = said_of(pipeline.unet)
        pipeline.unet.unload_lora()
    else:
        pipeline.load_lora_weights(folder, weight_name="lora.safetensors")
        said = said_of(pipeline.unet)
        pipeline.unload_lora_weights()
    trained = said_of(model.denoiser)
    assert (said - trained).abs().max() < 1e-4
    assert (trained - plain).abs().mean() > 0.01
    assert (said_of(pipeline.unet) - plain).abs().max() == 0


def test_kohyas_naming_says_the_same_of_a_dora(adapted, pipeline_of, said_of):
    """By the formula of ComfyUI's `weight_decompose`, with the magnitudes along the outputs."""
    from safetensors.torch import load_file

    model, _, folder = adapted("sd1", adapter="dora", alpha=2.0, targets="full")
    tensors = load_file(folder / "lora_kohya.safetensors")

    def new(weight, leaves):
        down, up = leaves["lora_down.weight"], leaves["lora_up.weight"]
        update = (up.flatten(1) @ down.flatten(1)).view_as(weight)
        weight = weight + update * leaves["alpha"] / len(down)
        lengths = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
        return weight * leaves["dora_scale"] / lengths

    unet = patched(copy.deepcopy(pipeline_of("sd1").unet), tensors, new)
    assert (said_of(unet) - said_of(model.denoiser)).abs().max() < 1e-4


@pytest.mark.parametrize("rank", [4, 64])
def test_lycoris_naming_says_the_same_of_a_lokr(adapted, pipeline_of, said_of, rank):
    """By the formula of ComfyUI's `LoKrAdapter`; at rank 64 all factors are whole."""
    import torch
    from safetensors.torch import load_file

    model, _, folder = adapted("sd1", adapter="lokr", rank=rank, alpha=2.0, targets="full")
    tensors = load_file(folder / "lora_lycoris.safetensors")

    def factor(leaves, name):
        if name in leaves:
            return leaves[name], None
        return leaves[f"{name}_a"] @ leaves[f"{name}_b"], len(leaves[f"{name}_b"])

    def new(weight, leaves):
        (one, by), (two, rank) = factor(leaves, "lokr_w1"), factor(leaves, "lokr_w2")
        rank = rank or by
        scale = leaves["alpha"] / rank if rank else 1.0
        one = one[..., None, None] if two.ndim == 4 else one
        return weight + torch.kron(one, two).view_as(weight) * scale

    unet = patched(copy.deepcopy(pipeline_of("sd1").unet), tensors, new)
    assert (said_of(unet) - said_of(model.denoiser)).abs().max() < 1e-4


def patched(unet, tensors, new):
    """Give each layer that a file names the weight that its reader would."""
    layers = {}
    for name, tensor in tensors.items():
        layer, leaf = name.split(".", 1)
        layers.setdefault(layer, {})[leaf] = tensor
    for name, module in unet.named_modules():
        leaves = layers.pop(f"lora_unet_{name.replace('.', '_')}", None)
        if leaves:
            module.weight.data = new(module.weight.data, leaves)
    assert not layers
    return unet


@pytest.mark.parametrize("naming", ["lora.safetensors", "lora_kohya.safetensors"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_loads_the_text_encoders_too(adapted, pipeline_of, family, naming):
    import torch

    _, adapter, folder = adapted(family, text_encoder_rate=1e-4, alpha=2.0)
    pipeline = pipeline_of(family)
    plain = encoded(pipeline, family)
    pipeline.load_lora_weights(folder, weight_name=naming)
    with torch.no_grad():
        trained = adapter.encode(["a photo of sks"])
    for name, tensor in encoded(pipeline, family).items():
        assert (tensor - trained[name]).abs().max() < 1e-4
        assert (tensor - plain[name]).abs().max() > 1e-3
    pipeline.unload_lora_weights()


def encoded(pipeline, family):
    """What a pipeline tells its denoiser of a prompt."""
    text, _, *pooled = pipeline.encode_prompt(
        "a photo of sks",
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return {"text": text, **({"pooled": pooled[0]} if family == "sdxl" else {})}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_loads_a_taught_word(adapted, pipeline_of, family):
    import torch
    from safetensors.torch import load_file

    _, adapter, folder = adapted(family, adapter="embedding", rank=3)
    tensors = load_file(folder / "embedding.safetensors")
    pipeline = pipeline_of(family)
    plain = encoded(pipeline, family)
    if family == "sd1":
        pipeline.load_textual_inversion(
            folder, weight_name="embedding.safetensors", token="sks", local_files_only=True
        )
    else:
        for name, number in (("clip_l", ""), ("clip_g", "_2")):
            pipeline.load_textual_inversion(
                tensors[name],
                token="sks",
                text_encoder=getattr(pipeline, f"text_encoder{number}"),
                tokenizer=getattr(pipeline, f"tokenizer{number}"),
            )
    assert all(tensor.shape[0] == 3 for tensor in tensors.values())
    with torch.no_grad():
        trained = adapter.encode(["a photo of sks"])
    for name, tensor in encoded(pipeline, family).items():
        assert (tensor - trained[name]).abs().max() < 1e-4
        assert (tensor - plain[name]).abs().max() > 1e-3


def test_a_taught_word_begins_as_what_it_meant_and_stays_as_loud_as_others(adapted):
    model, adapter, _ = adapted("sd1", adapter="embedding", rank=4)
    words = model.text_encoders["text_encoder"].get_input_embeddings().weight
    adapter.fill({name: 100 * tensor for name, tensor in adapter.tensors().items()})
    adapter.settle()
    (vectors,) = adapter.parameters
    assert vectors.norm(dim=1).tolist() == pytest.approx([float(words.norm(dim=1).max())] * 4)


def test_only_the_word_is_taught_and_it_learns(adapted):
    import torch

    model, adapter, _ = adapted("sd1", adapter="embedding", rank=4)
    place = torch.Generator().manual_seed(3)
    latents, noise = torch.randn((2, 4, 4, 8, 8), generator=place)
    levels = torch.linspace(0.1, 0.9, 4)
    optimizer = torch.optim.AdamW(adapter.parameters, lr=0.02)
    losses = []
    for _ in range(12):
        loss = model.losses(latents, noise, levels, adapter.encode(["a sks"] * 4)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.settle()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-4
    parts = (model.denoiser, model.vae, model.text_encoders["text_encoder"])
    learning = [one for part in parts for one in part.parameters() if one.requires_grad]
    assert [one.shape for one in learning] == [(4, 64)]


def test_a_word_that_no_caption_has_cannot_be_taught(adapted):
    from gpu_agent.lora.errors import DatasetError
    from gpu_agent.lora.inversion import Inversion

    model, _, _ = adapted("sd1", adapter="embedding", rank=4)
    recipe = Recipe.from_dict({"adapter": "embedding", "trigger": "sks"})
    with pytest.raises(DatasetError, match="sks") as caught:
        Inversion(model, recipe, ["a photo", "sksk"])
    assert caught.value.code == "dataset.caption"


def test_what_is_trained_is_in_single_precision_on_a_base_in_half(bases, work):
    import torch

    from gpu_agent.lora.adapter import Adapter
    from gpu_agent.lora.families import family

    recipe = Recipe.from_dict({"adapter": "dora", "rank": 4, "text_encoder_rate": 1e-4})
    device, half = torch.device("cpu"), torch.bfloat16
    model = family("sd1").load(bases["sd1"], work / "sd1", recipe, device, half)
    adapter = Adapter(model, recipe)
    assert model.denoiser.conv_in.weight.dtype == half
    assert {one.dtype for one in adapter.parameters} == {torch.float32}


def test_the_files_say_what_web_pages_show_of_them(adapted):
    from safetensors import safe_open

    _, _, folder = adapted("sd1", text_encoder_rate=1e-4, alpha=2.0)
    with safe_open(folder / "lora_kohya.safetensors", "pt") as file:
        said = file.metadata()
    assert said["ss_network_dim"] == "4"
    assert said["ss_network_alpha"] == "2.0"
    assert said["ss_noise_offset"] == "None"
    assert said["ss_v2"] == "False"
    assert said["ss_text_encoder_lr"] == "0.0001"
    assert json.loads(said["ss_dataset_dirs"]) == {"sks": {"n_repeats": 1, "img_count": 0}}
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.hash_sha256"] == "0x" + said["sshs_model_hash"]


# --- in a whole training ----------------------------------------------------------------------

TEXTS = {
    "steps": 2,
    "validation_every": 1,
    "learning_rate": 0.01,
    "text_encoder_rate": 0.01,
    "lora_plus": 2.0,
    "ema_decay": 0.9,
    "caption_dropout": 0.3,
}
WORD = {
    "steps": 2,
    "validation_every": 1,
    "adapter": "embedding",
    "learning_rate": 0.1,
    "optimizer": "schedule_free",
}


@pytest.mark.parametrize(
    ("recipe", "file"),
    [
        (TEXTS, "lora.safetensors"),
        pytest.param(WORD, "embedding.safetensors", marks=pytest.mark.slow),
    ],
)
def test_trained_texts_go_on_bit_for_bit(workshop, recipe, file):
    _, done = workshop.train(workshop.job("whole", **recipe))
    assert done
    stopped = workshop.stopped_at(1, workshop.job("first", **recipe))
    again, done = workshop.train(
        workshop.job("again", resume_dir=stopped.all("checkpoint")[-1]["path"], **recipe)
    )
    assert done
    assert again.one("started")["step"] == 1
    out = [workshop.folder / name / "out" / file for name in ("whole", "again")]
    assert out[0].read_bytes() == out[1].read_bytes()
