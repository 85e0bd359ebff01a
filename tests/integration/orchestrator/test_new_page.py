"""The page New training: what its script asks, with a session in place of a key."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from typing import Any

import pytest

from infra.models import FoundBase
from orchestrator.app import create_app
from orchestrator.dashboard.new import draft_of
from state.events import DatasetStatus
from state.memory import MemoryStore

FILE = {"name": "dog.jpg", "bytes": 1000, "sha256": "0" * 64}
ORDER = {
    "base": "civitai:128713",
    "base_family": "sdxl",
    "recipe": {"quality": "draft", "trigger": "ohwx"},
    "max_cost": 3_000_000,
}


@pytest.fixture
def store() -> MemoryStore:
    """The stores are compared where the API is tested; a page asks the same functions."""
    return MemoryStore()


@pytest.fixture
def browser(edge: Any) -> Any:
    return edge.page()


@pytest.fixture
def ask(edge: Any, browser: Any) -> Any:
    """A request as the page's script makes it."""
    headers = {"X-CSRFToken": edge.csrf_of(browser.get("/new")), "HX-Request": "true"}

    def post(path: str, body: Any = None, **more: str) -> Any:
        said = {} if body is None else {"json": body}
        return browser.post(path, headers={**headers, **more}, **said)

    return post


def draft_on(page: Any) -> dict[str, Any]:
    """The order that the page's script begins with."""
    text = page.text.partition('data-draft="')[2].partition('"')[0]
    found: dict[str, Any] = json.loads(unescape(text))
    return found


def test_photographs_are_announced_sealed_and_reported_of(
    edge: Any, browser: Any, ask: Any
) -> None:
    made = ask("/new/datasets", {"files": [FILE, {**FILE, "name": "dog.txt"}]})
    assert made.status_code == 201
    assert [item["name"] for item in made.json["uploads"]] == ["dog.jpg", "dog.txt"]
    name = made.json["id"]
    renewed = ask(f"/new/datasets/{name}/uploads", {"names": ["dog.txt"]})
    assert [item["name"] for item in renewed.json["data"]] == ["dog.txt"]
    sealed = ask(f"/new/datasets/{name}/seal")
    assert 'data-status="building"' in sealed.text
    assert "<html" not in sealed.text
    with edge.store.transaction() as tx:
        dataset = tx.dataset(name)
        assert (dataset.owner, dataset.status) == ("operations", DatasetStatus.BUILDING)
        report = {
            "kept": [{"name": "dog.jpg"}],
            "warned": [{"name": "<b>small</b>.jpg", "why": "is only 70x70 pixels"}],
            "refused": [{"name": "cat.heic", "why": "is no image"}],
        }
        tx.save_dataset(dataset.evolve(status=DatasetStatus.READY, report=report))
    part = browser.get(f"/new/datasets/{name}").text
    for words in ("1 kept", "1 warned", "1 refused", "is only 70x70 pixels", "is no image"):
        assert words in part
    assert "&lt;b&gt;small" in part
    assert name in browser.get(f"/new?dataset={name}").text


def test_faulty_files_are_refused_as_the_api_does(ask: Any, problem: Any) -> None:
    body = {"files": [FILE, {**FILE, "name": "../x.jpg"}]}
    faults = problem(ask("/new/datasets", body), 422, "invalid")["errors"]
    assert faults[0]["pointer"] == "/files/1/name"
    problem(ask("/new/datasets/ds_none/seal"), 404, "not_found")


def test_an_order_makes_one_job_that_belongs_to_who_placed_it(edge: Any, ask: Any) -> None:
    order = {**ORDER, "dataset_id": edge.dataset("operations").id}
    key = {"Idempotency-Key": "pressed-twice"}
    first, second = ask("/new", order, **key), ask("/new", order, **key)
    assert first.status_code == 202
    assert first.json == second.json
    assert first.json["url"] == f"/jobs/{first.json['job']}"
    assert first.json["webhook_secret"] is None
    job = edge.stored(first.json["job"])
    assert job.owner == "operations"
    assert job.request.recipe["steps"] == 300


def test_a_jobs_own_webhook_has_its_secret_shown_with_the_start(edge: Any, ask: Any) -> None:
    webhook = {"webhook": {"url": "https://shop.test/hook"}}
    answer = ask("/new", {**ORDER, **webhook, "dataset_id": edge.dataset("operations").id})
    assert answer.json["webhook_secret"].startswith("whsec_")


def test_what_is_wrong_with_an_order_is_said_of_its_field(
    edge: Any, ask: Any, problem: Any
) -> None:
    order = {**ORDER, "dataset_id": edge.dataset("operations").id}
    for change, pointer in (
        ({"recipe": {"stepps": 3}}, "/recipe/stepps"),
        ({"base": "a model"}, "/base"),
        ({"max_cost": 0}, "/max_cost"),
        ({"dataset_id": "ds_nobodys"}, "/dataset_id"),
        ({"webhook": {"url": "ftp://x"}}, "/webhook/url"),
    ):
        faults = problem(ask("/new", {**order, **change}), 422)["errors"]
        assert [item["pointer"] for item in faults] == [pointer]
    problem(ask("/new", order, **{"Idempotency-Key": "x" * 300}), 422)


def test_a_pasted_link_is_looked_up(edge: Any) -> None:
    found = FoundBase(
        base="civitai:128078",
        name="SD XL",
        version="v1.0",
        kind="Checkpoint",
        family="sdxl",
        bytes=6_938_041_050,
        sha256="ab" * 32,
    )
    deps = replace(edge.deps, look_up_base=lambda link: found)
    edge.app = create_app(deps)
    browser = edge.page()
    headers = {"X-CSRFToken": edge.csrf_of(browser.get("/new")), "HX-Request": "true"}
    link = {"link": "https://civitai.com/models/101055?modelVersionId=128078"}
    shown = browser.post("/new/base", json=link, headers=headers).json
    assert (shown["base"], shown["family"], shown["kind"]) == (
        "civitai:128078",
        "sdxl",
        "Checkpoint",
    )
    assert shown["bytes"] == 6_938_041_050


def test_without_a_market_the_estimate_says_why(ask: Any, problem: Any) -> None:
    problem(ask("/new/estimate", {**ORDER, "images": 5, "bytes": 5000}), 503, "market_unset")
    faults = problem(ask("/new/estimate", {**ORDER, "base": "x"}), 422)["errors"]
    assert faults[0]["pointer"] == "/base"


def test_nothing_is_made_without_the_pages_token(edge: Any, browser: Any) -> None:
    for path in ("/new", "/new/datasets", "/new/datasets/ds_1/seal", "/new/estimate"):
        assert browser.post(path, json={"files": [FILE]}).status_code == 400, path
    with edge.store.transaction() as tx:
        assert tx.list_jobs() == []


def test_a_copy_of_a_job_orders_the_same_again(edge: Any, browser: Any, ask: Any) -> None:
    """The form says what was said, and leaves to the dial what the dial had set."""
    order = {
        **ORDER,
        "dataset_id": edge.dataset("operations").id,
        "recipe": {"quality": "fine", "trigger": "ohwx", "rank": 8, "optimizer": "prodigy"},
        "metadata": {"customer": "7"},
        "interruptible": True,
    }
    first = edge.stored(ask("/new", order).json["job"])
    page = browser.get(f"/new?from={first.id}")
    draft = draft_on(page)
    assert draft["recipe"]["rank"] == 8
    assert "steps" not in draft["recipe"]
    assert 'value="8"' in page.text
    assert "&#34;optimizer&#34;: &#34;prodigy&#34;" in page.text
    again = edge.stored(ask("/new", draft).json["job"])
    assert again.request == first.request
    assert browser.get("/new?from=job_none").status_code == 404


def test_another_owners_photographs_may_be_trained_on_by_an_operator(
    edge: Any, browser: Any
) -> None:
    job = edge.job("alice")
    assert job.request.dataset_id in browser.get(f"/new?from={job.id}").text


def test_a_recipe_of_another_version_can_still_be_copied(edge: Any) -> None:
    job = edge.job()
    old = job.evolve(request=replace(job.request, recipe={"quality": "gone", "steps": 7}))
    assert draft_of(old)["recipe"] == {"quality": "gone", "steps": 7}
