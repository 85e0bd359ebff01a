"""What a training must show, on the tiny base and real photographs, in this process."""

import csv
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from gpu_agent.lora.errors import DatasetError, JobError, ModelError, TrainingError
from gpu_agent.lora.talk import Orders

RECIPE = {
    "steps": 18,
    "batch_size": 4,
    "rank": 8,
    "alpha": 4.0,
    "targets": "full",
    "learning_rate": 0.02,
    "warmup_steps": 2,
    "validation_every": 6,
    "keep_checkpoints": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, workshop_in):
    """One training, looked at from several sides: its events, and its files by name."""
    workshop = workshop_in(tmp_path_factory.mktemp("trained"))
    heard, done = workshop.train(workshop.job(**RECIPE))
    assert done
    return heard, {file["name"]: file["path"] for file in heard.one("completed")["files"]}


def test_training_lowers_the_validation_loss(trained):
    heard, _ = trained
    completed = heard.one("completed")
    validations = {event["step"]: event["loss"] for event in heard.all("validation")}
    assert sorted(validations) == [0, 6, 12, 18]
    assert completed["loss_first"] == validations[0] == heard.one("started")["loss_first"]
    assert completed["loss_best"] == min(validations.values()) < 0.8 * validations[0]
    assert validations[completed["best_step"]] == completed["loss_best"]


def test_the_start_says_what_is_trained(trained):
    started = trained[0].one("started")
    assert started["total"] == 18
    assert started["images"] == 4
    assert started["label"] == "train-eval"
    assert sum(started["buckets"].values()) == 4
    # 72 layers of kohya's set: 6 transformers of 12
    assert started["parameters"] == 63488


def test_the_loss_of_every_step_is_told_and_kept(trained):
    heard, files = trained
    with open(files["loss_history.csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(19))
    assert [row["step"] for row in rows if row["validation_loss"]] == ["0", "6", "12", "18"]
    points = [point for event in heard.all("progress") for point in event["points"]]
    steps = [point for point in points if isinstance(point, list)]
    assert steps[-1][0] == 18
    for told, kept in zip(steps[0][1:], list(rows[1].values())[1:4], strict=True):
        assert told == pytest.approx(float(kept))
    assert all(float(row["gradient_norm"]) > 0 for row in rows[1:])
    beside = [point for point in points if isinstance(point, dict)]
    assert all(point["steps_per_s"] > 0 and point["memory_mib"] > 0 for point in beside)
    with Image.open(files["loss_curve.png"]) as image:
        assert image.format == "PNG"


def test_sample_images_come_with_the_result(trained):
    heard, files = trained
    sample = heard.one("sample")
    assert sample["prompt"] == "a photo of sks"
    assert sample["step"] == heard.one("completed")["best_step"]
    assert sample["path"] == files[f"samples/step-{sample['step']:06d}-0-0.png"]
    with Image.open(sample["path"]) as image:
        assert image.size == (64, 64)


def test_samples_of_all_steps_come_on_one_sheet(workshop):
    recipe = {"steps": 3, "sample_every": 2, "sample_seeds": 2, "sample_prompts": ["a", "b"]}
    heard, _ = workshop.train(workshop.job(**recipe))
    told = [(event["step"], event["prompt"], event["seed"]) for event in heard.all("sample")]
    four = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert told == [(step, *place) for step in (2, 3) for place in four]
    files = {file["name"]: file["path"] for file in heard.one("completed")["files"]}
    assert len([name for name in files if name.startswith("samples/step-")]) == 8
    last = heard.all("sample")[-1]["path"]
    with Image.open(files["samples/grid.png"]) as sheet, Image.open(last) as painted:
        # the last row and column are what was painted last
        right, bottom = sheet.width - 8, sheet.height - 8
        corner = sheet.crop((right - 256, bottom - 256, right, bottom))
        assert corner.tobytes() == painted.resize((256, 256)).tobytes()


def test_only_the_best_and_the_last_two_checkpoints_stay(trained):
    heard, _ = trained
    written = [Path(event["path"]) for event in heard.all("checkpoint")]
    assert [path.name for path in written] == ["step-00000006", "step-00000012", "step-00000018"]
    best = heard.one("completed")["best_step"]
    assert {path.name for path in written if path.exists()} == {
        f"step-{best:08d}",
        "step-00000012",
        "step-00000018",
    }


def test_what_does_no_steps_says_that_it_goes_on(trained):
    """So that a slow machine can be told from a frozen one."""
    heard, _ = trained
    told = {event["phase"] for event in heard.all("alive")}
    assert {"caching", "encoding", "validating", "saving", "sampling"} <= told
    assert all(0 <= event["done"] <= event["total"] for event in heard.all("alive"))


def updates(path, naming):
    """The change that a file makes to each layer's weight, scaled as its reader would."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if naming == "kohya":
        downs = [name for name in tensors if name.endswith("lora_down.weight")]
        layers = {name.split(".")[0] for name in downs}
        pick = {
            layer: (tensors[f"{layer}.lora_down.weight"], tensors[f"{layer}.lora_up.weight"])
            for layer in layers
        }
        alphas = {layer: float(tensors[f"{layer}.alpha"]) for layer in layers}
    else:
        said = json.loads(metadata["lora_adapter_metadata"])
        pick = {
            "lora_" + name.removesuffix(".lora_A.weight").replace(".", "_"): (
                tensor,
                tensors[name.replace("lora_A", "lora_B")],
            )
            for name, tensor in tensors.items()
            if name.endswith(".lora_A.weight")
        }
        alphas = dict.fromkeys(pick, said["unet.lora_alpha"])
    return {
        layer: (up.flatten(1) @ down.flatten(1)) * (alphas[layer] / len(down))
        for layer, (down, up) in pick.items()
    }


def test_both_namings_make_the_same_change_with_alpha_unlike_rank(trained):
    import torch

    _, files = trained
    ours = updates(files["lora.safetensors"], "diffusers")
    theirs = updates(files["lora_kohya.safetensors"], "kohya")
    assert len(ours) == 72
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in ours)
    assert any(change.abs().max() > 0 for change in ours.values())


def test_kohyas_names_are_those_that_diffusers_itself_converts_to(trained):
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from safetensors.torch import load_file

    _, files = trained
    converted = convert_state_dict_to_kohya(load_file(files["lora.safetensors"]))
    written = load_file(files["lora_kohya.safetensors"])
    assert converted.keys() == written.keys()
    # and where its converter would have lost the recipe's alpha, ours is there
    assert {float(value) for name, value in written.items() if name.endswith(".alpha")} == {4.0}


def test_the_weights_load_and_change_the_image_in_both_namings(trained, base):
    from gpu_agent.lora.check import prove

    _, files = trained
    proof = prove(
        Path(files["lora.safetensors"]), base, Path(files["lora_kohya.safetensors"]), steps=2
    )
    assert proof.error is None
    assert proof.holds
    assert proof.layers == 72
    assert proof.changed > 1
    assert proof.kohya_differs < 0.01


def test_a_file_that_is_no_lora_proves_nothing(base):
    from gpu_agent.lora.check import prove

    proof = prove(base, base, steps=1)
    assert not proof.holds
    assert base.name in proof.error


def test_the_validation_is_the_same_for_every_recipe_of_one_seed(workshop, trained):
    heard, _ = workshop.train(workshop.job(steps=1, learning_rate=1e-5, targets="attention"))
    # an untrained LoRA changes nothing, whatever its rank and layers
    assert heard.one("started")["loss_first"] == trained[0].one("started")["loss_first"]


def test_with_enough_images_some_are_held_out(workshop, photos):
    many = workshop.folder / "many"
    many.mkdir()
    for number in range(3):
        for photo in photos.glob("*.jpg"):
            with Image.open(photo) as image:
                image.rotate(90 * number, expand=True).save(many / f"{number}-{photo.name}")
    heard, _ = workshop.train(workshop.job(photos=many, steps=1, validation_share=0.25))
    assert heard.one("started")["label"] == heard.one("completed")["label"] == "held-out"
    assert heard.one("started")["images"] == 9


def test_patience_ends_a_training_that_learns_nothing_more(workshop):
    """By validations alone, so that one that is gone on with ends where it would have ended."""
    recipe = {"steps": 40, "learning_rate": 1e-9, "validation_every": 2, "patience": 2}
    recipe |= {"weight_decay": 0.0, "seed": 3}
    whole, done = workshop.train(workshop.job("whole", **recipe))
    assert done
    completed = whole.one("completed")
    losses = [event["loss"] for event in whole.all("validation")]
    assert completed["ended"] == "patience"
    assert completed["steps"] == whole.all("validation")[-1]["step"] < 40
    assert min(losses[-2:]) >= min(losses[:-2])
    saved = whole.all("checkpoint")[-1]["path"]
    again, done = workshop.train(workshop.job("again", resume_dir=saved, **recipe))
    assert done
    assert again.all("progress") == []
    assert result(again) == result(whole)


def test_levels_are_weighed_by_what_the_base_lost_there(trained):
    heard, _ = trained
    first, *_, last = heard.all("validation")
    base = [loss for _, loss, _ in first["levels"]]
    assert len(base) == 4
    assert first["loss"] == pytest.approx(sum(base) / 4)
    shares = [loss / start for (_, loss, _), start in zip(last["levels"], base, strict=True)]
    assert last["loss"] == pytest.approx(first["loss"] * sum(shares) / 4)
    assert all(0 < event["stderr"] < event["loss"] / 4 for event in heard.all("validation"))


# --- stopping and going on ------------------------------------------------------------------

EVERYTHING = {
    "steps": 4,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "flip": True,
    "caption_dropout": 0.3,
    "min_snr_gamma": 5.0,
    "validation_every": 2,
    "learning_rate": 1.0,
    "optimizer": "prodigy",
    "scheduler": "cosine",
}


def result(heard):
    files = {file["name"]: file["path"] for file in heard.one("completed")["files"]}
    names = ("lora.safetensors", "lora_kohya.safetensors", "loss_history.csv")
    contents = {}
    for name in names:
        with open(files[name], "rb") as file:
            contents[name] = file.read()
    return contents


def test_a_stopped_training_goes_on_bit_for_bit_on_another_machine(workshop):
    whole, done = workshop.train(workshop.job("whole", **EVERYTHING))
    assert done
    stopped = workshop.stopped_at(2, workshop.job("first", **EVERYTHING))
    moved = workshop.folder / "moved"
    shutil.copytree(stopped.all("checkpoint")[-1]["path"], moved)
    shutil.rmtree(workshop.folder / "first")
    resumed, done = workshop.train(workshop.job("second", resume_dir=moved, **EVERYTHING))
    assert done
    assert resumed.one("started")["step"] == 2
    assert result(resumed) == result(whole)


def test_checkpoints_at_any_step_change_nothing(workshop):
    """Each takes a copy of everything; none draws a number or puts a step in another place."""
    seldom, _ = workshop.train(workshop.job("seldom", checkpoint_s=0, **EVERYTHING))
    often, _ = workshop.train(workshop.job("often", checkpoint_s=1e-6, **EVERYTHING))
    assert [event["step"] for event in seldom.all("checkpoint")] == [2, 4]
    assert [event["step"] for event in often.all("checkpoint")] == [1, 2, 3, 4]
    assert result(often) == result(seldom)


def test_a_stop_does_not_wait_for_a_validation_which_is_made_up_for(workshop):
    whole, _ = workshop.train(workshop.job("whole", **EVERYTHING))
    orders = Orders()

    def stop(event):
        if event["step"] == 2:
            orders.note("stop")

    # the report before the validation of step 2
    first, done = workshop.train(workshop.job("first", **EVERYTHING), orders, progress=stop)
    assert not done
    assert [event["step"] for event in first.all("validation")] == [0]
    moved = first.one("checkpoint")["path"]
    second, _ = workshop.train(workshop.job("second", resume_dir=moved, **EVERYTHING))
    assert second.one("started")["step"] == 2
    assert [event["step"] for event in second.all("validation")] == [2, 4]
    assert result(second) == result(whole)


def test_the_checkpoint_before_a_broken_one_is_taken_and_that_is_told(workshop):
    recipe = {"steps": 3, "checkpoint_s": 1e-6, "keep_checkpoints": 1}
    whole, _ = workshop.train(workshop.job("whole", **recipe))
    saved = Path(whole.all("checkpoint")[-1]["path"]).parent
    moved = workshop.folder / "moved"
    # by name alone the broken one would be the older
    shutil.copytree(saved / "step-00000003", moved / "1-newest")
    shutil.copytree(saved / "step-00000002", moved / "2-older")
    (moved / "1-newest" / "state.pt").write_bytes(b"half of i")
    again, done = workshop.train(workshop.job("again", resume_dir=moved, **recipe))
    assert done
    assert again.one("started")["step"] == 2
    assert "1-newest/state.pt" in again.one("started")["resume_refused"]
    assert result(again) == result(whole)


def test_a_checkpoint_that_cannot_be_used_costs_its_steps_not_the_training(workshop):
    recipe = {"steps": 1}
    heard, _ = workshop.train(workshop.job("first", **recipe))
    saved = heard.one("checkpoint")["path"]
    again, done = workshop.train(workshop.job("second", resume_dir=saved, seed=1, **recipe))
    assert done
    assert again.one("started")["step"] == 0
    assert "another recipe" in again.one("started")["resume_refused"]


def test_orders_are_obeyed_between_two_steps(workshop):
    orders = Orders()
    orders.note("checkpoint_now")
    orders.note("sample_now")
    heard, done = workshop.train(workshop.job(steps=2), orders)
    assert done
    assert [event["step"] for event in heard.all("checkpoint")] == [1, 2]
    assert [event["step"] for event in heard.all("sample")] == [1, 2]


# --- what cannot be trained -----------------------------------------------------------------


def test_a_photograph_that_ends_too_early_is_named(workshop, photos):
    spoiled = workshop.folder / "spoiled"
    shutil.copytree(photos, spoiled)
    coffee = spoiled / "coffee.jpg"
    coffee.write_bytes(coffee.read_bytes()[:3000])
    with pytest.raises(DatasetError, match=r"coffee\.jpg") as caught:
        workshop.train(workshop.job(photos=spoiled))
    assert caught.value.code == "dataset.image"


@pytest.mark.parametrize("fault", ["nan", "missing", "reshaped"])
def test_a_base_model_with_broken_weights_is_refused(workshop, base, fault):
    from safetensors.torch import load_file, save_file

    tensors = load_file(base)
    name = "model.diffusion_model.output_blocks.5.0.in_layers.2.weight"
    if fault == "nan":
        tensors[name][0] = float("nan")
    elif fault == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:, :-1].contiguous()
    broken = workshop.folder / "broken.safetensors"
    save_file(tensors, broken)
    with pytest.raises(ModelError, match=r"broken\.safetensors") as caught:
        workshop.train(workshop.job(base=broken))
    assert caught.value.code in {"model.not_finite", "model.incomplete", "model.unreadable"}


def test_a_model_without_a_layer_to_adapt_is_told_as_such():
    from diffusers import UNet2DConditionModel

    from gpu_agent.lora.adapter import Adapter
    from gpu_agent.lora.families.base import ATTENTION
    from gpu_agent.recipe import Recipe

    without_attention = UNet2DConditionModel(
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
    )
    model = SimpleNamespace(
        prefix="unet", denoiser=without_attention, targets=lambda preset: ATTENTION
    )
    with pytest.raises(ModelError, match="to_q") as caught:
        Adapter(model, Recipe())
    assert caught.value.code == "model.targets"


def test_half_precision_is_refused_where_there_is_no_gpu(workshop):
    with pytest.raises(JobError, match="fp16 needs a GPU"):
        workshop.train(workshop.job(precision="fp16"))


def test_a_family_that_is_not_trained_is_named(workshop):
    with pytest.raises(JobError, match="sd9"):
        workshop.train({**workshop.job(), "base_family": "sd9"})


def test_a_diffusers_folder_trains_like_the_single_file(workshop, base):
    import torch
    from diffusers import StableDiffusionPipeline

    from gpu_agent.lora.families import ldm
    from gpu_agent.lora.families.clip_words import tokenizer_for

    header = ldm.read_header(base)
    pipeline = StableDiffusionPipeline.from_single_file(
        str(base),
        config=str(ldm.write_folder(header, workshop.folder / "config")),
        tokenizer=tokenizer_for(514, 77, base.parent),
        local_files_only=True,
        safety_checker=None,
        torch_dtype=torch.float32,
    )
    folder = workshop.folder / "diffusers"
    pipeline.save_pretrained(folder)
    recipe = {"steps": 2, "learning_rate": 0.01}
    one, _ = workshop.train(workshop.job("file", **recipe))
    two, _ = workshop.train(workshop.job("folder", base=folder, **recipe))
    assert result(one) == result(two)


def test_a_learning_rate_that_explodes_is_told_as_such(workshop):
    import torch
    from safetensors.torch import load_file

    recipe = {"steps": 40, "learning_rate": 10.0, "alpha": 1024.0, "validation_every": 40}
    with pytest.raises(TrainingError, match="lower learning rate") as caught:
        workshop.train(workshop.job(targets="full", checkpoint_s=1e-6, **recipe))
    assert caught.value.code == "training.diverged"
    assert not caught.value.retryable
    assert not (workshop.folder / "job" / "out" / "lora.safetensors").exists()
    (step,) = re.findall(r"in step (\d+)", str(caught.value))
    for thread in threading.enumerate():
        if thread.name == "saver":
            thread.join()
    kept = sorted((workshop.folder / "job" / "work" / "checkpoints").iterdir())
    assert [path.name for path in kept][-1] == f"step-{int(step) - 1:08d}"
    for path in kept:
        tensors = load_file(path / "lora.safetensors").values()
        assert all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, with room for one checkpoint."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_was_full_before_is_no_fault_of_the_model(workshop, small_disk):
    from gpu_agent.lora.__main__ import _translate

    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    job = {**workshop.job(), "work_dir": str(small_disk)}
    with pytest.raises(OSError, match="No space left") as caught:
        workshop.train(job)
    assert _translate(caught.value).code == "host.disk_full"


def test_a_disk_that_fills_up_is_told_and_leaves_the_checkpoint_before(workshop, small_disk):
    from gpu_agent.lora.__main__ import _translate

    job = {**workshop.job(steps=9, checkpoint_s=1e-6), "work_dir": str(small_disk)}
    with pytest.raises(OSError, match="No space left") as caught:
        workshop.train(job)
    assert _translate(caught.value).code == "host.disk_full"
    (left,) = (small_disk / "checkpoints").iterdir()
    assert sorted(path.name for path in left.iterdir()) == [
        "about.json",
        "lora.safetensors",
        "state.pt",
    ]
