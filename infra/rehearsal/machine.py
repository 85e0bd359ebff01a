"""What a machine of a rehearsal does: all that a real one's agent says, in the same words.

It speaks the wire to the real receiver, pulls the real dataset, and uploads real (small) files by
presigned PUT. Only the base model, the GPU and the training are made up. It is a generator that
yields how long it waits, so that whoever plays it decides what a second is.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import secrets
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from gpu_agent import wire
from gpu_agent.wire import Fact, Order
from infra.rehearsal import made_up
from state import rehearsal
from state.offer import Offer
from state.rehearsal import Rehearsal

#: Seconds of the pretended time that each part takes.
BOOT_S, GPU_S, IMAGES_S, MODEL_S, START_S, TRAINING_S = 30.0, 2.0, 20.0, 60.0, 20.0, 200.0
#: The boot of a machine that will not come up.
NEVER_S = 24 * 3600.0
#: A training is told in so many reports at most.
REPORTS = 40
#: At which shares of it a checkpoint, a sample, a validation are made; where a first machine fails.
CHECKPOINTS, SAMPLES, FAILS_AT = (0.25, 0.5, 0.75, 1.0), (0.5, 1.0), 0.6
#: A larger dataset is not pulled: this is no test of the line.
PULLED_BYTES = 64_000_000
#: Real seconds between two tries at what did not answer, and how many there are.
AGAIN_S, TRIES = 1.0, 45
#: A base model of nobody: its address leads nowhere, and nobody follows it.
BASE = wire.Download(
    url="https://rehearsal.invalid/base.safetensors", name="base.safetensors", bytes=2_132_696_762
)
_PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Answer:
    """Status and body; 0 where there was no answer."""

    status: int
    body: bytes = field(default=b"", repr=False)


class Line(Protocol):
    """How a machine reaches the server and the storage. No answer is an answer: status 0."""

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer: ...
    def get(self, url: str) -> Answer: ...
    def put(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer: ...


@dataclass(frozen=True, kw_only=True)
class Cue:
    """What a machine is started with. `first`: no other was rented for its job before."""

    instance: str
    label: str
    offer: Offer
    part: Rehearsal
    first: bool
    url: str
    token: str = field(repr=False)

    @property
    def boot_s(self) -> float:
        never = self.first and self.part.fixture == rehearsal.SLOW_BOOT
        return NEVER_S if never else BOOT_S


class Over(Exception):
    """The server said that this machine has nothing more to do, or does not answer at all."""


class Failed(Exception):
    """What an `error` report says."""

    def __init__(self, code: str, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.code, self.message, self.retryable = code, message, retryable


class Machine:
    """One machine's life, from its boot until its job needs it no more."""

    def __init__(self, cue: Cue, line: Line, clock: Callable[[], datetime]) -> None:
        self._cue, self._line, self._clock = cue, line, clock
        self._spec: wire.JobSpec
        self._seq = self._moved = 0
        self._orders: list[Order] = []
        self._chance = random.Random(cue.label)
        self._files: dict[str, dict[str, Any]] = {}

    def play(self) -> Iterator[float]:
        """Do all of it, yielding the pretended seconds to wait before going on."""
        yield self._cue.boot_s
        try:
            yield from self._hello()
            try:
                yield from self._work()
            except Failed as error:
                said = {"code": error.code, "message": error.message, "retryable": error.retryable}
                yield from self._report(Fact.ERROR, **said, log_tail=[error.message])
        except Over:
            return

    # --- talking to the server

    def _hello(self) -> Iterator[float]:
        offer = self._cue.offer
        machine = {
            "gpu_name": offer.gpu_name,
            "gpus": offer.num_gpus,
            "vram_mb": round(offer.vram_gb * 1000),
            "driver": "570.86.15",
            "cuda": f"{offer.cuda:g}",
            "disk_free_gb": offer.disk_gb,
            "instance": self._cue.instance,
        }
        body = {"token": self._cue.token, "nonce": secrets.token_hex(16), "machine": machine}
        sent = json.dumps({**body, "version": wire.VERSION}).encode()
        url = f"{self._cue.url}/agent/v1/hello"
        answer = yield from self._insist(
            lambda: self._line.post(url, sent, {"Content-Type": "application/json"})
        )
        if answer.status != 200:
            raise Over
        self._spec = wire.JobSpec.from_bytes(answer.body)

    def _insist(self, ask: Callable[[], Answer]) -> Generator[float, None, Answer]:
        """Ask until there is an answer that counts, and hand it back. Raises: Over."""
        for _ in range(TRIES):
            answer = ask()
            if answer.status and answer.status < 500 and answer.status != 429:
                return answer
            yield AGAIN_S * self._cue.part.time_scale
        raise Over

    def _path(self, url: str) -> str:
        """An address of the spec as it is reached from here."""
        return self._cue.url + url[url.index("/agent/v1/") :]

    def _signed(self, body: bytes, webhook_id: str) -> dict[str, str]:
        at = self._clock().timestamp()
        signed = wire.sign(body, secrets=[self._spec.secret], webhook_id=webhook_id, at=at)
        return {**signed, "Content-Type": "application/json"}

    def _report(self, fact: Fact, **data: Any) -> Iterator[float]:
        """Say it, and keep the orders that come back. Raises: Over."""
        self._seq, self._moved = self._seq + 1, self._moved + 1
        report = wire.Report(
            job=self._spec.job,
            attempt=self._spec.attempt,
            seq=self._seq,
            type=fact,
            at=self._clock().timestamp(),
            data={**data, "moved": self._moved} if fact in _COUNTED else data,
        )
        body, url = report.to_bytes(), self._path(self._spec.report_url)
        answer = yield from self._insist(
            lambda: self._line.post(url, body, self._signed(body, report.webhook_id))
        )
        if answer.status in (401, 410):
            raise Over
        said = wire.orders_from_bytes(answer.body) if answer.status < 300 else []
        if {Order.CANCEL, Order.STOP} & set(said):
            raise Over
        self._orders += said

    def _upload(self, name: str, body: bytes) -> Generator[float, None, dict[str, Any]]:
        """Put a file into storage; what `files` of a report says of it. Raises: Failed, Over."""
        stored = {"name": name, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        wanted, url = json.dumps({"put": [stored]}).encode(), self._path(self._spec.files_url)
        asked = f"{self._spec.job}.{self._spec.attempt}.files.{secrets.token_hex(4)}"
        answer = yield from self._insist(
            lambda: self._line.post(url, wanted, self._signed(wanted, asked))
        )
        if answer.status != 200:
            raise Over
        slot = json.loads(answer.body)["put"][name]
        put = yield from self._insist(lambda: self._line.put(slot["url"], body, slot["headers"]))
        if put.status >= 300 and put.status != 412:
            why = f"storage answered {put.status} to the upload of {name}"
            raise Failed("upload.failed", why)
        return stored

    # --- the job

    def _work(self) -> Iterator[float]:
        offer = self._cue.offer
        yield GPU_S
        gpu = {"device": "cuda", "gpu": offer.gpu_name, "vram_mib": round(offer.vram_gb * 954)}
        yield from self._report(Fact.GPU_READY, **gpu, torch="none: this is a rehearsal")
        yield from self._say(f"rehearsal of {self._cue.part.fixture}: no GPU, no base, no training")
        yield from self._pull_images()
        yield from self._pull_model()
        begun = self._resumed()
        yield from self._report(Fact.FILES_POSITIONED, resumed=begun > 0, refused=[])
        yield START_S
        yield from self._train(begun)

    def _say(self, *lines: str) -> Iterator[float]:
        yield from self._report(Fact.LOG_LINES, lines=list(lines))

    def _pull_images(self) -> Iterator[float]:
        item = self._spec.dataset
        count = None
        if item.bytes <= PULLED_BYTES:
            got = yield from self._insist(lambda: self._line.get(item.url))
            if got.status != 200:
                raise Failed("download.failed", f"storage answered {got.status} to the dataset")
            if item.sha256 and hashlib.sha256(got.body).hexdigest() != item.sha256:
                raise Failed("dataset.corrupt", "its SHA-256 is another one", retryable=False)
            count = _photographs(got.body)
        for share in (0.3, 0.7):
            yield IMAGES_S / 3
            done = round(item.bytes * share)
            yield from self._report(Fact.IMAGES_PROGRESS, bytes=done, bytes_total=item.bytes)
        yield IMAGES_S / 3
        said = {"bytes": item.bytes, "seconds": IMAGES_S, "mbps": self._cue.offer.download_mbps}
        yield from self._report(
            Fact.IMAGES_READY, **said, **({} if count is None else {"images": count})
        )

    def _pull_model(self) -> Iterator[float]:
        parts = 6
        for part in range(1, parts + 1):
            yield MODEL_S / parts
            done = self._spec.base.bytes * part // parts
            said = {"bytes": done, "bytes_total": self._spec.base.bytes}
            if part < parts:
                yield from self._report(Fact.MODEL_PROGRESS, **said)
        size, mbps = self._spec.base.bytes, self._cue.offer.download_mbps
        yield from self._report(
            Fact.MODEL_READY, bytes=size, tensors=1131, seconds=MODEL_S, mbps=mbps
        )

    def _resumed(self) -> int:
        """The step of the newest checkpoint that the server offers."""
        for item in self._spec.resume:
            step = item.name.removeprefix("checkpoints/").partition("-")[0]
            if step.isdigit():
                return min(int(step), self._total - 1)
        return 0

    @property
    def _total(self) -> int:
        steps = self._spec.recipe.get("steps")
        return steps if type(steps) is int and steps > 0 else 1000

    def _train(self, begun: int) -> Iterator[float]:
        total = self._total
        rounds = min(REPORTS, total)
        speed = total / TRAINING_S
        first = round(self._loss(0), 5)
        yield from self._report(
            Fact.TRAINING_STARTED, total=total, step=begun, loss_first=first, parameters=3_188_736
        )
        fixture, best = self._cue.part.fixture, (math.inf, 0)
        before, saved = begun, begun / total
        for step in dict.fromkeys(
            round(total * number / rounds) for number in range(1, rounds + 1)
        ):
            if step <= begun:
                continue
            yield (step - before) / speed
            share, left = step / total, (total - step) / speed
            points = [[at, round(self._loss(at), 5), 1e-4] for at in range(before + 1, step + 1)]
            said = {"step": step, "total": total, "loss": points[-1][1], "lr": 1e-4}
            said |= {"steps_per_s": round(speed, 3), "eta_s": round(left, 1), "memory_mib": 9216}
            yield from self._report(Fact.TRAINING_PROGRESS, **said, points=points[-500:])
            before = step
            passed = [mark for mark in CHECKPOINTS if saved < mark <= share]
            if passed:
                saved = passed[-1]
                value = round(self._validation(step), 5)
                best = min(best, (value, step))
                yield from self._validated(step, value)
                yield from self._save(step, best[1] == step)
                if saved in SAMPLES:
                    yield from self._paint(step, share)
            yield from self._obey(step, share)
            if self._cue.first and share >= FAILS_AT:
                yield from self._fail(fixture, step)
            if fixture == rehearsal.FAILS and share >= FAILS_AT:
                why = f"the loss was no number at step {step} (rehearsed)"
                raise Failed("training.diverged", why, retryable=False)
        yield from self._deliver(first, best)

    def _fail(self, fixture: str, step: int) -> Iterator[float]:
        if fixture == rehearsal.OOM:
            why = f"CUDA out of memory at step {step}: tried to allocate 2.00 GiB (rehearsed)"
            yield from self._say(f"torch.OutOfMemoryError: {why}")
            raise Failed("trainer.oom", why)
        while fixture == rehearsal.HOST_DIES:
            yield 60.0  # it is never heard again, and costs money until it is destroyed

    def _obey(self, step: int, share: float) -> Iterator[float]:
        orders, self._orders = self._orders, []
        if Order.CHECKPOINT_NOW in orders:
            yield from self._save(step, best=False)
        if Order.SAMPLE_NOW in orders:
            yield from self._paint(step, share)

    def _validated(self, step: int, value: float) -> Iterator[float]:
        latest = {"validation_loss": value, "validation_stderr": 0.002}
        yield from self._report(Fact.TRAINING_PROGRESS, **latest, points=[{"step": step, **latest}])

    def _save(self, step: int, best: bool) -> Iterator[float]:
        """A checkpoint: its files, then its manifest, then the report."""
        folder = f"checkpoints/{step}-{secrets.token_hex(3)}/"
        stored = yield from self._upload(f"{folder}lora.safetensors", made_up.weights(self._chance))
        listed = {**stored, "name": "lora.safetensors"}
        manifest = {"job": self._spec.job, "attempt": self._spec.attempt, "step": step}
        text = json.dumps({**manifest, "files": [listed]}).encode()
        last = yield from self._upload(f"{folder}manifest.json", text)
        yield from self._report(
            Fact.TRAINING_CHECKPOINT, step=step, best=best, files=[stored, last]
        )

    def _paint(self, step: int, share: float) -> Iterator[float]:
        name = f"samples/{step:06d}-0.png"
        if name in self._files:
            return
        stored = yield from self._upload(name, made_up.picture(share, seed=0))
        self._files[name] = stored
        trigger = str(self._spec.recipe.get("trigger") or "the subject")
        said = {"step": step, "prompt": f"a photo of {trigger} (rehearsed)", "seed": 0}
        yield from self._report(Fact.TRAINING_SAMPLE, **said, **stored)

    def _deliver(self, first: float, best: tuple[float, int]) -> Iterator[float]:
        value, step = best
        result = {"loss_first": first, "loss_best": value, "best_step": step, "label": "validation"}
        result |= {"steps": self._total, "ended": "steps"}
        yield from self._report(Fact.TRAINING_COMPLETED, **result)
        spoilt = self._cue.first and self._cue.part.fixture == rehearsal.BAD_WEIGHTS
        weights = made_up.weights(self._chance, finite=not spoilt)
        stored = yield from self._upload("lora.safetensors", weights)
        log = yield from self._upload("training.log", b"a rehearsal: nothing was trained\n")
        files = [stored, *self._files.values(), log]
        yield from self._report(Fact.WEIGHTS_UPLOADED, files=files, **result)

    # --- numbers that look like a training's

    def _loss(self, step: int) -> float:
        noise = random.Random(f"{self._spec.job} {step}").gauss(0, 0.012)
        return max(0.02, 0.075 + 0.11 * math.exp(-4 * step / self._total) + noise)

    def _validation(self, step: int) -> float:
        share = step / self._total
        # the best is not the last: somewhat too much was trained
        return 0.082 + 0.1 * math.exp(-4 * share) + 0.02 * max(0.0, share - 0.75)


#: Reports that say how far everything moved.
_COUNTED = frozenset({Fact.IMAGES_PROGRESS, Fact.MODEL_PROGRESS, Fact.TRAINING_PROGRESS})


def _photographs(archive: bytes) -> int | None:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            return sum(name.lower().endswith(_PHOTOGRAPHS) for name in opened.namelist())
    except zipfile.BadZipFile:
        raise Failed("dataset.corrupt", "the zip cannot be read", retryable=False) from None
