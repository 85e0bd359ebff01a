"""Addresses of base models and webhooks, and ids."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.api.bases import fault_of_base, fault_of_url
from orchestrator.api.ids import new_id, plausible


@pytest.mark.parametrize(
    "base",
    [
        "civitai:12345",
        "hf:runwayml/stable-diffusion-v1-5",
        "hf:owner/repo/folder/model.safetensors",
        "hf:owner/repo@main/model.safetensors",
        "s3:bases/sd15.safetensors",
        "s3:bases/my-flux/",
        "https://models.example/sd15.safetensors?x=1",
    ],
)
def test_addresses_that_are_understood(base: str) -> None:
    assert fault_of_base(base, private=False) is None


def test_plain_http_is_for_private_installations() -> None:
    url = "http://127.0.0.1:9000/model.safetensors"
    assert fault_of_base(url, private=True) is None
    assert fault_of_base(url, private=False)


@pytest.mark.parametrize(
    "url",
    [
        "https://", "https:///x", "https://a b/", "https://a\\b", "https://[::1", "ftp://a/",
        "https://a:99999999/", "https://u@a/", "https://a/\n", "https://\u0430.com/",
    ],
)  # fmt: skip
def test_addresses_that_cannot_be_called(url: str) -> None:
    assert fault_of_url(url, plain_http=True)


def test_ids_sort_by_time_and_never_repeat() -> None:
    now = datetime(2026, 11, 22, tzinfo=UTC)
    made = [new_id("job", now + timedelta(milliseconds=step)) for step in range(100)]
    assert made == sorted(made)
    assert len({new_id("job", now) for _ in range(1000)}) == 1000
    assert len(made[0]) == len("job_") + 26
    assert all(plausible(item) for item in made)


@pytest.mark.parametrize("text", ["", "a b", "a\x00", "a" * 65, "../x", "\u00e9"])
def test_what_cannot_be_an_id(text: str) -> None:
    assert not plausible(text)
