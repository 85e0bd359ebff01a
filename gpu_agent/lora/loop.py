"""The training loop. No step waits for the GPU: losses stay there until a report is due."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_agent.lora import choose, draws, ema, optimizers
from gpu_agent.lora.adapter import Trainable
from gpu_agent.lora.cache import Sample, move, move_conditions
from gpu_agent.lora.checkpoint import Checkpoints, Progress, Saver, Unusable
from gpu_agent.lora.choose import Validation
from gpu_agent.lora.errors import TrainingError
from gpu_agent.lora.evaluate import Evaluator
from gpu_agent.lora.families.base import Conditions, Model
from gpu_agent.lora.fit import Fit
from gpu_agent.lora.objective import Density
from gpu_agent.lora.optimizers import learning_rate
from gpu_agent.lora.talk import Events, Orders, Pulse, Stopped
from gpu_agent.recipe import Recipe

#: Seconds between two reports.
_REPORT_EVERY = 1.0
#: Points of the loss curve in one report; more are averaged into as many.
_MOST_POINTS = 20


@dataclass(frozen=True)
class Deck:
    """Samples that batches are drawn from, and how much their loss counts."""

    name: str
    samples: Sequence[Sample]
    batches: draws.Batches
    weight: float


@dataclass(frozen=True)
class _Luck:
    """What is drawn for the n images of a batch; `noise` is (2, n, c, …, h, w)."""

    mirrored: list[float]
    dropped: list[float]
    quantiles: Any
    said: list[float]
    noise: Any

    @classmethod
    def at(cls, place: Any, batch: Sequence[Sample]) -> _Luck:
        size = len(batch)
        doubled, *sides = batch[0].moments.shape[1:]
        return cls(
            mirrored=torch.rand(size, generator=place).tolist(),
            dropped=torch.rand(size, generator=place).tolist(),
            quantiles=torch.rand(size, generator=place),
            said=torch.rand(size, generator=place).tolist(),
            noise=torch.randn((2, size, doubled // 2, *sides), generator=place),
        )

    def of(self, some: slice) -> _Luck:
        return _Luck(
            mirrored=self.mirrored[some],
            dropped=self.dropped[some],
            quantiles=self.quantiles[some],
            said=self.said[some],
            noise=self.noise[:, some],
        )


class Loop:
    """Trains an adapter until the last step, or until patience is over or a stop is ordered.

    Several processes share out the images of every step and sum their gradients, so each of them
    has the same weights after it. The first one alone reports, validates, saves, paints and hears
    orders; the others wait for it at the end of their next step.

    Args:
        accelerator: an `accelerate.Accelerator`; it owns device, autocast and gradient scaling.
        regularization: images of the subject's class. After each pass of `samples` comes an
            equally large one of these, whose gradients count `prior_weight` and are added.
        empty: the conditions of no caption at all.
        draw_samples: called with the step when sample images are due.
    """

    def __init__(
        self,
        *,
        model: Model,
        adapter: Trainable,
        samples: Sequence[Sample],
        regularization: Sequence[Sample],
        empty: Conditions,
        recipe: Recipe,
        accelerator: Any,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        events: Events,
        orders: Orders,
        pulse: Pulse,
        fit: Fit,
        draw_samples: Callable[[int], None],
    ) -> None:
        self._model = model
        self._adapter = adapter
        self._empty = empty
        self._density = Density.of(recipe)
        self._recipe = recipe
        self._accelerator = accelerator
        self._evaluator = evaluator
        self._saver = Saver(checkpoints, self._saved)
        self._events = events
        self._orders = orders
        self._pulse = pulse
        self._fit = fit
        self._draw_samples = draw_samples
        self._device = accelerator.device
        self._optimizer = accelerator.prepare(
            optimizers.make(adapter.groups(), recipe, self._device)
        )
        self._kept = ema.kept(adapter, self._optimizer, recipe)
        self._decks = [
            Deck(
                name=name,
                samples=some,
                batches=draws.Batches(
                    tuple(sample.bucket for sample in some), recipe.batch_size, recipe.seed
                ),
                weight=weight,
            )
            for name, some, weight in (
                ("step", samples, 1.0),
                ("prior", regularization, recipe.prior_weight),
            )
            if some
        ]
        self._losses = torch.zeros(recipe.steps, device=self._device)
        self._norms = torch.zeros(recipe.steps, device=self._device)
        self._reported = 0
        self._report_due = 0.0
        self._saved_step = 0
        self._painted_step = 0
        self.step = 0
        self.validations: dict[int, Validation] = {}

    def resume(self, progress: Progress) -> None:
        """Continue from a checkpoint. Raises: Unusable, and nothing of it was taken."""
        state, untouched = progress.state, self._adapter.tensors()
        try:
            losses, norms = (state[key].to(self._device) for key in ("losses", "norms"))
            painted = int(state["painted"])
            self._kept.resume(progress.lora, state["trained"])
            # empty where the other machine trained in bf16
            if self._accelerator.scaler is not None and state["scaler"]:
                self._accelerator.scaler.load_state_dict(state["scaler"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            self._kept.resume(untouched, {})
            raise Unusable(
                f"the checkpoint of step {progress.step} does not fit: {error}"
            ) from error
        self._losses[: progress.step] = losses
        self._norms[: progress.step] = norms
        self._painted_step = painted
        self.validations = dict(progress.validations)
        self.step = self._reported = self._saved_step = progress.step

    def run(self) -> bool:
        """Train; True when all is done, False when stopped (a checkpoint is written)."""
        self._now = self._report_due = self._saved_at = time.monotonic()
        if not self._accelerator.is_main_process:
            while self.step < self._recipe.steps:
                self._one_step()
            return True
        if self.step:
            self._between_steps()  # what was due when it was stopped, and was left
        while not (self._is_over() or self._orders.stop):
            self._one_step()
            self._report()
            self._between_steps()
        self._report(at_once=True)
        if self._saved_step != self.step:
            self._save()
        self._saver.wait()
        return self._is_over() and self.step in self.validations

    def try_pass(self) -> None:
        """One pass forward and back at the largest shape there is; nothing is learned from it."""
        everything = [sample for deck in self._decks for sample in deck.samples]
        largest = max(everything, key=lambda sample: sample.bucket[0] * sample.bucket[1])
        batch = [largest] * self._fit.way.images
        try:
            self._accelerator.backward(
                self._loss(batch, _Luck.at(draws.generator(self._recipe.seed, "try"), batch))
            )
        finally:
            self._optimizer.zero_grad()

    @property
    def ended(self) -> str:
        """Why there are no more steps: `steps`, all are done, or `patience`."""
        return "steps" if self.step == self._recipe.steps else "patience"

    def validate(self) -> Validation:
        """Measure the present weights, as they would be kept, and say so.

        Raises:
            TrainingError: `training.diverged`.
            Stopped: a stop was ordered before it was done.
        """
        with self._kept.shown():
            seen = self._evaluator.measure(self.validations.get(0))
        if not math.isfinite(seen.loss):
            raise _diverged(self.step)
        self.validations[self.step] = seen
        self._events.emit(
            "validation", step=self.step, loss=seen.loss, stderr=seen.stderr, levels=seen.levels
        )
        return seen

    def progress(self) -> Progress:
        """A copy on the host, of which the training can go away."""
        scaler = self._accelerator.scaler
        return Progress(
            step=self.step,
            lora=self._kept.tensors(),
            state={
                "trained": self._kept.trained(),
                "optimizer": _copied(self._optimizer.state_dict()),
                "scaler": scaler.state_dict() if scaler is not None else {},
                "losses": self._losses[: self.step].cpu().clone(),
                "norms": self._norms[: self.step].cpu().clone(),
                "painted": self._painted_step,
            },
            validations=dict(self.validations),
        )

    def history(self) -> list[tuple[int, float, float, float]]:
        """Step (from 1), training loss, learning rate and gradient norm of every step done."""
        losses, norms = (kept[: self.step].tolist() for kept in (self._losses, self._norms))
        return [
            (number, loss, learning_rate(self._recipe, number - 1), norm)
            for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1)
        ]

    # --- one step -----------------------------------------------------------------------------

    def _one_step(self) -> None:
        optimizers.set_rates(self._optimizer, self._recipe, self.step)
        while not self._has_gradients():
            self._fit.step_down()
            self._optimizer.zero_grad()
            self._losses[self.step].zero_()
        if self._accelerator.num_processes > 1:
            self._add_up()
        parameters = self._adapter.parameters
        norm = self._accelerator.clip_grad_norm_(parameters, self._recipe.max_grad_norm)
        self._norms[self.step] = norm
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._adapter.settle()
        self.step += 1
        self._kept.follow(self.step)

    def _has_gradients(self) -> bool:
        """Compute those of one step; False where memory did not do."""
        parts = self._recipe.gradient_accumulation
        try:
            for part in range(parts):
                if part:
                    self._pulse.say("training", part, parts)
                for deck in self._decks:
                    for loss in self._losses_of(deck, self.step, part):
                        share = loss * (deck.weight / parts)
                        self._accelerator.backward(share)
                        self._losses[self.step] += share.detach()
        except torch.OutOfMemoryError:
            return False
        return True

    def _add_up(self) -> None:
        """Sum the gradients and the loss of this step over all processes."""
        parameters = self._adapter.parameters
        for parameter in parameters:
            if parameter.grad is None:  # this process had no image in this step
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        told = [*(gradient.flatten() for gradient in gradients), self._losses[self.step, None]]
        summed = self._accelerator.reduce(torch.cat(told), reduction="sum")
        *parts, self._losses[self.step] = summed.split([len(one) for one in told])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _losses_of(self, deck: Deck, step: int, part: int) -> Iterator[Any]:
        """This process's share of the mean loss of a batch, in as many terms as memory asks for."""
        index = step * self._recipe.gradient_accumulation + part
        batch = [deck.samples[number] for number in deck.batches.at(index)]
        # everyone draws for all, so that an image's draws do not depend on who takes it
        luck = _Luck.at(draws.generator(self._recipe.seed, deck.name, index), batch)
        mine, at_once = range(len(batch))[self._share(part)], self._fit.way.images
        for start in range(0, len(mine), at_once):
            some = mine[start : start + at_once]
            these = slice(some.start, some.stop, some.step)
            yield self._loss(batch[these], luck.of(these)) / len(batch)

    def _loss(self, batch: Sequence[Sample], luck: _Luck) -> Any:
        """The summed loss of some images of one shape."""
        recipe = self._recipe
        views = [1 if recipe.flip and turn < 0.5 else 0 for turn in luck.mirrored]
        moments = [sample.moments[view] for sample, view in zip(batch, views, strict=True)]
        conditions = [
            sample.conditions[int(turn * len(sample.conditions))]
            for sample, turn in zip(batch, luck.said, strict=True)
        ]
        conditions = [
            {**told, **self._empty} if turn < recipe.caption_dropout else told
            for told, turn in zip(conditions, luck.dropped, strict=True)
        ]
        texts = [
            "" if drop < recipe.caption_dropout else sample.texts[int(turn * len(sample.texts))]
            for sample, drop, turn in zip(batch, luck.dropped, luck.said, strict=True)
        ]
        mask = None
        if recipe.masked_loss:
            mask = move(
                [sample.mask[view] for sample, view in zip(batch, views, strict=True)],
                self._device,
            )
        spread, noise = move(list(luck.noise), self._device)
        latents = self._model.draw_latents(move(moments, self._device), spread)
        width, height = batch[0].bucket
        (levels,) = move([self._density.levels(luck.quantiles, width * height)], self._device)
        with self._accelerator.autocast():
            told = {**move_conditions(conditions, self._device), **self._adapter.encode(texts)}
            losses = self._model.losses(latents, noise, levels, told, mask)
        return (losses * self._model.objective.weights(levels, recipe)).sum()

    def _share(self, part: int) -> slice:
        """Which images of a batch this process takes: the images of a step go round."""
        count = self._accelerator.num_processes
        before = part * self._recipe.batch_size
        return slice((self._accelerator.process_index - before) % count, None, count)

    # --- between steps ------------------------------------------------------------------------

    def _between_steps(self) -> None:
        """Validate, save and paint where that is due or ordered.

        A stop leaves the validation and the painting to whoever goes on from the checkpoint.
        """
        validate = self._is_due(self._recipe.validation_every) and self.step not in self.validations
        save = self._orders.take_checkpoint() or validate or self._is_unsaved_for_long()
        paint = self._wants_samples()
        if not (save or paint):
            return
        self._report(at_once=True)
        with contextlib.suppress(Stopped):
            if validate:
                self.validate()
            if save:
                self._save()
            if paint:
                with self._kept.shown():
                    self._draw_samples(self.step)
                self._painted_step = self.step
        # this pause is not the training's speed
        self._now = time.monotonic()

    def _is_over(self) -> bool:
        patience = self._recipe.patience
        waited = choose.waited(self.validations)
        return self.step == self._recipe.steps or 0 < patience <= waited

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self._recipe.steps)

    def _is_unsaved_for_long(self) -> bool:
        return 0 < self._recipe.checkpoint_s <= time.monotonic() - self._saved_at

    def _wants_samples(self) -> bool:
        # the last step's samples are drawn from the best weights, by whoever called us
        fresh = self._painted_step < self.step < self._recipe.steps
        due = self._is_due(self._recipe.sample_every) and fresh
        return self._orders.take_sample() or due

    def _save(self) -> None:
        self._pulse.say("saving", self.step, self._recipe.steps)
        self._saver.save(self.progress())
        self._saved_step, self._saved_at = self.step, time.monotonic()

    def _saved(self, progress: Progress, path: Path) -> None:
        best = progress.best_step == progress.step
        self._events.emit("checkpoint", step=progress.step, path=str(path), best=best)

    def _report(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._reported == self.step or (now < self._report_due and not at_once):
            return
        since = slice(self._reported, self.step)
        losses, norms = (kept[since].tolist() for kept in (self._losses, self._norms))
        for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), self._reported + 1):
            # a scaler leaves steps out whose gradients were too long for half precision
            scaled = self._accelerator.scaler is not None
            if not (math.isfinite(loss) and (scaled or math.isfinite(norm))):
                raise _diverged(number)
        speed = len(losses) / max(now - self._now, 1e-9)
        beside = {"steps_per_s": round(speed, 3), "memory_mib": _memory_mib(self._device)}
        self._events.emit(
            "progress",
            step=self.step,
            total=self._recipe.steps,
            loss=sum(losses) / len(losses),
            lr=learning_rate(self._recipe, self.step - 1),
            gradient_norm=_finite(norms[-1]),
            **beside,
            eta_s=round((self._recipe.steps - self.step) / speed, 1),
            points=[*self._points(losses, norms), {"step": self.step, **beside}],
        )
        self._reported = self.step
        self._now = now
        self._report_due = now + _REPORT_EVERY

    def _points(self, losses: Sequence[float], norms: Sequence[float]) -> list[list[float | None]]:
        """Step, loss, learning rate and gradient norm; of several steps in one point the means."""
        size = -(-len(losses) // _MOST_POINTS)
        points = []
        for start in range(0, len(losses), size):
            some = losses[start : start + size]
            norm = _finite(sum(norms[start : start + size]) / len(some))
            at = self._reported + start + len(some)
            rate = learning_rate(self._recipe, at - 1)
            points.append([at, sum(some) / len(some), rate, norm])
        return points


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _memory_mib(device: Any) -> int:
    """The most that was in use so far: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)) >> 20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most >> (20 if sys.platform == "darwin" else 10)


def _copied(value: Any) -> Any:
    """`value` with copies on the host in the place of its tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value


def _diverged(step: int) -> TrainingError:
    return TrainingError(
        "training.diverged",
        f"the loss or its gradient is no number any more in step {step};"
        " a lower learning rate may help",
    )
