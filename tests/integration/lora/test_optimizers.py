"""Each optimizer on a small problem, through the loop's own calls, without a model."""

import io
from itertools import pairwise

import pytest

from gpu_agent.recipe import Recipe

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "schedule_free")
STEPS = 40


@pytest.fixture(scope="module")
def problem():
    """Find two matrices whose product is a given one, from noisy looks at it."""
    import torch

    from gpu_agent.lora import ema, optimizers
    from gpu_agent.lora.adapter import Trainable

    goal = torch.randn((24, 24), generator=torch.Generator().manual_seed(0))

    class Problem(Trainable):
        def __init__(self, recipe):
            place = torch.Generator().manual_seed(1)
            self.recipe, self.step = recipe, 0
            self.a = torch.nn.Parameter(torch.randn((12, 24), generator=place) / 5)
            self.b = torch.nn.Parameter(torch.zeros((24, 12)))
            self.optimizer = optimizers.make(self.groups(), recipe, torch.device("cpu"))
            self.kept = ema.kept(self, self.optimizer, recipe)

        def named(self):
            return {"a": self.a, "b": self.b}

        def groups(self):
            rate = self.recipe.learning_rate
            return [
                {"params": [self.a], "rate": rate},
                {"params": [self.b], "rate": rate * self.recipe.lora_plus},
            ]

        def encode(self, texts):
            raise NotImplementedError

        def loss(self, noise=0.0):
            return (self.b @ self.a - goal + noise).square().mean()

        def train(self, steps):
            for _ in range(steps):
                place = torch.Generator().manual_seed(self.step)
                noise = torch.randn(goal.shape, generator=place)
                optimizers.set_rates(self.optimizer, self.recipe, self.step)
                self.loss(noise).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.step += 1
                self.kept.follow(self.step)
            return self

        def measured(self):
            with torch.no_grad(), self.kept.shown():
                return float(self.loss())

        def saved(self):
            file = io.BytesIO()
            torch.save(
                [self.kept.tensors(), self.kept.trained(), self.optimizer.state_dict()], file
            )
            return file.getvalue()

        def go_on(self, saved, step):
            tensors, trained, state = torch.load(io.BytesIO(saved), weights_only=True)
            self.kept.resume(tensors, trained)
            self.optimizer.load_state_dict(state)
            self.step = step
            return self

    def make(**recipe):
        rate = 1.0 if recipe.get("optimizer") == "prodigy" else 0.02
        said = {"steps": STEPS, "learning_rate": rate, "weight_decay": 0.0, **recipe}
        return Problem(Recipe.from_dict(said))

    return make


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(problem, optimizer):
    # prodigy begins with a millionth of a step, and finds out what the right one is
    steps = 300 if optimizer == "prodigy" else STEPS
    one = problem(optimizer=optimizer, steps=steps)
    before = one.measured()
    assert one.train(steps).measured() < 0.7 * before


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.9}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_was_stopped_goes_on_to_the_bit(problem, optimizer, more):
    if optimizer == "schedule_free" and more:
        pytest.skip("it averages the weights itself")
    recipe = {"optimizer": optimizer, "warmup_steps": 3, **more}
    whole = problem(**recipe).train(20)
    saved = problem(**recipe).train(11).saved()
    assert problem(**recipe).go_on(saved, 11).train(9).saved() == whole.saved()


@pytest.mark.parametrize("recipe", [{"ema_decay": 0.9}, {"optimizer": "schedule_free"}])
def test_looking_at_averaged_weights_changes_nothing(problem, recipe):
    plain, looked_at = problem(**recipe), problem(**recipe)
    for _ in range(10):
        plain.train(1)
        looked_at.train(1).measured()
    assert plain.saved() == looked_at.saved()


@pytest.mark.parametrize("recipe", [{"ema_decay": 0.95}, {"optimizer": "schedule_free"}])
def test_averaged_weights_are_steadier_than_those_that_are_trained(problem, recipe):
    one = problem(scheduler="constant", learning_rate=0.1, **recipe).train(200)
    assert one.measured() < 0.95 * float(one.loss().detach())


def test_eight_bits_take_a_quarter_of_the_memory_and_train_as_well(problem):
    import torch

    def bytes_of(one):
        states = one.optimizer.state.values()
        return sum(
            value.nbytes for state in states for value in state.values() if torch.is_tensor(value)
        )

    exact, rough = problem().train(STEPS), problem(optimizer="adamw8bit").train(STEPS)
    # the matrices of 288 weights are filled up to 512
    assert bytes_of(rough) < 0.25 * bytes_of(exact) * 512 / 288 + 100
    assert rough.measured() == pytest.approx(exact.measured(), rel=0.02)


@pytest.mark.parametrize("signed", [True, False])
def test_the_256_codes_are_those_of_the_paper(signed):
    from gpu_agent.lora import optimizers

    codes = optimizers._dynamic(signed=signed).tolist()
    assert len(codes) == len(set(codes)) == 256
    assert codes[-1] == 1
    assert 0.0 in codes
    positive = [code for code in codes if code > 0]
    assert min(positive) < 1e-6
    # none is far from the next one
    assert all(after < 6 * before for before, after in pairwise(positive))


def test_b_learns_faster_by_as_much_as_is_said(problem):
    one = problem(lora_plus=8.0, warmup_steps=10).train(5)
    rates = [group["lr"] for group in one.optimizer.param_groups]
    assert rates == pytest.approx([0.02 * 5 / 10, 0.02 * 5 / 10 * 8])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_shrinks_what_is_not_needed(problem, optimizer):
    sizes = [
        float(problem(optimizer=optimizer, weight_decay=decay).train(STEPS).a.detach().norm())
        for decay in (0.0, 1.0)
    ]
    assert sizes[1] < sizes[0]
