"""Logs: JSON lines, with job and attempt, without secrets."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from infra import logs

SECRETS = [
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "Authorization: Bearer stk_live_0123456789abcdef",
    "stk_test_0123456789abcdef",
    "https://s3/x?X-Amz-Credential=AKIA0123&X-Amz-Signature=deadbeef00",
    "https://civitai.com/api/download/models/1?token=deadbeef00",
    "postgresql://stoker:deadbeef00@db/stoker",
    "redis://:deadbeef00@cache:6379/0",
    "password=deadbeef00",
    "hf_deadbeef00deadbeef00",
    'the body was {"token": "deadbeef00", "nonce": "1"}',
    "its environment: {'STOKER_TOKEN': 'deadbeef00', 'A': 1}",
]
CANARIES = ["MfKQ9r8", "0123456789abcdef", "deadbeef00", "AKIA0123"]


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure(stream)
    yield stream
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_masked_wherever_it_stands(lines: io.StringIO, text: str) -> None:
    log = logs.logger("test")
    log.info("seen " + text, url=text, nested={"deep": [text, {"er": (text,)}]})
    logging.getLogger("celery").warning("from a library: %s", text)
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        log.error("failed", exc_info=error)
    written = lines.getvalue()
    assert len(written.splitlines()) == 3
    assert not [canary for canary in CANARIES if canary in written]


def test_values_under_telling_names_are_masked(lines: io.StringIO) -> None:
    logs.logger("test").info("hi", token="abc", secret="def", headers={"Authorization": "ghi"})
    line = json.loads(lines.getvalue())
    assert line["token"] == line["secret"] == line["headers"]["Authorization"] == "***"


def test_lines_carry_job_and_attempt(lines: io.StringIO) -> None:
    with logs.bound(job="job_1", attempt=2):
        logs.logger("test").info("inside", step=3)
        logging.getLogger("library").warning("inside too")
    logs.logger("test").info("outside")
    inside, library, outside = map(json.loads, lines.getvalue().splitlines())
    assert (inside["job"], inside["attempt"], inside["step"]) == ("job_1", 2, 3)
    assert (library["job"], library["level"]) == ("job_1", "warning")
    assert "job" not in outside
    assert inside["at"].endswith("Z")


def test_ordinary_words_stay_readable() -> None:
    text = "the dataset ds_01 has 20 images; see https://docs.example/keys?page=2"
    assert logs.mask(text) == text
