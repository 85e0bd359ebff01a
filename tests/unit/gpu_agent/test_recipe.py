"""What follows from a recipe that says little, and which recipes are refused."""

from pathlib import Path

import pytest

from gpu_agent.recipe import FAMILIES, QUALITIES, Recipe, RecipeError

DOCS = Path(__file__).parents[3] / "docs" / "trainer.md"


def test_the_page_tells_of_every_family():
    page = DOCS.read_text()
    assert [f"| `{name}` |" in page for name in FAMILIES] == [True] * len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quality", QUALITIES)
def test_a_whole_recipe_reads_back_as_itself(family, quality):
    """It is stored with the job, and read again by the trainer."""
    recipe = Recipe.from_dict({"quality": quality}, family)
    assert Recipe.from_dict(recipe.to_dict(), family) == recipe


def test_what_is_said_goes_before_the_dial_and_the_family():
    recipe = Recipe.from_dict({"quality": "fine", "steps": 7, "resolution": 512}, "sdxl")
    assert (recipe.steps, recipe.resolution, recipe.rank) == (7, 512, 32)


def test_the_dial_turns_quality():
    steps = [Recipe.from_dict({"quality": name}).steps for name in ("draft", "standard", "fine")]
    assert steps == sorted(steps)
    assert len(set(steps)) == 3


def test_alpha_is_the_rank_unless_it_is_said():
    assert Recipe.from_dict({"rank": 48}).alpha == 48.0
    assert Recipe.from_dict({"rank": 48, "alpha": 1}).alpha == 1.0


@pytest.mark.parametrize(
    ("recipe", "family", "key"),
    [
        ({"min_snr_gamma": 5}, "flux", "min_snr_gamma"),
        ({"noise_offset": 0.1}, "sd3", "noise_offset"),
        ({"prediction": "epsilon"}, "anima", "prediction"),
        ({"adapter": "embedding", "trigger": "ohwx"}, "lumina2", "adapter"),
        ({"adapter": "embedding"}, "sd1", "adapter"),
        ({"min_snr_gamma": 5, "debiased": True}, "sd1", "debiased"),
        ({"prior_images": 10}, "sd1", "prior_images"),
        ({"quality": "best"}, "sd1", "quality"),
    ],
)
def test_a_key_that_the_family_or_another_key_forbids_is_named(recipe, family, key):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(recipe, family)
    assert set(caught.value.faults) == {key}


def test_the_api_takes_every_family():
    from orchestrator.api.schemas import JobIn

    assert JobIn.model_json_schema()["properties"]["base_family"]["enum"] == list(FAMILIES)
