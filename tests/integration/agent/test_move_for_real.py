"""The whole move, with our own trainer: an agent is killed, an agent elsewhere goes on."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[3]
RECIPE = {
    "steps": 16,
    "resolution": 64,
    "rank": 4,
    "batch_size": 2,
    "trigger": "sks",
    "learning_rate": 0.005,
    "flip": True,
    "validation_every": 8,
    "checkpoint_s": 0.01,
}


@pytest.fixture
def order(stoker, tmp_path):
    """A job on real photographs and the tiny base."""
    import skimage

    from gpu_agent.lora import tiny_base

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in ("chelsea.png", "coffee.png", "rocket.jpg"):
            with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
                photo = io.BytesIO()
                image.convert("RGB").reduce(3).save(photo, "jpeg", quality=90)
            archive.writestr(f"{Path(name).stem}.jpg", photo.getvalue())
    base = tiny_base.write(tmp_path / "tiny.safetensors", seed=0)
    stoker.offer(dataset=packed.getvalue(), base=base.read_bytes())
    stoker.spec |= {"method": "lora", "recipe": RECIPE}


@pytest.fixture
def boot(stoker, tmp_path):
    """Starts the real agent in a folder of its own, on one thread: sums keep their order."""
    running: list[subprocess.Popen[bytes]] = []

    def start(name):
        home = tmp_path / name
        home.mkdir()
        with (tmp_path / "console").open("ab") as console:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpu_agent"],
                cwd=REPOSITORY,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(home),
                    "STOKER_URL": stoker.url,
                    "VAST_URL": stoker.url,
                    "OMP_NUM_THREADS": "1",
                    **stoker.container,
                },
            )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def undisturbed(stoker, order, tmp_path):
    """Waits for what the same job gives on one machine that is left alone."""
    folder = tmp_path / "undisturbed"
    (folder / "images").mkdir(parents=True)
    with zipfile.ZipFile(io.BytesIO(stoker.objects["dataset"])) as archive:
        archive.extractall(folder / "images")
    job = {
        "base_file": str(tmp_path / "tiny.safetensors"),
        "base_family": "sd1",
        "images_dir": str(folder / "images"),
        "output_dir": str(folder / "out"),
        "work_dir": str(folder / "work"),
        "recipe": RECIPE,
    }
    (folder / "job.json").write_text(json.dumps(job))
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_agent.lora", "--job", str(folder / "job.json")],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def files():
        assert process.wait(120) == 0
        names = ("lora.safetensors", "lora_kohya.safetensors", "loss_history.csv")
        return {name: (folder / "out" / name).read_bytes() for name in names}

    yield files
    process.kill()
    process.wait()


def steps_of(stoker, fact, attempt):
    return [
        item.data["step"] for item in stoker.reports if (item.type, item.attempt) == (fact, attempt)
    ]


@pytest.mark.slow
def test_a_job_whose_machine_dies_ends_elsewhere_with_the_very_same_weights(
    stoker, boot, undisturbed, until
):
    """The first machine is lost at a random step, the second is taken away, the third finishes."""
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")  # noqa: T201 -- pytest shows it with a failure
    lost_at = random.Random(seed).randrange(1, 8)
    first = boot("first")
    until(lambda: max(steps_of(stoker, "training.checkpoint", 1), default=0) >= lost_at, 90)
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    stoker.move()
    resumed_at = steps_of(stoker, "training.checkpoint", 1)[-1]

    second = boot("second")
    until(lambda: steps_of(stoker, "training.checkpoint", 2), 90)
    told = time.monotonic()
    second.send_signal(signal.SIGTERM)
    assert second.wait(15) == 1
    print(f"saved, uploaded, said: {time.monotonic() - told:.1f} s")  # noqa: T201 -- with -s
    assert steps_of(stoker, "training.started", 2) == [resumed_at]
    stoker.move()
    saved_at = steps_of(stoker, "training.checkpoint", 2)[-1]

    third = boot("third")
    assert third.wait(90) == 0
    assert steps_of(stoker, "training.started", 3) == [saved_at]
    for name, content in undisturbed().items():
        assert stoker.uploads[name] == content, name
