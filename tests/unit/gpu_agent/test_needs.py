"""Which GPU a training fits, told before anything is rented."""

import pytest

from gpu_agent import needs
from gpu_agent.needs import Way
from gpu_agent.recipe import FAMILIES, Recipe, RecipeError

#: Peak GiB on an H100 that SimpleTuner publishes for its own trainer (its document of segmented
#: checkpointing): family, recipe, without and with gradient checkpointing.
PUBLISHED = [
    ("sd1", {"resolution": 512}, 2.9, 2.0),
    ("sdxl", {"resolution": 1024}, 13.0, 6.5),
    ("sd3", {"resolution": 1024, "rank": 128, "batch_size": 3}, 34.6, 7.7),
    ("lumina2", {"resolution": 512, "batch_size": 2}, 16.0, 6.6),
]


@pytest.mark.parametrize(("family", "said", "kept", "again"), PUBLISHED)
def test_the_estimate_is_near_what_another_trainer_was_seen_to_take(family, said, kept, again):
    recipe, geometry = Recipe.from_dict(said, family), needs.GEOMETRIES[family]
    for checkpointing, seen in ((False, kept), (True, again)):
        way = Way(images=recipe.batch_size, checkpointing=checkpointing)
        assert needs.training(recipe, geometry, way) == pytest.approx(seen, rel=0.12)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_memory_never_makes_a_training_slower(family):
    rungs = needs.rungs(Recipe.from_dict({"batch_size": 4}, family), family)
    assert rungs == tuple(sorted(rungs, key=lambda rung: -rung[1]))
    assert rungs == tuple(sorted(rungs))
    assert rungs[-1][1] == 1.0


def test_each_family_has_its_own_least():
    least = {name: needs.rungs(Recipe.from_dict({}, name), name)[0][0] for name in needs.GEOMETRIES}
    assert least.keys() == FAMILIES.keys()
    assert least["sd1"] < 6 < least["sdxl"] < 12 < least["flux"] < 24 < least["hunyuanimage"] < 32


def test_what_a_recipe_orders_is_what_its_ways_are():
    geometry = needs.GEOMETRIES["flux"]

    def ways(**said):
        return needs.ways(Recipe.from_dict(said, "flux"), geometry)

    assert all(way.checkpointing for way in ways(gradient_checkpointing="on"))
    assert not any(way.checkpointing for way in ways(gradient_checkpointing="off"))
    assert {way.base for way in ways(base_precision="nf4")} == {"nf4"}
    assert {way.swapped for way in ways(block_swap=20)} == {20}
    assert {way.images for way in ways(batch_size=6)} == {6, 3, 2, 1}
    assert {way.base for way in ways(adapter="dora")} == {"same"}
    assert {way.base for way in ways(adapter="lokr")} == {"same", "int8"}
    assert ways()[0] == Way(), "first comes what is fastest"


def test_nobody_is_sent_to_a_machine_that_needs_the_last_resorts():
    recipe, geometry = Recipe.from_dict({}, "flux"), needs.GEOMETRIES["flux"]
    counted = needs.ways(recipe, geometry, resorts=False)
    assert {way.base for way in counted} == {"same", "int8"}
    assert {way.swapped for way in counted} == {0}


def test_a_larger_network_of_a_family_needs_more():
    medium = needs.GEOMETRIES["sd3"]
    large = medium.resized(8.06, 0.995, 38)
    recipe = Recipe.from_dict({}, "sd3")
    assert needs.training(recipe, large, Way()) > 2 * needs.training(recipe, medium, Way())


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ({"adapter": "dora", "base_precision": "int8"}, "base_precision"),
        ({"adapter": "dora", "block_swap": 4}, "block_swap"),
        ({"adapter": "lokr", "base_precision": "nf4"}, "base_precision"),
    ],
)
def test_an_adapter_that_looks_at_the_weights_keeps_them(said, key):
    with pytest.raises(RecipeError) as raised:
        Recipe.from_dict(said, "flux")
    assert raised.value.faults.keys() == {key}
