"""Base models that lie in our own store."""

from __future__ import annotations

import pytest
import requests

from infra.models import BaseError, BaseResolver
from infra.settings import Settings
from infra.storage import Storage


def test_stored_base_model_becomes_a_short_lived_url(
    s3_settings: Settings, storage: Storage
) -> None:
    storage.put_bytes("bases/sd15/model.safetensors", b"model")
    resolver = BaseResolver.from_settings(s3_settings, storage)
    (found,) = resolver.resolve("s3:bases/sd15/model.safetensors")
    assert (found.name, found.bytes) == ("model.safetensors", 5)
    assert requests.get(found.url, timeout=20).content == b"model"


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("jobs/other/result/weights.safetensors", "model.bad_address"),
        ("bases/../jobs/other", "model.bad_address"),
        ("bases/none.safetensors", "model.not_found"),
        ("bases/old.ckpt", "model.pickle"),
    ],
)
def test_customers_files_and_missing_ones_are_no_base_models(
    s3_settings: Settings, storage: Storage, key: str, code: str
) -> None:
    storage.put_bytes("jobs/other/result/weights.safetensors", b"somebody's")
    with pytest.raises(BaseError) as caught:
        BaseResolver.from_settings(s3_settings, storage).resolve(f"s3:{key}")
    assert caught.value.code == code
