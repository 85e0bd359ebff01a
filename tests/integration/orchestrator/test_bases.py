"""`/v1/bases`: a pasted link, looked up."""

from __future__ import annotations

import dataclasses

import pytest

from infra.models import BaseError, FoundBase
from orchestrator.app import create_app
from state.memory import MemoryStore

DREAMY = FoundBase(
    base="civitai:128713",
    name="DreamShaper",
    version="8",
    kind="Checkpoint",
    family="sd1",
    bytes=2_132_625_894,
    sha256="ab" * 32,
    trigger_words=("dreamy",),
)


@pytest.fixture
def store():
    return MemoryStore()


def looking(edge, look_up):
    """A client of the application whose links are looked up so."""
    edge.app = create_app(dataclasses.replace(edge.deps, look_up_base=look_up))
    return edge.app.test_client()


def test_a_link_is_looked_up_once_in_a_while(edge, alice):
    asked = []

    def look_up(link):
        asked.append(link)
        return DREAMY

    client = looking(edge, look_up)
    link = "https://civitai.com/models/4384?modelVersionId=128713"
    for _ in range(3):
        shown = client.get("/v1/bases", query_string={"link": f" {link}"}, headers=alice)
        assert shown.status_code == 200, shown.text
    assert asked == [link]
    assert shown.json == {
        "base": "civitai:128713",
        "name": "DreamShaper",
        "version": "8",
        "kind": "Checkpoint",
        "family": "sd1",
        "bytes": 2_132_625_894,
        "sha256": "ab" * 32,
        "trigger_words": ["dreamy"],
        "fault": None,
    }
    edge.clock.advance(700)
    client.get("/v1/bases", query_string={"link": link}, headers=alice)
    assert len(asked) == 2


def test_what_cannot_be_ordered_says_why(edge, alice):
    odd = dataclasses.replace(DREAMY, base="hf:a/b/with space.safetensors")
    shown = looking(edge, lambda link: odd).get("/v1/bases?link=hf:a/b", headers=alice).json
    assert "must be civitai:" in shown["fault"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BaseError("civitai:1 does not exist", code="model.not_found"), 422),
        (BaseError("civitai:1: too slow", code="model.unreachable", retryable=True), 503),
    ],
)
def test_a_link_that_leads_nowhere_is_a_problem(edge, alice, problem, error, status):
    def look_up(link):
        raise error

    answer = looking(edge, look_up).get("/v1/bases?link=civitai:1", headers=alice)
    shown = problem(answer, status, error.code)
    assert shown["detail"] == str(error)
    assert ("Retry-After" in answer.headers) is (status == 503)


@pytest.mark.parametrize(
    "link", ["http://internal/model.safetensors", "https://user:pw@host/m", "", "x" * 2000]
)
def test_a_link_that_may_not_be_called_is_not(edge, alice, problem, link):
    def look_up(link):
        raise AssertionError("it was called")

    client = looking(edge, look_up)
    problem(client.get("/v1/bases", query_string={"link": link}, headers=alice), 422)
    problem(client.get("/v1/bases", headers=alice), 422)
    problem(client.get("/v1/bases?link=civitai:1"), 401)


def test_a_server_without_a_way_out_says_so(edge, client, alice, problem):
    problem(client.get("/v1/bases?link=civitai:1", headers=alice), 503, "bases_unset")
