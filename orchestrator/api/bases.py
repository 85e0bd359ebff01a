"""Base models: is this an address at all, and what does a pasted link lead to (`/v1/bases`)?

An order is not asked whether its base exists; that is found out when it is needed.
"""

from __future__ import annotations

import re
import threading
from datetime import datetime, timedelta
from typing import Annotated
from urllib.parse import urlsplit

from flask import Response
from flask_openapi.blueprint import APIBlueprint
from flask_openapi.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from infra.models import STORED_PREFIX, BaseError, FoundBase
from orchestrator.api import auth, present
from orchestrator.api.problems import Refusal
from orchestrator.api.schemas import Out, Text
from orchestrator.deps import Deps

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


# --- what a link leads to ---------------------------------------------------------------------

#: What sites said is believed for so long; so many answers are kept.
LIFE, KEPT = timedelta(minutes=10), 256
#: When a site that does not answer may be asked again (seconds).
ASK_AGAIN_S = 10


class Base(Out):
    """A base model, as its site describes it."""

    base: str = Field(description="what an order names it")
    name: str
    version: str
    kind: str = Field(description="what the site calls it: Checkpoint, LORA; else folder or file")
    family: str | None = Field(description="for `base_family`; null where the site does not say")
    bytes: int | None
    sha256: str = Field(description="empty where nobody published one")
    trigger_words: list[str]
    fault: str | None = Field(description="why it cannot be trained on")


class BasesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    link: Annotated[Text, Field(min_length=1, max_length=1024)] = Field(
        description="from Civitai or Hugging Face as a browser shows it, or a base's address"
    )


class Bases:
    """Looks links up; what was found is remembered for a while."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._known: dict[str, tuple[datetime, Base]] = {}
        self._lock = threading.Lock()

    def found(self, link: str) -> Base:
        """Raises: Refusal 422, when it leads to no model; 503, when its site does not answer."""
        link, now = link.strip(), self._deps.clock()
        with self._lock:
            self._known = {name: kept for name, kept in self._known.items() if now - kept[0] < LIFE}
            kept = self._known.get(link)
        if kept is not None:
            return kept[1]
        base = self._shown(self._look_up(link))
        with self._lock:
            if len(self._known) < KEPT:
                self._known[link] = (now, base)
        return base

    def _look_up(self, link: str) -> FoundBase:
        settings, look_up = self._deps.settings, self._deps.look_up_base
        if look_up is None:
            raise Refusal(503, "bases_unset", "this server was given no way to look models up")
        plain = settings.private_bases
        is_url = link.startswith(("https://", "http://"))
        if is_url and (wrong := fault_of_url(link, plain_http=plain)):
            raise Refusal(422, "invalid", f"the link {wrong}", errors=[("?link", wrong)])
        try:
            return look_up(link)
        except BaseError as error:
            if error.retryable:
                headers = {"Retry-After": str(ASK_AGAIN_S)}
                raise Refusal(
                    503, error.code, str(error), headers=headers, retryable=True
                ) from None
            errors = [("?link", str(error))]
            raise Refusal(422, error.code, str(error), errors=errors) from None

    def _shown(self, base: FoundBase) -> Base:
        private = self._deps.settings.private_bases
        fault = base.fault or fault_of_base(base.base, private=private)
        return Base(
            base=base.base,
            name=base.name,
            version=base.version,
            kind=base.kind,
            family=base.family,
            bytes=base.bytes,
            sha256=base.sha256,
            trigger_words=list(base.trigger_words),
            fault=fault or None,
        )


def bases(deps: Deps) -> APIBlueprint:
    api = APIBlueprint(
        "bases",
        __name__,
        url_prefix="/v1/bases",
        abp_tags=[Tag(name="jobs")],
        abp_security=[{"key": []}],
    )
    api.before_request(lambda: auth.admit(deps.store))
    known = Bases(deps)

    @api.get("", operation_id="look_up_base", responses={"200": Base})
    def look_up(query: BasesQuery) -> Response:
        """What a link to a base model leads to: its address, name, family and size"""
        return present.answer(known.found(query.link))

    return api
