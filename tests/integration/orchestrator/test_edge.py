"""What holds for every route: problems, keys, request ids, the description, health, metrics."""

from __future__ import annotations

import json

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

#: What is refused before any database is asked needs none.
without_database = pytest.mark.parametrize("store", ["memory"], indirect=True)

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def paths(edge):
    for rule in edge.app.url_map.iter_rules():
        path = rule.rule
        for part in ("<job_id>", "<dataset_id>", "<path:name>", "<path:filename>"):
            path = path.replace(part, "x")
        yield path.replace("<int:number>", "1"), rule.methods


@without_database
def test_every_wrong_method_is_a_problem_that_names_the_right_ones(edge, client, problem):
    tried = 0
    by_path = {}
    for path, methods in paths(edge):
        by_path.setdefault(path, set()).update(methods)
    router = edge.app.url_map.bind("stoker.test")
    for path in by_path:
        if path.startswith("/static"):
            continue
        methods = set(router.allowed_methods(path))  # more rules than one may take a path
        for method in METHODS:
            if method not in methods:
                answer = client.open(path, method=method)
                problem(answer, 405, "method_not_allowed")
                allowed = {item.strip() for item in answer.headers["Allow"].split(",")}
                assert allowed == methods
                tried += 1
    assert tried > 50


@without_database
@pytest.mark.parametrize("path", ["/no", "/v2/jobs", "/v1", "/v1/jobs/x/y", "/%00", "/agent/v1/x"])
def test_an_unknown_path_is_a_problem(client, alice, problem, path):
    problem(client.get(path, headers=alice), 404, "not_found")


@without_database
def test_every_public_route_wants_a_key(edge, client, problem):
    for path, methods in paths(edge):
        if path.startswith("/v1/"):
            for method in methods & set(METHODS):
                answer = client.open(path, method=method)
                problem(answer, 401, "unauthorized")
                assert answer.headers["WWW-Authenticate"] == "Bearer"


@without_database
@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Bearer stk_test_unknown_unknown_unknown",
        "Bearer " + "x" * 5000, "Bearer stk_test_\x00aaaaaaaaaaaaaaaaaaaa", "stk_test_" + "a" * 26,
        "Bearer stk_test_\xff\xff\xffaaaaaaaaaaaaaaaaaaa",
    ],
)  # fmt: skip
def test_a_key_that_is_none_of_ours_is_refused(client, problem, header):
    if "\x00" in header:
        answer = client.get("/v1/jobs", environ_overrides={"HTTP_AUTHORIZATION": header})
    else:
        answer = client.get("/v1/jobs", headers={"Authorization": header})
    problem(answer, 401, "unauthorized")


def test_a_revoked_key_is_refused(edge, client, problem):
    problem(client.get("/v1/jobs", headers=edge.key("alice", revoked=True)), 401)


def test_a_reading_key_cannot_order(edge, client, problem):
    reader, writer = edge.key("alice", "jobs:read"), edge.key("alice", "jobs:write")
    assert client.get("/v1/jobs", headers=reader).status_code == 200
    problem(client.post("/v1/jobs", json={}, headers=reader), 403, "forbidden")
    problem(client.get("/v1/jobs", headers=writer), 403, "forbidden")


def test_a_request_keeps_the_name_that_its_caller_gave(client, alice, problem):
    named = {**alice, "X-Request-Id": "trace-7:a.b"}
    assert client.get("/v1/jobs", headers=named).headers["X-Request-Id"] == "trace-7:a.b"
    assert problem(client.get("/nowhere", headers=named), 404)["request_id"] == "trace-7:a.b"
    evil = {**alice, "X-Request-Id": "a b<script>"}
    assert client.get("/v1/jobs", headers=evil).headers["X-Request-Id"].startswith("req_")


def test_our_own_fault_says_nothing_of_itself(edge, client, alice, problem, monkeypatch):
    def broken():
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(edge.store, "transaction", broken)
    answer = client.get("/v1/jobs", headers=alice)
    problem(answer, 500, "internal")
    assert "hunter2" not in answer.text


@without_database
def test_the_description_is_valid_openapi_3_1(edge, client):
    spec = client.get("/openapi.json").json
    assert spec["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(spec).validate()
    assert client.get("/openapi.json").json == spec
    for path, operations in spec["paths"].items():
        assert path.startswith("/v1/"), "agents' routes are no part of it"
        for operation in operations.values():
            for status, response in operation["responses"].items():
                kinds = set(response.get("content", {}))
                if status >= "400":
                    assert kinds == {"application/problem+json"}, (path, status)
            assert "422" in operation["responses"]
    names = [item["operationId"] for path in spec["paths"].values() for item in path.values()]
    assert len(names) == len(set(names))


@without_database
def test_alive_is_not_the_same_as_ready(edge, client, problem):
    assert client.get("/healthz").json == {"status": "alive"}
    assert client.get("/readyz").json["parts"] == {"database": {"ok": True}, "redis": {"ok": True}}
    edge.faults["redis"] = "redis://user:hunter2@host:6379 refused"
    answer = client.get("/readyz")
    parts = problem(answer, 503, "not_ready")["parts"]
    assert parts["database"] == {"ok": True}
    assert "refused" in parts["redis"]["fault"]
    assert "hunter2" not in answer.text
    assert client.get("/healthz").status_code == 200


@without_database
def test_a_check_that_breaks_is_a_part_that_is_down(edge, client, problem):
    edge.deps.ready_checks["database"] = lambda: 1 / 0
    parts = problem(client.get("/readyz"), 503)["parts"]
    assert parts["database"]["fault"].startswith("ZeroDivisionError")


def test_metrics_tell_of_requests_and_of_the_fleet(edge, client, alice):
    edge.agent()
    client.get("/v1/jobs", headers=alice)
    client.get("/v1/jobs/job_secret-id", headers=alice)
    edge.clock.advance(60)
    text = client.get("/metrics").text
    assert 'stoker_http_requests_total{method="GET",route="/v1/jobs",status="200"} 1.0' in text
    assert 'route="/v1/jobs/<job_id>",status="404"' in text
    assert "job_secret-id" not in text, "one label value per job would never end"
    assert 'stoker_jobs{status="pendingGpu"} 1.0' in text
    assert 'stoker_jobs{status="completed"} 0.0' in text
    assert 'stoker_open_leases{status="rented"} 1.0' in text
    assert "stoker_oldest_open_lease_seconds 60.0" in text


@without_database
def test_the_version_is_told(client):
    assert client.get("/version").json["wire"] == 1


def test_problems_of_a_database_outage_ask_for_another_try(edge, client, monkeypatch, problem):
    from state.errors import StoreUnavailable

    def gone():
        raise StoreUnavailable("connection refused")

    headers = edge.key("alice")
    monkeypatch.setattr(edge.store, "transaction", gone)
    answer = client.get("/v1/jobs", headers=headers)
    assert problem(answer, 503, "database_unavailable")["retryable"] is True
    assert int(answer.headers["Retry-After"]) > 0


@without_database
def test_answers_are_compact_json(client, alice):
    text = client.get("/v1/jobs", headers=alice).text
    assert json.loads(text) == {"data": [], "has_more": False, "next_cursor": None}


@without_database
def test_no_two_models_share_a_name(edge):
    """In the description one would take the other's place, and clients would read it wrongly."""
    import sys

    from pydantic import BaseModel

    named = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("orchestrator.api"):
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, BaseModel):
                    named.setdefault(value.__name__, set()).add(value)
    named.pop("BaseModel")
    assert {name for name, models in named.items() if len(models) > 1} == set()
    assert len(named) > 50
