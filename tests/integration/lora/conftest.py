"""Real photographs, the tiny base, and trainings on them, in this process and in others."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from gpu_agent.lora import plan
from gpu_agent.lora.job import Job
from gpu_agent.lora.talk import Orders

REPOSITORY = Path(__file__).resolve().parents[3]
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
#: So many seconds without a word from a trainer, and the test gives up.
PATIENCE = 120


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # sums in another order would not be bit-equal to those of the other processes
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_sd1(tmp_path_factory.mktemp("base") / "tiny.safetensors")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    import skimage

    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            image.convert("RGB").reduce(3).save(folder / f"{Path(name).stem}.jpg", quality=90)
    (folder / "chelsea.txt").write_text("a cat called {trigger}")
    return folder


def write_sd1(out):
    """The tiny SD 1.x with attention at the first level alone: twice as fast."""
    from gpu_agent.lora.families import ldm
    from gpu_agent.lora.tiny import latent_diffusion, sd1

    latent_diffusion.write(
        out,
        0,
        ldm.SD1,
        unet={
            "block_out_channels": sd1.UNET_WIDTHS,
            "cross_attention_dim": sd1.TEXT_WIDTH,
            "down_block_types": ["CrossAttnDownBlock2D"] + ["DownBlock2D"] * 3,
            "up_block_types": ["UpBlock2D"] * 3 + ["CrossAttnUpBlock2D"],
        },
        encoders={"text_encoder": sd1.TEXT_WIDTH},
        metadata={"modelspec.architecture": "stable-diffusion-v1"},
    )
    return out


@dataclass
class Heard:
    """Collects a training's events, and reacts to them."""

    events: list = field(default_factory=list)
    react: dict = field(default_factory=dict)

    def emit(self, event, **fields):
        self.events.append(json.loads(json.dumps({"event": event, **fields}, allow_nan=False)))
        if event in self.react:
            self.react[event](self.events[-1])

    def all(self, event):
        return [heard for heard in self.events if heard["event"] == event]

    def one(self, event):
        (heard,) = self.all(event)
        return heard


@dataclass
class Workshop:
    """Writes jobs below one folder and runs them in this process."""

    folder: Path
    base: Path
    photos: Path

    def job(self, name="job", resume_dir=None, base=None, photos=None, family="sd1", **recipe):
        return {
            "base_file": str(base or self.base),
            "base_family": family,
            "images_dir": str(photos or self.photos),
            "output_dir": str(self.folder / name / "out"),
            "work_dir": str(self.folder / name / "work"),
            "resume_dir": str(resume_dir) if resume_dir else None,
            "recipe": {"resolution": 64, "rank": 4, "trigger": "sks", **recipe},
        }

    def train(self, job, orders=None, **react):
        """Events, and whether it came to its end."""
        from gpu_agent.lora import session

        heard = Heard(react=react)
        done = session.train(plan.make(Job.from_dict(job)), heard, orders or Orders())
        return heard, done

    def stopped_at(self, step, job):
        """A training that is told to stop by the report of a step."""
        orders = Orders()

        def stop(event):
            if event["step"] >= step:
                orders.note("stop")

        heard, done = self.train(job, orders, validation=stop)
        assert not done
        return heard


@pytest.fixture(scope="session")
def workshop_in(base, photos):
    return lambda folder: Workshop(folder, base, photos)


@pytest.fixture
def workshop(tmp_path, workshop_in):
    return workshop_in(tmp_path)


class Trainer:
    """`python -m gpu_agent.lora` as the agent runs it: lines out, lines in."""

    def __init__(self, job, folder, code=REPOSITORY, arguments=()):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "job.json"
        file.write_text(json.dumps(job) if isinstance(job, dict) else job)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpu_agent.lora", "--job", str(file), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
        )
        self.lines = []
        self._queue = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            self._queue.put(json.loads(line))
        self._queue.put(None)

    def until(self, event, step=0):
        """Wait for an event; None where the process ends without it."""
        while True:
            got = self._queue.get(timeout=PATIENCE)
            if got is None or (got["event"] == event and got.get("step", step) >= step):
                return got

    def order(self, line):
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def end(self):
        """Its exit status."""
        status = self.process.wait(timeout=PATIENCE)
        self._reader.join(timeout=PATIENCE)
        self.process.stdin.close()
        self.process.stdout.close()
        return status

    @property
    def events(self):
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def start(tmp_path):
    """Start trainers; what still runs at the end of the test is killed."""
    started = []

    def begin(job, code=REPOSITORY, arguments=()):
        started.append(Trainer(job, tmp_path / f"process-{len(started)}", code, arguments))
        return started[-1]

    yield begin
    for trainer in started:
        if trainer.process.poll() is None:
            trainer.process.kill()
            trainer.end()


@pytest.fixture
def until():
    """Wait for something that another process does; its value."""

    def wait(holds):
        end = time.monotonic() + PATIENCE
        while not (value := holds()):
            assert time.monotonic() < end
            time.sleep(0.02)
        return value

    return wait
