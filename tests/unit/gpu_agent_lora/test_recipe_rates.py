"""Adapters, optimizers and rates that do not go together are refused, never half obeyed."""

import pytest

from gpu_agent.recipe import Recipe, RecipeError


@pytest.mark.parametrize(
    ("key", "family", "recipe"),
    [
        ("text_encoder_rate", "lumina2", {"text_encoder_rate": 1e-4}),
        ("text_encoder_rate", "sd1", {"text_encoder_rate": 1e-4, "adapter": "lokr"}),
        ("text_encoder_rate", "sd1", {"text_encoder_rate": 1e-4, "optimizer": "prodigy"}),
        ("lora_plus", "sd1", {"lora_plus": 4, "adapter": "oft"}),
        ("lora_plus", "sd1", {"lora_plus": 4, "optimizer": "prodigy"}),
        ("scheduler", "sd1", {"optimizer": "schedule_free", "scheduler": "cosine"}),
        ("ema_decay", "sd1", {"optimizer": "schedule_free", "ema_decay": 0.9}),
        ("adapter", "flux", {"adapter": "embedding", "trigger": "sks"}),
        ("adapter", "sd1", {"adapter": "embedding"}),
        ("base_precision", "flux", {"adapter": "dora", "base_precision": "nf4"}),
    ],
)
def test_what_does_not_go_together_is_named(key, family, recipe):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(recipe, family)
    assert caught.value.faults.keys() == {key}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_texts_are_trained_at_a_rate_of_their_own(family):
    assert Recipe.from_dict({"text_encoder_rate": 5e-5}, family).text_encoder_rate == 5e-5


@pytest.mark.parametrize(
    "said",
    [
        {"optimizer": "schedule_free", "quality": "fine"},
        {"optimizer": "prodigy", "text_encoder_rate": 1.0},
        {"adapter": "embedding", "trigger": "sks", "quality": "fine"},
    ],
)
def test_what_is_worked_out_reads_back_as_the_same_recipe(said):
    recipe = Recipe.from_dict(said)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
