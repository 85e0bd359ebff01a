"""Secrets at rest: sealed with the newest key, opened with any that is still known."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from state.errors import SecretUnreadable
from state.events import Secret


class SecretBox:
    """Seals and opens `Secret` values with Fernet (AES-128-CBC and HMAC-SHA256).

    To rotate: put a new key in front, and drop the old one when nothing sealed by it is left.

    Args:
        keys: Fernet keys (32 bytes in URL-safe base64), newest first.

    Raises:
        ValueError: there is no key, or one of them is not a Fernet key; its place is named,
            the key itself is not.
    """

    def __init__(self, keys: Sequence[Secret]) -> None:
        if not keys:
            raise ValueError("at least one secret key is needed to store secrets")
        self._fernet = MultiFernet([_fernet(key, place) for place, key in enumerate(keys, 1)])

    @staticmethod
    def new_key() -> Secret:
        """A fresh random key."""
        return Secret(Fernet.generate_key().decode())

    def seal(self, secret: Secret) -> bytes:
        """What may be stored: different bytes on every call, about 100 more than the secret."""
        return self._fernet.encrypt(secret.reveal().encode())

    def open(self, sealed: bytes) -> Secret:
        """The secret in `sealed`.

        Raises:
            SecretUnreadable: none of the keys fits, or the bytes were altered.
        """
        try:
            return Secret(self._fernet.decrypt(sealed).decode())
        except InvalidToken:
            raise SecretUnreadable(_UNREADABLE) from None


_UNREADABLE = "a stored secret fits none of the secret keys; is an older key missing from the list?"


def _fernet(key: Secret, place: int) -> Fernet:
    try:
        return Fernet(key.reveal())
    except ValueError:
        raise ValueError(
            f"secret key {place} is not a Fernet key (32 random bytes in URL-safe base64)"
        ) from None
