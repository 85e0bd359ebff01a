"""Merging, extracting and resizing, by what a model with the result does."""

import functools
import json

import pytest


@pytest.fixture(scope="module")
def made(tmp_path_factory, base):
    """Tiny bases, and LoRAs for them that have weights as if they were trained."""
    import torch

    from gpu_agent.lora import export, tiny_base
    from gpu_agent.lora.adapter import Adapter
    from gpu_agent.lora.families import family
    from gpu_agent.recipe import Recipe

    folder = tmp_path_factory.mktemp("tools")
    bases = {"sd1": base, "sdxl": tiny_base.write(folder / "sdxl.safetensors", 0, "sdxl")}
    pipeline = family("sd1").pipeline(base, folder / "config")
    pipeline.save_pretrained(folder / "sd1-folder")
    bases["folder"] = folder / "sd1-folder"

    def lora(name, kind):
        out = folder / f"{name}-{kind}"
        if not out.exists():
            out.mkdir()
            said = {"rank": 4, "alpha": 2.0, "adapter": kind, "targets": "full"}
            recipe = Recipe.from_dict({**said, "text_encoder_rate": 1e-4}, name)
            model = family(name).load(
                bases[name], folder / "w", recipe, torch.device("cpu"), torch.float32
            )
            adapter = Adapter(model, recipe)
            place = torch.Generator().manual_seed(1)
            tensors = {
                key: value + 0.05 * torch.randn(value.shape, generator=place)
                for key, value in adapter.tensors().items()
            }
            row = family(name)
            export.write(
                out,
                tensors,
                family=row,
                recipe=recipe,
                configs=adapter.configs,
                pictures=[],
                steps=1,
            )
        return out

    return bases, lora, folder


@pytest.fixture(scope="module")
def drawn(made):
    """A small picture of a base, as users of diffusers draw it, maybe with a LoRA."""
    from gpu_agent.lora.check import _render
    from gpu_agent.lora.families import family

    @functools.cache
    def pipeline_of(name, base):
        pipeline = family(name).pipeline(base, made[2] / "config")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @functools.cache
    def draw(name, base, lora=None):
        pipeline = pipeline_of(name, base)
        if lora is None:
            return _render(pipeline, 64, 2)
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        picture = _render(pipeline, 64, 2)
        pipeline.unload_lora_weights()
        return picture

    return draw


@pytest.fixture(scope="module")
def merged(made):
    """A base with its LoRA in it."""
    from gpu_agent.lora.tools import work

    bases, lora, folder = made

    @functools.cache
    def merge(which, naming):
        name = "sd1" if which == "folder" else which
        out = folder / f"merged-{which}-{naming}"
        said = work.merge(bases[which], lora(name, "lora") / naming, out, name, 1.0)
        # those of the UNet, and more
        assert said["layers"] > 72
        return out

    return merge


# diffusers' Euler scheduler, which SDXL draws with, speaks an older NumPy's language
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning")
@pytest.mark.parametrize(
    ("which", "naming"),
    [
        ("sd1", "lora.safetensors"),
        ("folder", "lora.safetensors"),
        ("sdxl", "lora_kohya.safetensors"),
    ],
)
def test_a_base_with_a_lora_in_it_draws_as_with_one_beside_it(made, merged, drawn, which, naming):
    bases, lora, _ = made
    name = "sd1" if which == "folder" else which
    beside = drawn(name, bases[which], lora(name, "lora") / naming)
    assert abs(drawn(name, merged(which, naming)) - beside).max() < 0.5
    assert abs(drawn(name, bases[which]) - beside).mean() > 1


def test_half_of_a_dora_is_half_way(made):
    import torch

    from gpu_agent.lora.families import family
    from gpu_agent.lora.tools import work
    from gpu_agent.lora.tools.weights import Weights

    bases, lora, folder = made
    file = lora("sd1", "dora") / "lora.safetensors"
    outs = {scale: folder / f"dora-{scale}.safetensors" for scale in (0.5, 1.0)}
    for scale, out in outs.items():
        work.merge(bases["sd1"], file, out, "sd1", scale)
    none, half, whole = (Weights(one, family("sd1")) for one in (bases["sd1"], *outs.values()))
    for layer in none.layers:
        middle = (none.read(layer) + whole.read(layer)) / 2
        assert torch.allclose(half.read(layer), middle, atol=1e-6)
    assert outs[0.5].stat().st_size == bases["sd1"].stat().st_size


def test_what_was_merged_is_extracted_again(made):
    """To a thousandth of the change: both are rounded to fp32 beside larger weights."""
    name = "sdxl"
    from gpu_agent.lora.families import family
    from gpu_agent.lora.tools import low_rank, work
    from gpu_agent.lora.tools.weights import Weights

    bases, lora, folder = made
    file, merged = lora(name, "lora") / "lora.safetensors", folder / f"{name}-tuned.safetensors"
    out = folder / f"{name}-extracted.safetensors"
    work.merge(bases[name], file, merged, name, 0.5)
    said = work.extract(bases[name], merged, out, name, 4, "kohya")
    assert said["left_out"] == 0
    assert said["kept"] > 0.999999
    layers = Weights(bases[name], family(name)).layers
    was = low_rank.by_layer(low_rank.read(file), layers, family(name), file)
    found = low_rank.by_layer(low_rank.read(out), layers, family(name), out)
    assert found.keys() == was.keys()
    for layer, update in found.items():
        wanted = was[layer].matrix() / 2
        assert (update.matrix() - wanted).norm() < 1e-3 * wanted.norm()


def test_an_extracted_lora_is_read_by_diffusers(made, merged, drawn):
    from gpu_agent.lora.tools import work

    bases, _, folder = made
    tuned = merged("sd1", "lora.safetensors")
    out = folder / "extracted.safetensors"
    work.extract(bases["sd1"], tuned, out, "sd1", 4)
    assert abs(drawn("sd1", bases["sd1"], out) - drawn("sd1", tuned)).max() < 0.5


@pytest.mark.parametrize("naming", ["lora.safetensors", "lora_kohya.safetensors"])
def test_a_lower_rank_is_the_nearest_there_is(made, naming):
    import torch

    from gpu_agent.lora.tools import low_rank, work

    _, lora, folder = made
    file, out = lora("sd1", "lora") / naming, folder / f"resized-{naming}"
    said = work.resize(file, out, 2)
    assert 0.3 < said["kept"] < 1
    whole, less = low_rank.read(file).updates, low_rank.read(out).updates
    assert whole.keys() == less.keys()
    for layer, update in less.items():
        wanted = whole[layer].matrix()
        lost = (update.matrix() - wanted).norm()
        best = torch.linalg.svdvals(wanted)[2:].norm()
        assert lost == pytest.approx(float(best), rel=1e-3)


def test_a_resized_lora_says_its_rank_to_diffusers(made, drawn):
    from gpu_agent.lora.tools import work

    bases, lora, folder = made
    file, out = lora("sd1", "lora") / "lora.safetensors", folder / "three.safetensors"
    work.resize(file, out, 3)
    near = abs(drawn("sd1", bases["sd1"], out) - drawn("sd1", bases["sd1"], file)).mean()
    far = abs(drawn("sd1", bases["sd1"]) - drawn("sd1", bases["sd1"], file)).mean()
    assert near < far / 2


@pytest.mark.parametrize("fault", ["other family", "no lora", "infinite", "rank", "there", "same"])
def test_what_does_not_fit_is_said_and_nothing_is_written(made, tmp_path, capsys, fault):
    import torch
    from safetensors.torch import load_file, save_file

    from gpu_agent.lora.tools.__main__ import main

    bases, lora, _ = made
    file, out = lora("sd1", "lora") / "lora.safetensors", tmp_path / "out.safetensors"
    merge = ["merge", str(bases["sd1"]), str(file), str(out), "--family", "sd1"]
    if fault == "other family":
        merge[1], merge[-1] = str(bases["sdxl"]), "sdxl"
    elif fault == "no lora":
        merge[2] = str(bases["sd1"])
    elif fault == "infinite":
        tensors = load_file(file)
        name = next(iter(tensors))
        save_file({**tensors, name: torch.full_like(tensors[name], torch.inf)}, tmp_path / "inf")
        merge[2] = str(tmp_path / "inf")
    elif fault == "rank":
        merge = ["resize", str(file), str(out), "--rank", "4"]
    elif fault == "there":
        out = tmp_path / "there"
        out.write_text("mine")
        merge[3] = str(out)
    elif fault == "same":
        merge = ["extract", *[str(bases["sd1"])] * 2, str(out), "--family", "sd1", "--rank", "4"]
    assert main(merge) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert out.read_text() == "mine" if fault == "there" else not out.exists()


def test_the_command_line_says_what_was_done(made, tmp_path, capsys):
    from gpu_agent.lora.tools.__main__ import main

    file = made[1]("sd1", "lora") / "lora.safetensors"
    assert main(["resize", str(file), str(tmp_path / "out"), "--rank", "1"]) == 0
    # 72 of the UNet, 4 in each of the text encoder's 2 layers
    assert json.loads(capsys.readouterr().out)["layers"] == 80
