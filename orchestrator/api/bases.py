"""Is this a base model's address at all? Whether it exists is found out when it is needed."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from infra.models import STORED_PREFIX

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_CIVITAI = re.compile(r"civitai:[1-9][0-9]{0,11}")
_HUGGING_FACE = re.compile(rf"hf:{_PART}/{_PART}(?:@{_PART})?(?:/{_PART})*")
#: Below one prefix: no customer may name another's dataset or result.
_STORED = re.compile(rf"s3:{re.escape(STORED_PREFIX)}{_PART}(?:/{_PART})*/?")


def fault_of_base(base: str, *, private: bool) -> str | None:
    """What is wrong with `base`; None when it can be understood.

    `private` lets plain http through, for installations whose models lie on their own network.
    """
    if any(form.fullmatch(base) for form in (_CIVITAI, _HUGGING_FACE, _STORED)):
        return None
    if base.startswith(("https://", "http://")):
        return fault_of_url(base, plain_http=private)
    return (
        "must be civitai:<version>, hf:<owner>/<repo>[/<file>], s3:bases/<file or folder/> "
        "or an https URL"
    )


def fault_of_url(url: str, *, plain_http: bool) -> str | None:
    """What is wrong with `url`; None when it can be called."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return "must be an ASCII URL without spaces"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme != "https" and not (plain_http and parts.scheme == "http"):
        return "must begin with https://"
    if not host:
        return "has no host"
    if parts.username is not None or parts.password is not None:
        return "must not carry a user name or password"
    return None
