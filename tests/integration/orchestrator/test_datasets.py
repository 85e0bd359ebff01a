"""Announcing photographs, uploading them, sealing."""

from __future__ import annotations

import pytest

#: What is refused before any database is asked needs none.
without_database = pytest.mark.parametrize("store", ["memory"], indirect=True)

FILE = {"name": "dog.jpg", "bytes": 1000, "sha256": "0" * 64}


def test_each_announced_file_gets_its_own_upload(edge, client, alice):
    files = [FILE, {**FILE, "name": "dog.txt"}]
    answer = client.post("/v1/datasets", json={"files": files}, headers=alice)
    assert answer.status_code == 201
    body = answer.json
    assert answer.headers["Location"] == f"/v1/datasets/{body['id']}"
    assert body["status"] == "open"
    assert [item["name"] for item in body["uploads"]] == ["dog.jpg", "dog.txt"]
    assert len({item["url"] for item in body["uploads"]}) == 2
    assert body["uploads"][0]["headers"] == {"Content-Length": "1000"}


def test_a_zip_is_one_upload(client, alice):
    body = {"zip": {"bytes": 5, "sha256": "0" * 64}}
    answer = client.post("/v1/datasets", json=body, headers=alice)
    assert answer.status_code == 201
    assert [item["name"] for item in answer.json["uploads"]] == ["images.zip"]


@without_database
@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, ""),
        ({"files": []}, "/files"),
        ({"files": [FILE], "zip": {"bytes": 1, "sha256": "0" * 64}}, ""),
        ({"files": [FILE, {**FILE, "name": "DOG.jpg"}]}, ""),
        ({"files": [{**FILE, "name": "../dog.jpg"}]}, "/files/0/name"),
        ({"files": [{**FILE, "name": "a\\b.jpg"}]}, "/files/0/name"),
        ({"files": [{**FILE, "name": ".."}]}, "/files/0/name"),
        ({"files": [{**FILE, "name": "a\x00b"}]}, "/files/0/name"),
        ({"files": [{**FILE, "name": "\ud800"}]}, "/files/0/name"),
        ({"files": [{**FILE, "name": ""}]}, "/files/0/name"),
        ({"files": [{**FILE, "bytes": 0}]}, "/files/0/bytes"),
        ({"files": [{**FILE, "bytes": "1000"}]}, "/files/0/bytes"),
        ({"files": [{**FILE, "bytes": True}]}, "/files/0/bytes"),
        ({"files": [{**FILE, "sha256": "xyz"}]}, "/files/0/sha256"),
        ({"files": [{**FILE, "colour": "red"}]}, "/files/0/colour"),
        ({"files": "all of them"}, "/files"),
        ({"zip": {"bytes": 10**12, "sha256": "0" * 64}}, "/zip/bytes"),
        (["files"], ""),
    ],
)
def test_a_faulty_announcement_is_refused_and_names_the_fault(
    client, alice, problem, body, pointer
):
    answer = client.post("/v1/datasets", json=body, headers=alice)
    faults = problem(answer, 422, "invalid")["errors"]
    assert pointer in [fault["pointer"] for fault in faults]


def test_what_is_no_json_is_told_from_what_is_not_understood(client, alice, problem):
    cut = client.post(
        "/v1/datasets", data=b'{"files": [', headers=alice, content_type="application/json"
    )
    problem(cut, 400, "bad_json")
    form = client.post("/v1/datasets", data={"files": "x"}, headers=alice)
    problem(form, 415, "not_json")
    deep = b"[" * 100_000
    problem(
        client.post("/v1/datasets", data=deep, headers=alice, content_type="application/json"), 400
    )
    long = b'{"files": "' + b"x" * 5 * 2**20 + b'"}'
    problem(
        client.post("/v1/datasets", data=long, headers=alice, content_type="application/json"), 413
    )


def test_sealing_starts_the_building_and_twice_is_harmless(edge, client, alice, soon):
    made = client.post("/v1/datasets", json={"files": [FILE]}, headers=alice).json
    for _ in range(2):
        answer = client.post(f"/v1/datasets/{made['id']}/seal", headers=alice)
        assert answer.status_code == 202
        assert answer.json["status"] == "building"
    soon(lambda: ("build", made["id"]) in edge.woken)
    assert client.get(f"/v1/datasets/{made['id']}", headers=alice).json["status"] == "building"


def test_upload_urls_can_be_had_again_until_the_seal(client, alice, problem):
    files = [FILE, {**FILE, "name": "cat.jpg"}]
    made = client.post("/v1/datasets", json={"files": files}, headers=alice).json
    path = f"/v1/datasets/{made['id']}/uploads"
    assert len(client.post(path, json={}, headers=alice).json["data"]) == 2
    one = client.post(path, json={"names": ["cat.jpg"]}, headers=alice).json["data"]
    assert [item["url"] for item in one] == [made["uploads"][1]["url"]]
    strange = client.post(path, json={"names": ["cat.jpg", "cow.jpg"]}, headers=alice)
    assert problem(strange, 422)["errors"][0]["pointer"] == "/names/1"
    client.post(f"/v1/datasets/{made['id']}/seal", headers=alice)
    problem(client.post(path, json={}, headers=alice), 409, "sealed")


def test_another_customers_dataset_is_not_there(edge, client, problem):
    dataset = edge.dataset("alice")
    bob = edge.key("bob")
    problem(client.get(f"/v1/datasets/{dataset.id}", headers=bob), 404, "not_found")
    problem(client.post(f"/v1/datasets/{dataset.id}/seal", headers=bob), 404)
    problem(client.post(f"/v1/datasets/{dataset.id}/uploads", json={}, headers=bob), 404)
    assert client.get(f"/v1/datasets/{dataset.id}", headers=edge.key("alice")).status_code == 200


def test_storage_that_is_down_is_said_to_be_worth_another_try(edge, client, alice, problem):
    edge.storage.down = True
    answer = client.post("/v1/datasets", json={"files": [FILE]}, headers=alice)
    assert problem(answer, 503, "storage_unavailable")["retryable"] is True
    assert answer.headers["Retry-After"]
