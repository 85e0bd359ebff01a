"""Secrets at rest."""

from __future__ import annotations

import pytest

from infra.crypto import SecretBox
from state.errors import SecretUnreadable
from state.events import Secret


def test_a_sealed_secret_opens_again_and_shows_nothing():
    box = SecretBox([SecretBox.new_key()])
    sealed = box.seal(Secret("whsec_ü☃"))
    assert b"whsec" not in sealed
    assert box.open(sealed).reveal() == "whsec_ü☃"
    assert box.seal(Secret("whsec_ü☃")) != sealed
    assert "whsec" not in repr(box.open(sealed))


def test_an_old_key_opens_what_it_sealed_until_it_is_dropped():
    old, new = SecretBox.new_key(), SecretBox.new_key()
    sealed = SecretBox([old]).seal(Secret("s"))
    assert SecretBox([new, old]).open(sealed).reveal() == "s"
    assert SecretBox([new]).open(SecretBox([new, old]).seal(Secret("s"))).reveal() == "s"
    with pytest.raises(SecretUnreadable):
        SecretBox([new]).open(sealed)


@pytest.mark.parametrize("garbage", [b"", b"\x00", b"gAAAA", b"\xff" * 100])
def test_garbage_does_not_open(garbage):
    with pytest.raises(SecretUnreadable):
        SecretBox([SecretBox.new_key()]).open(garbage)


def test_a_sealed_secret_that_was_altered_does_not_open():
    box = SecretBox([SecretBox.new_key()])
    sealed = bytearray(box.seal(Secret("s")))
    sealed[20] ^= 1
    with pytest.raises(SecretUnreadable):
        box.open(bytes(sealed))


def test_a_key_that_is_none_is_named_by_its_place_only():
    with pytest.raises(ValueError, match="secret key 2 ") as caught:
        SecretBox([SecretBox.new_key(), Secret("hunter2")])
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="at least one"):
        SecretBox([])
