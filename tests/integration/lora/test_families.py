"""Every family: a tiny base of its real classes, real photographs, and a LoRA that works."""

from pathlib import Path

import pytest

from gpu_agent.lora import tiny_base
from gpu_agent.lora.families import family

#: Family, and the least share by which 100 steps must lower its validation loss.
FAMILIES = {
    "sd1": 0.15,
    "sd2": 0.25,
    # of the noise it hears half: its attentions begin at half the latents' resolution
    "sdxl": 0.05,
    "sd3": 0.2,
    "flux": 0.2,
    "lumina2": 0.25,
    "hunyuanimage": 0.25,
    "anima": 0.2,
}
#: Where 64 pixels are too few latents.
RESOLUTIONS = {"hunyuanimage": 128}
#: The second one with --slow only: a training for each of eight families takes a minute.
SEEDS = (0, 1)
RECIPE = {
    "steps": 100,
    "batch_size": 1,
    "rank": 4,
    "alpha": 8.0,
    "learning_rate": 2e-3,
    "scheduler": "constant",
    "targets": "full",
    "validation_every": 50,
    "checkpoint_s": 0,
}


#: Their own tests train them, too; a hundred steps only with --slow.
AT_LENGTH = frozenset({"sd2", "sd3", "anima"})


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in AT_LENGTH else [])
        for name in FAMILIES
    ],
)
def base_of(request, tmp_path_factory):
    """A family's name and its tiny base."""
    if request.param == "sd1":
        return "sd1", request.getfixturevalue("base")
    folder = tmp_path_factory.mktemp(request.param)
    single = request.param in {"sd2", "sdxl"}
    out = folder / ("tiny.safetensors" if single else "tiny")
    return request.param, tiny_base.write(out, 0, request.param)


@pytest.fixture(scope="session")
def trainings(base_of, tmp_path_factory, workshop_in, pytestconfig):
    """One training per seed: its events."""
    name, base = base_of
    workshop = workshop_in(tmp_path_factory.mktemp(f"{name}-trained"))
    heard = {}
    for seed in SEEDS if pytestconfig.getoption("--slow") else SEEDS[:1]:
        recipe = {**RECIPE, "seed": seed, "resolution": RESOLUTIONS.get(name, 64)}
        job = workshop.job(f"seed-{seed}", base=base, family=name, **recipe)
        heard[seed], done = workshop.train(job)
        assert done
    return heard


def test_a_hundred_steps_lower_the_validation_loss_clearly(base_of, trainings):
    for heard in trainings.values():
        completed = heard.one("completed")
        fallen = 1 - completed["loss_best"] / completed["loss_first"]
        assert fallen > FAMILIES[base_of[0]]


def test_diffusers_loads_the_lora_and_draws_another_image(base_of, trainings):
    from gpu_agent.lora import check

    name, base = base_of
    files = {file["name"]: Path(file["path"]) for file in trainings[0].one("completed")["files"]}
    proof = check.prove(files["lora.safetensors"], base, family=name)
    assert proof.holds, proof
    assert proof.changed > 1.0


def test_its_single_file_or_folder_is_known_for_what_it_is(base_of):
    name, base = base_of
    assert family(name).check(base)
