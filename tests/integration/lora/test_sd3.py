"""What is SD3's alone: three text encoders, of which the largest may be missing."""

import json
import shutil

import pytest
import torch
from PIL import ImageChops

from gpu_agent.lora import tiny_base
from gpu_agent.lora.families import family, sd3
from gpu_agent.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_base.write(tmp_path_factory.mktemp("sd3") / "tiny", 0, "sd3")


@pytest.fixture(scope="module")
def without_t5(tiny):
    base = shutil.copytree(tiny, tiny.parent / "without-t5")
    for component in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(base / component)
    index = json.loads((base / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (base / "model_index.json").write_text(json.dumps(index))
    return base


def load(base):
    recipe = Recipe.from_dict({"resolution": 64}, "sd3")
    return family("sd3").load(base, base.parent, recipe, CPU, torch.float32)


def pipeline_of(base):
    pipeline = family("sd3").pipeline(base, base.parent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("which", ["tiny", "without_t5"])
@torch.no_grad()
def test_texts_are_read_as_diffusers_reads_them_with_and_without_t5(which, request):
    base = request.getfixturevalue(which)
    ours = load(base).encode_texts(["a cat on a mat", ""])
    theirs = pipeline_of(base).encode_prompt(
        ["a cat on a mat", ""], None, None, do_classifier_free_guidance=False
    )
    assert torch.allclose(ours["text"], theirs[0], atol=1e-5)
    assert torch.allclose(ours["pooled"], theirs[2], atol=1e-5)
    assert (ours["text"][:, 77:] == 0).all() == (which == "without_t5")


@torch.no_grad()
def test_a_sample_image_is_the_one_that_diffusers_paints(tiny):
    model = load(tiny)
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(0))
    told, untold = model.encode_texts(["a cat"]), model.encode_texts([""])

    def predict(noisy, levels):
        plain = model.predict(noisy, levels, untold)
        return plain + model.sample_guidance * (model.predict(noisy, levels, told) - plain)

    latents = model.objective.sample(predict, noise, 3, model.sample_shift, lambda done: None)
    theirs = pipeline_of(tiny)(
        "a cat",
        height=64,
        width=64,
        num_inference_steps=3,
        # ours are evenly spread before the shift; SD3's default ends a thousandth earlier
        sigmas=[1.0, 2 / 3, 1 / 3],
        latents=noise,
    )
    # rounding may put a pixel one level higher or lower
    far = ImageChops.difference(model.decode(latents), theirs.images[0]).getextrema()
    assert max(most for _, most in far) <= 1


def test_the_last_blocks_scale_and_shift_change_places_in_kohyas_file():
    layer = "transformer.transformer_blocks.1.norm1_context.linear"
    down = torch.randn(2, 64)
    for rows, turned in ((6 * 64, False), (2 * 64, True)):
        up = torch.randn(rows, 2)
        tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        said = sd3.kohya(tensors, 2.0)
        theirs = said["lora_unet_joint_blocks_1_context_block_adaLN_modulation_1.lora_up.weight"]
        assert torch.equal(theirs, torch.cat(up.chunk(2)[::-1]) if turned else up)


def test_diffusers_still_takes_nothing_from_kohyas_file_of_this_family(tiny):
    layer = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 64)}
    tensors[f"{layer}.lora_B.weight"] = torch.ones(64, 2)
    pipeline = pipeline_of(tiny)
    pipeline.load_lora_weights(dict(tensors))
    assert pipeline.get_list_adapters() == {"transformer": ["default_0"]}
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(sd3.kohya(tensors, 2.0))
    assert pipeline.get_list_adapters() == {}
