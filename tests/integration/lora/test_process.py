"""The trainer as the agent meets it: a process, JSON lines, an exit status."""

import json
import random
import shutil
import signal
import struct
import time
import zipfile
from pathlib import Path

import pytest

import gpu_agent

#: Steps of the training that is killed; validations at 12 and 24 alone, so that what is gone on
#: from was written by the clock.
LONG = 24
RECIPE = {
    "steps": 12,
    "batch_size": 2,
    "flip": True,
    "caption_dropout": 0.5,
    "validation_every": 4,
    "learning_rate": 0.005,
    "warmup_steps": 2,
    "sample_prompts": ["sks in the snow"],
}


@pytest.mark.slow
def test_a_training_killed_and_stopped_on_its_way_ends_like_an_undisturbed_one(
    workshop, start, tmp_path
):
    """SIGKILL at one step, SIGTERM at a later one, the rest from a zip: bit for bit the same."""
    undisturbed, _ = workshop.train(workshop.job("undisturbed", **RECIPE))

    first = start(workshop.job("first", **RECIPE))
    checkpoint = first.until("checkpoint", step=4)
    first.process.kill()
    assert first.end() == -signal.SIGKILL
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint["path"], moved)

    second = start(workshop.job("second", resume_dir=moved, **RECIPE))
    second.order(b"not an order\n")
    assert second.until("started")["step"] == 4
    second.until("progress")
    second.process.terminate()
    assert second.end() == 75
    last = second.events[-1]
    assert last["event"] == "checkpoint"
    assert 4 < last["step"] <= 12

    third = start(workshop.job("third", resume_dir=last["path"], **RECIPE), code=bundle(tmp_path))
    completed = third.until("completed")
    assert third.end() == 0
    assert third.events[-1] == completed
    assert files_of(completed) == files_of(undisturbed.one("completed"))


@pytest.mark.slow
def test_a_training_killed_anywhere_goes_on_elsewhere_as_if_nothing_had_happened(
    workshop, start, tmp_path
):
    """SIGKILL at a random step, while a checkpoint is being written: the same weights, the same
    curve. What is half there, or whole and broken, is passed over for the one before."""
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")  # noqa: T201 -- pytest shows it with a failure
    recipe = {**RECIPE, "steps": LONG, "validation_every": 12, "checkpoint_s": 1e-6}
    recipe["ema_decay"] = 0.9
    undisturbed, _ = workshop.train(workshop.job("undisturbed", **recipe))

    first = start(workshop.job("first", **recipe))
    saved = first.until("checkpoint", step=random.Random(seed).randrange(2, LONG))
    first.process.kill()
    assert first.end() == -signal.SIGKILL
    # everything as it was left, to a folder in which nothing else of the first is
    moved = tmp_path / "moved"
    shutil.move(Path(saved["path"]).parent, moved)
    shutil.rmtree(workshop.folder / "first")
    *_, before, newest = sorted(moved.glob("step-" + "[0-9]" * 8))
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:1000])

    second = start(workshop.job("second", resume_dir=moved, **recipe))
    last = second.until("started")
    assert f"step-{last['step']:08d}" == before.name
    assert newest.name in last["resume_refused"]
    completed = second.until("completed")
    assert second.end() == 0
    assert files_of(completed) == files_of(undisturbed.one("completed"))
    before = [point for point in points(first.events) if point[0] <= last["step"]]
    assert before + points(second.events) == points(undisturbed.events)


def points(events):
    """Step, loss, rate and norm of every step, as they were told while training."""
    told = [point for event in events if event["event"] == "progress" for point in event["points"]]
    return [point for point in told if isinstance(point, list)]


def files_of(completed):
    names = {"lora.safetensors", "lora_kohya.safetensors", "loss_history.csv"}
    contents = {}
    for file in completed["files"]:
        if file["name"] in names:
            with open(file["path"], "rb") as opened:
                contents[file["name"]] = opened.read()
    assert contents.keys() == names
    return contents


def bundle(folder):
    """The trainer in a zip, as the agent carries it."""
    package = Path(next(iter(gpu_agent.__path__)))
    file = folder / "bundle.pyz"
    with zipfile.ZipFile(file, "w") as zipped:
        for path in [*package.glob("*.py"), *package.rglob("lora/**/*")]:
            if path.is_file() and path.suffix in {".py", ".json"}:
                zipped.write(path, path.relative_to(package.parent))
    return file


def test_an_order_to_stop_before_the_first_step_costs_nothing(workshop, start):
    trainer = start(workshop.job(**RECIPE))
    trainer.order(b'{"order": "stop"}\n')
    assert trainer.end() == 75
    assert not [event for event in trainer.events if event["event"] in {"error", "completed"}]


def text_as_jpg(workshop):
    folder = workshop.folder / "spoiled"
    shutil.copytree(workshop.photos, folder)
    (folder / "notes.jpg").write_text("not a photograph\n" * 100)
    return workshop.job(photos=folder)


def no_images(workshop):
    folder = workshop.folder / "none"
    folder.mkdir()
    return workshop.job(photos=folder)


def truncated_base(workshop):
    half = workshop.folder / "half.safetensors"
    half.write_bytes(workshop.base.read_bytes()[:-1000])
    return workshop.job(base=half)


def pickled_base(workshop):
    pickled = workshop.folder / "model.ckpt"
    pickled.write_bytes(b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dict")
    return workshop.job(base=pickled)


def another_family(workshop):
    other = workshop.folder / "other.safetensors"
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, separators=(",", ":")
    ).encode()
    other.write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 4)
    return workshop.job(base=other)


def no_base(workshop):
    return workshop.job(base=workshop.folder / "nowhere.safetensors")


def unknown_key(workshop):
    return workshop.job(learnin_rate=1e-4)


def rank_zero(workshop):
    return workshop.job(rank=0, steps=-1)


def garbage(_workshop):
    return "{"


@pytest.mark.parametrize(
    ("spoil", "code", "named"),
    [
        (text_as_jpg, "dataset.image", "notes.jpg"),
        (no_images, "dataset.empty", "none"),
        (truncated_base, "model.truncated", "half.safetensors"),
        (pickled_base, "model.format", "model.ckpt"),
        (another_family, "model.family", "Stable Diffusion 1.x"),
        (no_base, "model.missing", "nowhere.safetensors"),
        (unknown_key, "recipe.invalid", "learnin_rate"),
        (rank_zero, "recipe.invalid", "steps"),
        (garbage, "job.invalid", "job.json"),
    ],
)
def test_what_cannot_be_trained_is_one_error_and_status_1(workshop, start, spoil, code, named):
    trainer = start(spoil(workshop))
    assert trainer.end() == 1
    (error,) = trainer.events
    assert error["event"] == "error"
    assert error["code"] == code
    assert named in error["message"]
    assert error["retryable"] is (code == "model.truncated")
