"""Whatever arrives: an answer of one type, or an error of one type."""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from gpu_agent.recipe import Recipe, RecipeError
from gpu_agent.wire import (
    Fact,
    JobSpec,
    Report,
    SignatureError,
    WireError,
    new_secret,
    orders_from_bytes,
    secret_key,
    sign,
    verify,
)

GOLDEN = Path(__file__).parent / "golden"
SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
NOW = 1795348999.0
REPORT = (GOLDEN / "report-progress.json").read_bytes()
SPEC = (GOLDEN / "job-spec.json").read_bytes()

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
HOSTILE = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"7",
    b"{",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"NaN",
    b'{"a": NaN}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 10_000,
    b'{"version": ' + b"9" * 5_000 + b"}",
]


@given(st.binary(max_size=200))
def test_any_bytes_are_no_report_and_no_spec(body):
    for read in (Report.from_bytes, JobSpec.from_bytes):
        with pytest.raises(WireError):
            read(body)
    assert orders_from_bytes(body) == []


@pytest.mark.parametrize("body", HOSTILE)
def test_hostile_bytes_are_no_report_and_no_spec(body):
    for read in (Report.from_bytes, JobSpec.from_bytes):
        with pytest.raises(WireError):
            read(body)
    assert orders_from_bytes(body) == []


@given(st.sampled_from(sorted(json.loads(REPORT))), json_values)
def test_a_report_with_any_value_anywhere_is_read_or_refused(key, value):
    changed = json.dumps({**json.loads(REPORT), key: value}).encode()
    with contextlib.suppress(WireError):
        read = Report.from_bytes(changed)
        assert json.loads(read.to_bytes())["seq"] == read.seq


@pytest.mark.parametrize("key", [key for key in json.loads(REPORT) if key != "data"])
def test_a_report_without_one_of_its_keys_is_refused(key):
    value = json.loads(REPORT)
    del value[key]
    with pytest.raises(WireError, match="fact" if key == "type" else key):
        Report.from_bytes(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("type", "gpu.exploded"),
        ("seq", 0),
        ("seq", -1),
        ("seq", True),
        ("seq", 1.5),
        ("seq", "1"),
        ("seq", 2**53),
        ("attempt", 0),
        ("version", 2),
        ("version", 0),
        ("job", ""),
        ("job", "x" * 65),
        ("job", "a\x00b"),
        ("job", "\ud800"),
        ("at", "now"),
        ("at", None),
        ("data", []),
        ("data", None),
        ("data", {"text": "a\x00b"}),
    ],
)
def test_a_report_that_no_agent_writes_is_refused(key, value):
    with pytest.raises(WireError):
        Report.from_bytes(json.dumps({**json.loads(REPORT), key: value}).encode())


@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"NaN", b"Infinity"])
def test_a_report_with_a_number_beyond_numbers_is_refused(number):
    body = REPORT.replace(b'"data":{', b'"data":{"loss":' + number + b",", 1)
    assert number in body
    with pytest.raises(WireError):
        Report.from_bytes(body)


def test_a_report_cut_anywhere_is_refused():
    for length in range(len(REPORT)):
        with pytest.raises(WireError):
            Report.from_bytes(REPORT[:length])


@given(st.sampled_from(sorted(json.loads(SPEC))), json_values)
def test_a_spec_with_any_value_anywhere_is_read_or_refused(key, value):
    changed = json.dumps({**json.loads(SPEC), key: value}).encode()
    with contextlib.suppress(WireError):
        JobSpec.from_bytes(changed)


@pytest.mark.parametrize("key", ["silence_limit_s", "heartbeat_s", "progress_s", "lease_ends_at"])
@pytest.mark.parametrize("value", ["soon", None, True, [], 1e300])
def test_a_spec_whose_times_are_no_numbers_is_refused(key, value):
    with pytest.raises(WireError, match=key):
        JobSpec.from_bytes(json.dumps({**json.loads(SPEC), key: value}).encode())


@pytest.mark.parametrize("key", ["job", "dataset", "base", "secret", "report_url", "recipe"])
def test_a_spec_without_what_is_needed_is_refused(key):
    value = json.loads(SPEC)
    del value[key]
    with pytest.raises(WireError, match=key):
        JobSpec.from_bytes(json.dumps(value).encode())


@given(st.dictionaries(st.text() | st.sampled_from(sorted(Recipe().to_dict())), json_values))
@example({"steps": -1})
@example({"rank": 0})
@example({"alpha": 1e999})
@example({"steps": True})
@example({"sample_prompts": ["a", 7]})
@example({"caption_template": "\x00"})
@example({"optimizer": []})
@example({"optimizer": {}})
def test_any_recipe_is_taken_or_refused_by_key(value):
    try:
        recipe = Recipe.from_dict(value)
    except RecipeError as error:
        faults = error.faults
    else:
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        faults = {}
    assert set(faults) <= set(value)


@pytest.mark.parametrize("key", ["step", "Steps", "lr", "", "steps "])
def test_a_key_that_no_recipe_has_is_named(key):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({key: 1, "rank": 0})
    assert set(caught.value.faults) == {key, "rank"}


# --- signatures -------------------------------------------------------------------------------


def headers_of(body=REPORT, secrets=(SECRET,), at=NOW):
    return sign(body, secrets=list(secrets), webhook_id="job.1.1", at=at)


TAMPERED = [
    {"webhook-signature": ""},
    {"webhook-signature": "garbage"},
    {"webhook-signature": "v1,"},
    {"webhook-signature": "v1,abc"},
    {"webhook-signature": "v1,aa,bb"},
    {"webhook-signature": "v1,\u00e9"},
    {"webhook-signature": "v1," + "A" * 43 + "="},
    {"webhook-signature": "v2," + "A" * 43 + "="},
    {"webhook-signature": "v1,x " * 5_000},
    {"webhook-timestamp": ""},
    {"webhook-timestamp": "now"},
    {"webhook-timestamp": f"{NOW}"},
    {"webhook-timestamp": f" {int(NOW)}"},
    {"webhook-timestamp": f"+{int(NOW)}"},
    {"webhook-timestamp": f"-{int(NOW)}"},
    {"webhook-timestamp": f"{int(NOW)}.9"},
    {"webhook-timestamp": "1795348998"},
    {"webhook-timestamp": "\u0661\u0667\u0669\u0665\u0663\u0664\u0668\u0669\u0669\u0669"},
    {"webhook-timestamp": "9" * 5_000},
    {"webhook-id": ""},
    {"webhook-id": "job.1.2"},
    {"webhook-id": "\u00e9"},
    {"webhook-id": "x" * 5_000},
]


@pytest.mark.parametrize("change", TAMPERED)
def test_a_tampered_header_is_one_error(change):
    with pytest.raises(SignatureError):
        verify(REPORT, headers_of() | change, secrets=[SECRET], now=NOW)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_missing_header_is_one_error(name):
    headers = headers_of()
    del headers[name]
    with pytest.raises(SignatureError):
        verify(REPORT, headers, secrets=[SECRET], now=NOW)


@given(st.integers(0, len(REPORT) - 1), st.integers(1, 255))
def test_a_body_with_one_other_byte_is_refused(at, flip):
    body = bytearray(REPORT)
    body[at] ^= flip
    with pytest.raises(SignatureError):
        verify(bytes(body), headers_of(), secrets=[SECRET], now=NOW)


@given(
    st.binary(max_size=50),
    st.fixed_dictionaries(
        {
            "webhook-id": st.text(max_size=300),
            "webhook-timestamp": st.text(max_size=20) | st.just(str(int(NOW))),
            "webhook-signature": st.text(max_size=100) | st.text(max_size=50).map("v1,".__add__),
        }
    ),
)
def test_any_garbage_is_one_error(body, headers):
    with pytest.raises(SignatureError):
        verify(body, headers, secrets=[SECRET], now=NOW)


def test_another_attempts_secret_does_not_sign_for_this_one():
    with pytest.raises(SignatureError):
        verify(REPORT, headers_of(secrets=[new_secret()]), secrets=[SECRET], now=NOW)


def test_no_secret_accepts_nothing():
    with pytest.raises(SignatureError):
        verify(REPORT, headers_of(), secrets=[], now=NOW)


def test_while_a_secret_is_rotated_both_are_good():
    old, new = SECRET, new_secret()
    both = headers_of(secrets=[old, new])
    for known in ([old], [new], [old, new], [new_secret(), new]):
        assert verify(REPORT, both, secrets=known, now=NOW) == "job.1.1"
    assert verify(REPORT, headers_of(secrets=[new]), secrets=[old, new], now=NOW) == "job.1.1"


@pytest.mark.parametrize(
    "secret",
    ["", "whsec_", "whsec_!!!", "whsec_" + base64.b64encode(b"x" * 23).decode(), "whsec_\u00e9"],
)
def test_a_bad_secret_is_told(secret):
    with pytest.raises(WireError):
        secret_key(secret)


# --- the reference ----------------------------------------------------------------------------


@given(st.text(), st.sampled_from(["job.1.1", "msg_2KWPBgLlAfxdpx2AI54pPJ85f4W"]))
def test_the_reference_library_accepts_what_we_sign(text, webhook_id):
    body, secret = text.encode("utf-8", "replace"), new_secret()
    now = datetime.now(UTC).timestamp()
    headers = sign(body, secrets=[secret], webhook_id=webhook_id, at=now)
    with contextlib.suppress(json.JSONDecodeError):  # it reads the body after it was verified
        Webhook(secret).verify(body, headers)


@given(st.text().filter(lambda text: text.encode("utf-8", "replace").decode() == text))
def test_we_accept_what_the_reference_library_signs(text):
    secret, now = new_secret(), datetime.now(UTC)
    signature = Webhook(secret).sign("msg_1", now, text)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signature,
    }
    at = now.timestamp()
    assert verify(text.encode(), headers, secrets=[secret], now=at) == "msg_1"


def test_the_example_of_the_specification_is_verified():
    """Published with Standard Webhooks and used by its libraries' own tests."""
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    assert verify(body, headers, secrets=[secret], now=1614265330) == headers["webhook-id"]


# --- the leaf ---------------------------------------------------------------------------------


def test_the_contract_needs_nothing_but_python():
    source = Path(sys.modules[Report.__module__].__file__ or "").read_text()
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [item.name for item in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def test_every_fact_reads_back():
    for fact in Fact:
        report = Report(job="j", attempt=1, seq=1, type=fact, at=0.0)
        assert Report.from_bytes(report.to_bytes()) == report
