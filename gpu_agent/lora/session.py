"""One training from plan to files: load, cache, train, choose, export."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from gpu_agent.lora import captions, checkpoint, compiled, curve, data, export, prior
from gpu_agent.lora.adapter import Adapter, Trainable
from gpu_agent.lora.cache import Cache, Sample, origin_of
from gpu_agent.lora.errors import JobError
from gpu_agent.lora.evaluate import Evaluator
from gpu_agent.lora.families.base import Conditions
from gpu_agent.lora.fit import CudaMeter, Fit, Meter
from gpu_agent.lora.loop import Loop
from gpu_agent.lora.paint import Painter
from gpu_agent.lora.plan import Plan
from gpu_agent.lora.ranks import Rank, share
from gpu_agent.lora.talk import Events, Orders, Pulse, Stopped, mebibytes_touched
from gpu_agent.recipe import Recipe

_log = logging.getLogger(__name__)

#: Recipe keys that may change between two attempts: the weights do not depend on them.
_BESIDE_THE_WEIGHTS = {
    "cache",
    "checkpoint_s",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
}
_MODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def train(
    plan: Plan,
    events: Events,
    orders: Orders,
    rank: Rank | None = None,
    meter: Meter | None = None,
) -> bool:
    """Train and write the result; False when stopped before the end.

    Args:
        rank: which of several processes this is; None where it is alone.
        meter: of the device's memory; the GPU's where there is one.

    Raises:
        TrainerError: it cannot go on.
    """
    try:
        return _train(plan, events, orders, rank, meter)
    except Stopped:
        return False


def _train(
    plan: Plan, events: Events, orders: Orders, rank: Rank | None, meter: Meter | None
) -> bool:
    """As `train`. Raises: Stopped, at a moment at which there was nothing to save."""
    pulse = Pulse(events, orders)
    job = plan.job
    _log.info("recipe: %s", json.dumps(job.recipe.to_dict()))
    for folder in (job.work_dir, job.output_dir):
        folder.mkdir(parents=True, exist_ok=True)
    accelerator = _accelerator(job.recipe, rank)
    dtype = _MODES[accelerator.mixed_precision]
    with pulse.watched("loading", mebibytes_touched):
        model = plan.family.load(job.base_file, job.work_dir, job.recipe, accelerator.device, dtype)
    if accelerator.device.type == "cuda":
        meter = CudaMeter(accelerator.device)
    fit = Fit(model, job.recipe, plan.family.name, meter)
    origin = origin_of(
        job.base_file,
        plan.family.name,
        job.recipe.base_precision,
        accelerator.mixed_precision,
        accelerator.device.type,
    )
    cache = Cache(model, job.recipe, job.work_dir / "cache", origin)
    regularization = list(plan.regularization)
    if job.recipe.prior_images and not regularization:
        fit.place()
        regularization = prior.painted(
            model, cache, job.recipe, job.work_dir / "prior", accelerator, pulse
        )
    samples = _samples(cache, [*data.distinct(plan.split), *regularization], pulse)
    prompts = _prompts(cache, job.recipe, pulse)
    empty = cache.text("")
    adapter = _trainable(plan, model)
    model.release_encoders(texts=not adapter.trains_texts)
    fit.place()
    painter = Painter(
        model,
        prompts,
        empty,
        adapter.encode,
        accelerator,
        job.output_dir,
        job.recipe,
        events,
        pulse,
    )
    checkpoints = checkpoint.Checkpoints(
        job.work_dir / "checkpoints", _belongs(plan), job.recipe.keep_checkpoints
    )
    held = [samples[picture.digest] for picture in plan.split.validation]
    loop = Loop(
        model=model,
        adapter=adapter,
        samples=[samples[picture.digest] for picture in plan.split.train],
        regularization=[samples[picture.digest] for picture in regularization],
        empty=empty,
        recipe=job.recipe,
        accelerator=accelerator,
        evaluator=Evaluator(
            model,
            held,
            job.recipe,
            accelerator.device,
            accelerator.autocast,
            adapter.encode,
            partial(pulse.beat, "validating"),
            lambda: fit.validated,
        ),
        checkpoints=checkpoints,
        events=events,
        orders=orders,
        pulse=pulse,
        fit=fit,
        draw_samples=painter.paint,
    )
    fit.try_out(loop.try_pass)
    shapes = {sample.bucket for sample in samples.values()}
    compiles = compiled.pays(job.recipe, fit.way, accelerator.device, len(shapes))
    if compiles:
        compiles = compiled.compile_blocks(model, job.work_dir, fit.way)
    refused = None
    if accelerator.is_main_process:
        refused = _resume(loop, checkpoints, job.resume_dir)
        if loop.step == 0:
            checkpoints.clear()
            painter.clear()
    if accelerator.num_processes > 1:
        begun = share(accelerator, loop.progress())
        if not accelerator.is_main_process:
            loop.resume(begun)
            return loop.run()
    if 0 not in loop.validations:
        loop.validate()
    events.emit(
        "started",
        **_told(plan),
        loss_first=loop.validations[0].loss,
        parameters=sum(parameter.numel() for parameter in adapter.parameters),
        regularization=len(regularization),
        step=loop.step,
        resume_refused=refused,
        warnings=[*plan.warnings, *cache.warnings],
        device=accelerator.device.type,
        processes=accelerator.num_processes,
        precision=accelerator.mixed_precision,
        fit={**fit.told(), "compile": compiles},
    )
    if not loop.run():
        return False
    _finish(plan, loop, checkpoints, adapter, painter, events)
    return True


def _samples(cache: Cache, pictures: Sequence[data.Picture], pulse: Pulse) -> dict[str, Sample]:
    """By digest. Raises: Stopped."""
    cache.expect(pictures)
    samples = {}
    for number, picture in enumerate(pictures):
        pulse.beat("caching", number, len(pictures))
        samples[picture.digest] = cache.sample(picture)
    return samples


def _prompts(cache: Cache, recipe: Recipe, pulse: Pulse) -> dict[str, Conditions]:
    """What sample images show. Raises: Stopped."""
    prompts = recipe.sample_prompts or (captions.template(recipe),)
    encoded = {}
    for number, prompt in enumerate(prompts):
        pulse.beat("encoding", number, len(prompts))
        encoded[prompt] = cache.text(prompt)
    return encoded


def _told(plan: Plan) -> dict[str, Any]:
    """Of the plan, what a training says of itself when it starts."""
    return {
        "total": plan.job.recipe.steps,
        "images": len(plan.split.train),
        "buckets": data.count_buckets(plan.split.train),
        "label": plan.split.label,
    }


def _finish(
    plan: Plan,
    loop: Loop,
    checkpoints: checkpoint.Checkpoints,
    adapter: Trainable,
    painter: Painter,
    events: Events,
) -> None:
    progress = loop.progress()
    best = progress.best_step or progress.step
    tensors = checkpoints.best_lora(progress)
    folder = plan.job.output_dir
    files = export.write(
        folder,
        tensors,
        family=plan.family,
        recipe=plan.job.recipe,
        configs=adapter.configs,
        pictures=plan.split.train,
        steps=best,
    )
    files += curve.write(folder, loop.history(), loop.validations)
    adapter.fill(tensors)
    painter.paint(best)
    painter.put_together(best)
    events.emit(
        "completed",
        files=[
            {"name": str(file.relative_to(folder)), "path": str(file)}
            for file in [*files, *painter.files]
        ],
        loss_first=loop.validations[0].loss,
        loss_best=loop.validations[best].loss,
        best_step=best,
        steps=progress.step,
        ended=loop.ended,
        label=plan.split.label,
    )


def _accelerator(recipe: Recipe, rank: Rank | None) -> Accelerator:
    """The device and the precision that the recipe asks for, or that suit the machine.

    Raises:
        JobError: the device cannot do it.
    """
    gpu = torch.cuda.is_available()
    wanted = recipe.precision
    if wanted == "auto":
        wanted = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if gpu else "fp32"
    if wanted == "fp16" and not gpu:
        raise JobError("recipe.invalid", "precision fp16 needs a GPU; take bf16, fp32 or auto")
    if gpu:
        # TensorFloat-32 where something is left in fp32 (the VAE)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if rank is not None:
        rank.join("nccl" if gpu else "gloo")
    return Accelerator(mixed_precision="no" if wanted == "fp32" else wanted, cpu=not gpu)


def _trainable(plan: Plan, model: Any) -> Trainable:
    """What the recipe trains of a model. Raises: DatasetError, `dataset.caption`."""
    recipe = plan.job.recipe
    if recipe.adapter != "embedding":
        return Adapter(model, recipe)
    from gpu_agent.lora.inversion import Inversion

    return Inversion(model, recipe, [picture.caption for picture in plan.split.train])


def _resume(loop: Loop, checkpoints: checkpoint.Checkpoints, folder: Path | None) -> str | None:
    """Go on from the newest usable checkpoint; why each one before it was not, if any was.

    A checkpoint that cannot be used costs the steps that it held, not the training.
    """
    if folder is None:
        return None
    refused = []
    for found in checkpoint.candidates(folder):
        try:
            loop.resume(checkpoints.adopt(found))
        except checkpoint.Unusable as error:
            _log.warning("not continued: %s", error)
            refused.append(str(error))
        else:
            return "; ".join(refused) or None
    return "; ".join(refused) or f"there is no checkpoint in {folder.name}"


def _belongs(plan: Plan) -> checkpoint.Belongs:
    pictures = [
        (picture.digest, picture.mask_digest, picture.caption, picture.bucket)
        for part in (plan.split.train, plan.split.validation, plan.regularization)
        for picture in part
    ]
    recipe = plan.job.recipe.to_dict()
    return checkpoint.Belongs(
        recipe=_digest({key: recipe[key] for key in recipe.keys() - _BESIDE_THE_WEIGHTS}),
        dataset=_digest(pictures),
        base=plan.base_digest,
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
