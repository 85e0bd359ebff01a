"""New training: photographs go from the browser to the store, then an order is placed.

The page asks for what `/v1` gives, with a session in place of an API key: so its answers to the
script are the API's own JSON and problems, but for parts of the page, which are HTML.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from flask import Blueprint, Response, g, render_template, request, url_for
from pydantic import BaseModel, ValidationError
from werkzeug.wrappers import Response as AnyResponse

from gpu_agent.recipe import FAMILIES, QUALITIES, Recipe, RecipeError
from orchestrator.api import datasets, jobs, present, problems, schemas
from orchestrator.api.bases import Bases, BasesQuery
from orchestrator.api.estimates import EstimateIn, Estimates
from orchestrator.api.problems import Refusal
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from state.errors import StokerError
from state.events import Dataset, DatasetStatus
from state.job import Job
from tasks import dataset as checks

#: Families of base models as their users call them.
FAMILY_NAMES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL (and Pony, Illustrious, NoobAI)",
    "sd3": "Stable Diffusion 3 and 3.5",
    "flux": "FLUX.1",
    "lumina2": "Lumina Image 2.0",
    "hunyuanimage": "HunyuanImage 2.1",
    "anima": "Anima",
}
QUALITY_WORDS = {
    "draft": "a quick look",
    "standard": "good for most subjects",
    "fine": "the best likeness; takes longest",
}
#: Recipe keys that have a field of their own; the others are said as JSON.
FIELDS = (
    "quality", "trigger", "steps", "resolution", "rank", "learning_rate", "adapter", "seed",
    "sample_prompts", "flip",
)  # fmt: skip
#: Those whose value follows quality and family where nobody says it.
FOLLOWING = ("steps", "resolution", "rank", "learning_rate")
#: What the script can tell of a file before it is sent; the server looks again.
RULES: Mapping[str, Any] = {
    "suffixes": sorted(checks.IMAGE_SUFFIXES),
    "mask": checks.MASK,
    "list": checks.LISTED,
    "folder": checks.REGULARIZATION,
    "min_side": checks.MIN_SIDE,
    "small_side": checks.SMALL_SIDE,
    "max_pixels": checks.MAX_PIXELS,
    "max_caption": checks.MAX_CAPTION,
    "max_bytes": schemas.MAX_UPLOAD,
    "max_files": checks.MAX_ENTRIES,
}

Model = TypeVar("Model", bound=BaseModel)
View = Callable[..., AnyResponse | str]


def _as_problem(view: View) -> View:
    """For what the script asks: a refusal is the API's problem document, not a page."""

    @functools.wraps(view)
    def answered(**arguments: Any) -> AnyResponse | str:
        try:
            return view(**arguments)
        except ValidationError as error:
            return problems.invalid(error)
        except (Refusal, StokerError) as error:
            return problems.respond(problems.refusal_of(error))

    return answered


def _said(model: type[Model]) -> Model:
    """The request's body. Raises: ValidationError."""
    return model.model_validate_json(request.get_data())


def draft_of(job: Job) -> dict[str, Any]:
    """An order like that of `job`, with no more of the recipe than differs from its dial."""
    order = job.request
    said = {key: order.recipe[key] for key in ("quality", "trigger") if order.recipe.get(key)}
    try:
        usual = Recipe.from_dict(said, order.base_family).to_dict()
    except RecipeError:  # an older version's key, say
        usual = {}
    changed = {key: value for key, value in order.recipe.items() if usual.get(key) != value}
    return {
        "dataset_id": order.dataset_id,
        "base": order.base,
        "method": order.method,
        "base_family": order.base_family,
        "recipe": {**said, **changed},
        "gpu": {**asdict(order.gpu), "gpu_names": list(order.gpu.gpu_names)},
        "max_cost": order.max_cost,
        "max_attempts": order.max_attempts,
        "interruptible": order.interruptible,
        "hedge": order.hedge,
        "metadata": dict(order.metadata),
        **({"webhook": {"url": order.webhook_url}} if order.webhook_url else {}),
    }


def plain_draft() -> dict[str, Any]:
    """What the form says before anybody touched it."""
    order = schemas.JobIn(dataset_id="", base="", recipe={"quality": "standard"})
    said = order.model_dump(mode="json", exclude={"dataset_id"}, exclude_none=True)
    return {**said, "base_family": "sdxl"}


def _usual() -> dict[str, dict[str, dict[str, Any]]]:
    """By family and quality: what a field means that is left empty."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for family in FAMILIES:
        recipes = {name: Recipe.from_dict({"quality": name}, family) for name in QUALITIES}
        found[family] = {
            name: {key: getattr(recipe, key) for key in FOLLOWING}
            for name, recipe in recipes.items()
        }
    return found


def register(pages: Blueprint, deps: Deps, waker: Waker, estimates: Estimates) -> None:
    """Put the page's views into `pages`."""
    orders, models, usual = jobs.Orders(deps, waker), Bases(deps), _usual()

    def chosen(draft: Mapping[str, Any]) -> Dataset | None:
        """The photographs that the page begins with: an earlier upload's, or a job's."""
        dataset_id = request.args.get("dataset") or draft.get("dataset_id")
        if not dataset_id:
            return None
        try:
            with deps.store.transaction() as tx:
                found = datasets.visible(tx, dataset_id, g.caller)
        except StokerError:  # too old, or nobody's
            return None
        return None if found.status is DatasetStatus.OPEN else found

    @pages.get("/new")
    def new() -> str:
        draft, origin = plain_draft(), request.args.get("from", "")
        if origin:
            with deps.store.transaction() as tx:
                draft = draft_of(jobs.visible(tx, origin, g.caller))
        dataset = chosen(draft)
        recipe = draft["recipe"]
        return render_template(
            "new.html",
            draft=draft,
            origin=origin,
            dataset=dataset,
            other={key: value for key, value in recipe.items() if key not in FIELDS},
            advanced=bool(recipe.keys() - {"quality", "trigger"}),
            families=FAMILY_NAMES,
            qualities={name: (QUALITIES[name], QUALITY_WORDS[name]) for name in QUALITIES},
            rules=RULES,
            usual=usual,
        )

    @pages.post("/new/datasets", endpoint="new_dataset")
    @_as_problem
    def announce() -> AnyResponse:
        shown = datasets.announce(deps, _said(schemas.DatasetIn), g.caller)
        return present.answer(shown, 201)

    @pages.post("/new/datasets/<dataset_id>/uploads", endpoint="new_uploads")
    @_as_problem
    def renew(dataset_id: str) -> AnyResponse:
        body = _said(schemas.UploadsIn)
        with deps.store.transaction() as tx:
            dataset = datasets.visible(tx, dataset_id, g.caller)
        return present.answer(schemas.Uploads(data=datasets.renew(deps, dataset, body.names)))

    @pages.post("/new/datasets/<dataset_id>/seal", endpoint="new_seal")
    @_as_problem
    def seal(dataset_id: str) -> str:
        dataset = datasets.sealed(deps, waker, dataset_id, g.caller)
        return render_template("new_dataset.html", dataset=dataset)

    @pages.get("/new/datasets/<dataset_id>", endpoint="new_report")
    @_as_problem
    def report(dataset_id: str) -> str:
        with deps.store.transaction() as tx:
            dataset = datasets.visible(tx, dataset_id, g.caller)
        return render_template("new_dataset.html", dataset=dataset)

    @pages.post("/new/base", endpoint="new_base")
    @_as_problem
    def base() -> AnyResponse:
        return present.answer(models.found(_said(BasesQuery).link))

    @pages.post("/new/estimate", endpoint="new_estimate")
    @_as_problem
    def estimate() -> str:
        found = jobs.estimated(deps, estimates, g.caller, _said(EstimateIn))
        return render_template("new_estimate.html", estimate=found)

    @pages.post("/new", endpoint="new_start")
    @_as_problem
    def start() -> AnyResponse:
        order = jobs.check(
            _said(schemas.JobIn),
            private_bases=deps.settings.private_bases,
            private_webhooks=deps.settings.private_webhooks,
        )
        header = schemas.JobHeader.model_validate(dict(request.headers))
        shown, _ = orders.take(order, g.caller, header.idempotency_key, request.get_json())
        answer = {
            "job": shown.id,
            "url": url_for("pages.job", job_id=shown.id),
            "webhook_secret": shown.webhook_secret,
        }
        return Response(json.dumps(answer), status=202, mimetype="application/json")
