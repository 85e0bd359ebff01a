"""Randomness by place: the same place, the same draw, whatever came before."""

from collections import Counter

import pytest

from gpu_agent.recipe import Recipe


@pytest.fixture(scope="module")
def draws():
    from gpu_agent.lora import draws

    return draws


def test_a_place_always_draws_the_same(draws):
    import torch

    first = torch.randn(4, generator=draws.generator(7, "step", 3))
    torch.randn(100)
    assert torch.equal(torch.randn(4, generator=draws.generator(7, "step", 3)), first)
    assert not torch.equal(torch.randn(4, generator=draws.generator(7, "step", 4)), first)
    assert not torch.equal(torch.randn(4, generator=draws.generator(8, "step", 3)), first)


def test_an_epoch_goes_once_through_all_samples_in_batches_of_one_bucket(draws):
    shapes = ("wide", "tall", "wide", "wide", "tall", "wide", "wide")
    batches = draws.Batches(shapes, size=2, seed=0)
    for epoch in range(3):
        chosen = [batches.at(epoch * 4 + number) for number in range(4)]
        assert Counter(number for batch in chosen for number in batch) == Counter(range(7))
        for batch in chosen:
            assert len({shapes[number] for number in batch}) == 1
    assert batches.at(17) == draws.Batches(shapes, size=2, seed=0).at(17)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    from gpu_agent.lora.loop import learning_rate

    recipe = Recipe(steps=12, warmup_steps=2, learning_rate=1.0, scheduler="cosine")
    rates = [learning_rate(recipe, step) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05
    steady = Recipe(steps=12, warmup_steps=2, learning_rate=1.0, scheduler="constant")
    assert [learning_rate(steady, step) for step in (2, 11)] == [1.0, 1.0]
