"""A real S3 (OpenStack Swift) for the tests of the adapter, with one bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import embedded
from infra.settings import Settings
from infra.storage import Storage
from state.events import Secret


@pytest.fixture(scope="session")
def s3_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a running S3; the other servers are named, so that they are not started."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("s3"),
        database_url=Secret("postgresql://elsewhere"),
        redis_url=Secret("redis://elsewhere"),
    )
    with embedded.start(settings) as servers:
        yield servers.settings


@pytest.fixture(scope="session")
def storage(s3_settings: Settings) -> Storage:
    made = Storage.connect(s3_settings)
    made.ensure_bucket()
    return made


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> str:
    """A key prefix of this test's own."""
    return f"tests/{Path(request.node.nodeid).name}".replace("[", "-").replace("]", "") + "/"
