"""`/v1/datasets`: announce files, PUT them, seal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from flask_openapi.models.tag import Tag

from orchestrator.api import auth, present, schemas
from orchestrator.api.auth import Caller
from orchestrator.api.ids import new_id, plausible
from orchestrator.api.problems import Refusal
from orchestrator.deps import Deps
from orchestrator.waker import Waker
from state import record
from state.errors import NotFound
from state.events import Dataset, DatasetStatus
from state.store import Transaction
from tasks.dataset import upload_key

#: How long an upload URL lasts; later ones are asked for with `…/uploads`.
UPLOAD_SPAN_S = 3600
#: What an uploaded zip is called.
ZIP_NAME = "images.zip"


def visible(tx: Transaction, dataset_id: str, caller: Caller) -> Dataset:
    """Raises: NotFound, also for what belongs to somebody else."""
    if plausible(dataset_id):
        dataset = tx.dataset(dataset_id)
        if caller.sees(dataset.owner):
            return dataset
    raise NotFound(f"no dataset {dataset_id[:64]!r}")


def announced(body: schemas.DatasetIn) -> tuple[Mapping[str, Any], ...]:
    """What the customer will upload, as it is stored."""
    if body.zip is not None:
        return ({"name": ZIP_NAME, "bytes": body.zip.bytes, "sha256": body.zip.sha256},)
    return tuple(item.model_dump() for item in body.files or ())


def uploads(
    deps: Deps, dataset: Dataset, names: Collection[str] | None = None
) -> list[schemas.Upload]:
    """A presigned PUT for each file of `names`, or for every file."""
    expires_at = deps.clock() + timedelta(seconds=UPLOAD_SPAN_S)
    made = []
    for index, item in enumerate(dataset.files):
        if names is not None and item["name"] not in names:
            continue
        upload = deps.storage.presign_put(
            upload_key(dataset.id, index), bytes=item["bytes"], expires_s=UPLOAD_SPAN_S
        )
        made.append(
            schemas.Upload(
                name=item["name"],
                url=upload.url,
                headers=dict(upload.headers),
                expires_at=expires_at,
            )
        )
    return made


def renew(deps: Deps, dataset: Dataset, names: Sequence[str] | None) -> list[schemas.Upload]:
    """Fresh upload URLs of an open dataset. Raises: Refusal 409 or 422."""
    if dataset.status is not DatasetStatus.OPEN:
        raise Refusal(409, "sealed", f"dataset {dataset.id} is {dataset.status}")
    known = {item["name"] for item in dataset.files}
    strange = [
        (f"/names/{index}", "was not announced")
        for index, name in enumerate(names or ())
        if name not in known
    ]
    if strange:
        raise Refusal(422, "unknown_file", "the dataset has no such file", errors=strange)
    return uploads(deps, dataset, None if names is None else set(names))


def announce(deps: Deps, body: schemas.DatasetIn, caller: Caller) -> schemas.NewDataset:
    """A new dataset, and a presigned PUT for each of its files."""
    now = deps.clock()
    dataset = Dataset(
        id=new_id("ds", now), owner=caller.owner, created_at=now, files=announced(body)
    )
    with deps.store.transaction() as tx:
        tx.add_dataset(dataset)
    return schemas.NewDataset(**present.dataset(dataset), uploads=uploads(deps, dataset))


def sealed(deps: Deps, waker: Waker, dataset_id: str, caller: Caller) -> Dataset:
    """Ends the uploads and has the zip built; again changes nothing. Raises: NotFound."""
    with deps.store.transaction() as tx:
        dataset = visible(tx, dataset_id, caller)
        dataset = record.seal(tx, dataset.id, deps.clock())
    if dataset.status is DatasetStatus.BUILDING:
        waker(dataset.id, ["build"])
    return dataset


def datasets(deps: Deps, waker: Waker) -> APIBlueprint:
    api = APIBlueprint(
        "datasets",
        __name__,
        url_prefix="/v1/datasets",
        abp_tags=[Tag(name="datasets")],
        abp_security=[{"key": []}],
    )
    api.before_request(lambda: auth.admit(deps.store))

    @api.post("", operation_id="create_dataset", responses={"201": schemas.NewDataset})
    def create(body: schemas.DatasetIn) -> Response:
        """Announce photographs, or one zip; the answer says where to PUT them"""
        shown = announce(deps, body, auth.caller())
        return present.answer(shown, 201, {"Location": f"/v1/datasets/{shown.id}"})

    @api.get("/<dataset_id>", operation_id="get_dataset", responses={"200": schemas.Dataset})
    def show(path: schemas.DatasetPath) -> Response:
        """Its status, and what became of each image"""
        with deps.store.transaction() as tx:
            dataset = visible(tx, path.dataset_id, auth.caller())
        return present.answer(schemas.Dataset(**present.dataset(dataset)))

    @api.post(
        "/<dataset_id>/uploads", operation_id="renew_uploads", responses={"200": schemas.Uploads}
    )
    def fresh(path: schemas.DatasetPath, body: schemas.UploadsIn) -> Response:
        """Fresh upload URLs, for images that come later"""
        with deps.store.transaction() as tx:
            dataset = visible(tx, path.dataset_id, auth.caller())
        return present.answer(schemas.Uploads(data=renew(deps, dataset, body.names)))

    @api.post("/<dataset_id>/seal", operation_id="seal_dataset", responses={"202": schemas.Dataset})
    def seal(path: schemas.DatasetPath) -> Response:
        """No more uploads: check the images and build the zip"""
        dataset = sealed(deps, waker, path.dataset_id, auth.caller())
        return present.answer(schemas.Dataset(**present.dataset(dataset)), 202)

    return api
