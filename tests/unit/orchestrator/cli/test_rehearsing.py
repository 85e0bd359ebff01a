"""`stoker train --fixture`, and test keys."""

from __future__ import annotations

import json

import pytest

from orchestrator.cli.console import Exit
from state.rehearsal import FIXTURES


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"a")
    return folder


@pytest.fixture
def taking(api, make_job):
    """An API that takes a photograph and a job."""
    api.answers |= {
        "POST /v1/datasets": (
            201,
            {"id": "ds_1", "uploads": [{"url": f"{api.url}/put/0", "headers": {}}]},
        ),
        "POST /v1/datasets/ds_1/seal": (202, {"id": "ds_1"}),
        "POST /v1/jobs": (202, make_job(status="pending")),
        "PUT /put/0": (200, b""),
    }
    return api


def test_a_rehearsal_asks_for_no_confirmation(stoker, taking, photos):
    ran = stoker(
        "train", str(photos), "--base", "civitai:1", "--fixture", "test_oom", "--time-scale", "600",
        "--detach",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert json.loads(taking.bodies[-1])["test"] == {"fixture": "test_oom", "time_scale": 600.0}
    assert "nothing is rented or spent" in ran.err


def test_nothing_is_confirmed_with_a_test_key_for_it_spends_nothing(stoker, taking, photos):
    ran = stoker("train", str(photos), "--base", "civitai:1", "--detach")
    assert ran.code == 0, ran.err
    assert "nothing is rented or spent" in ran.err
    assert "test" not in json.loads(taking.bodies[-1])  # the server knows by the key


def test_what_is_no_rehearsal_says_nothing_of_tests(stoker, taking, photos):
    assert stoker("train", str(photos), "--base", "civitai:1", "-y", "--detach").code == 0
    assert "test" not in json.loads(taking.bodies[-1])


def test_an_unknown_fixture_is_refused_before_anything_is_uploaded(stoker, taking, photos):
    ran = stoker("train", str(photos), "--base", "civitai:1", "--fixture", "test_ooom")
    assert ran.code == Exit.USAGE
    assert all(name in ran.err for name in FIXTURES)
    assert taking.asked == []


@pytest.mark.parametrize(
    "given", [("--test", "--scope", "operator"), ("--owner", "acme~test"), ("--owner", "~test")]
)
def test_a_key_that_would_blur_the_modes_is_not_made(stoker, given):
    ran = stoker("keys", "create", "ci", *given)
    assert ran.code == Exit.USAGE
    assert "--test" in ran.err
