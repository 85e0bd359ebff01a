"""Links as people paste them from their browser, and what they lead to."""

from __future__ import annotations

import pytest

from infra.model_links import Version, family_on_civitai, family_on_hub, understood, words

HUB = "hf:stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize(
    ("link", "means"),
    [
        ("civitai:128713", Version(version="128713")),
        ("https://civitai.com/models/4384/dreamshaper", Version(model="4384")),
        ("https://civitai.com/models/4384?modelVersionId=128713",
         Version(model="4384", version="128713")),
        ("https://www.civitai.com/models/4384/a-b?x=1&modelVersionId=128713#reviews",
         Version(model="4384", version="128713")),
        (" civitai.com/models/4384 ", Version(model="4384")),
        ("https://civitai.red/models/4384", Version(model="4384")),
        ("https://civitai.com/models/4384?modelVersionId=abc", Version(model="4384")),
        ("https://civitai.com/api/download/models/128713?type=Model", Version(version="128713")),
        ("urn:air:sd1:checkpoint:civitai:4384@128713", Version(model="4384", version="128713")),
        ("https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0", HUB),
        ("https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/tree/main", HUB),
        ("https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/tree/main/unet", HUB),
        ("hf.co/stabilityai/stable-diffusion-xl-base-1.0/", HUB),
        ("https://huggingface.co/a/b/blob/main/dir/m.safetensors", "hf:a/b/dir/m.safetensors"),
        ("https://huggingface.co/a/b/resolve/v1.0/m.safetensors?download=true",
         "hf:a/b@v1.0/m.safetensors"),
        ("hf:a/b@v1/m.safetensors", "hf:a/b@v1/m.safetensors"),
        ("s3:bases/mine.safetensors", "s3:bases/mine.safetensors"),
        ("https://models.example/m.safetensors", "https://models.example/m.safetensors"),
        ("http://civitai.sandbox:8500/models/9", Version(model="9")),
    ],
)  # fmt: skip
def test_a_link_means_what_its_page_shows(link, means):
    assert understood(link, "http://civitai.sandbox:8500", "https://huggingface.co") == means


@pytest.mark.parametrize(
    "link",
    [
        "",
        "dreamshaper",
        "civitai:abc",
        "https://civitai.com/",
        "https://civitai.com/user/somebody",
        "https://civitai.com/images/123",
        "https://huggingface.co/datasets/a/b",
        "https://huggingface.co/spaces/a/b",
        "https://huggingface.co/a",
        "http://[::",
        "ftp://huggingface.co/a/b",
        "javascript:alert(1)",
    ],
)
def test_what_is_no_link_to_a_model_is_not_guessed_at(link):
    assert understood(link, "https://civitai.com", "https://huggingface.co") is None


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ("SD 1.5", "sd1"), ("SD 1.5 LCM", "sd1"), ("SD 2.1 768", "sd2"), ("SDXL 1.0", "sdxl"),
        ("SDXL Lightning", "sdxl"), ("Pony", "sdxl"), ("Illustrious", "sdxl"),
        ("NoobAI", "sdxl"), ("SD 3.5 Medium", "sd3"), ("Flux.1 D", "flux"), ("Lumina", "lumina2"),
        ("Anima", "anima"), ("Wan Video 2.2", None), ("Qwen", None), ("Flux.2 D", None),
        ("", None),
    ],
)  # fmt: skip
def test_civitais_names_of_families(said, ours):
    assert family_on_civitai(said) == ours


def test_the_hubs_tags_name_families():
    assert family_on_hub("black-forest-labs/FLUX.1-dev", []) == "flux"
    assert family_on_hub("a/b", ["diffusers:StableDiffusionXLPipeline"]) == "sdxl"
    tags = ["base_model:finetune:stabilityai/stable-diffusion-3.5-medium"]
    assert family_on_hub("a/b", tags) == "sd3"
    # a pipeline of that name runs SD 1.x and 2.x
    assert family_on_hub("a/b", ["diffusers:StableDiffusionPipeline"]) is None


def test_trigger_words_are_texts():
    assert words(["ohwx ", "", 3, None, "a" * 300]) == ("ohwx", "a" * 200)
    assert words("a photo of sks dog") == ("a photo of sks dog",)
    assert words({"x": 1}) == ()
