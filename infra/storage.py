"""S3 by boto3: what the server itself reads and writes, and URLs for everybody else.

Nobody but the server has a storage key. Customers and rented machines get presigned URLs: one
key, one method, at most an hour; a PUT is for exactly so many bytes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import requests
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.safetensors import Readable, Weights, read_weights
from infra.settings import Settings
from state.errors import NotFound, StorageError

#: seconds; no presigned URL lives longer
LONGEST_URL_S = 3600
#: S3's own limit on one PUT
LARGEST_PUT = 5 * 1024**3
_DELETE_BATCH = 1000
#: What our own rule is called among a bucket's CORS rules.
_CORS_RULE = "stoker-pages"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A presigned PUT. All of `headers` must be sent exactly so, or the store refuses it."""

    url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An object in a listing."""

    key: str
    bytes: int


class _Body:
    """An answer's body whose reading fails with our errors."""

    def __init__(
        self, body: Any, translated: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._body, self._translated = body, translated

    def read(self, size: int = -1, /) -> bytes:
        with self._translated():
            part: bytes = self._body.read(None if size < 0 else size)
        return part


class Storage:
    """One bucket. Methods raise `StorageError`, or `NotFound` for a key that is not there."""

    def __init__(self, client: Any, bucket: str) -> None:
        self._client, self._bucket = client, bucket

    @classmethod
    def connect(cls, settings: Settings) -> Storage:
        """By `settings`; makes no request. Without an access key boto3's own chain finds one."""
        client = boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint or None,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key or None,
            aws_secret_access_key=settings.s3_secret_key.reveal() or None,
            config=Config(
                signature_version="s3v4",
                connect_timeout=5,
                read_timeout=60,
                retries={"mode": "standard", "total_max_attempts": 4},
                max_pool_connections=32,
                s3={"addressing_style": "path" if settings.s3_endpoint else "auto"},
                # stores other than AWS do not all know the newer checksums
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                # a proxy in the environment must not see the store's traffic unasked
                proxies={},
            ),
        )
        return cls(client, settings.s3_bucket)

    def ensure_bucket(self) -> None:
        """Make the bucket where it is missing."""
        with self._translated("bucket"):
            try:
                self._client.head_bucket(Bucket=self._bucket)
                return
            except ClientError as exc:
                if _status(exc) != 404:
                    raise
            region = self._client.meta.region_name
            extra = (
                {}
                if region in (None, "us-east-1")
                else {"CreateBucketConfiguration": {"LocationConstraint": region}}
            )
            try:
                self._client.create_bucket(Bucket=self._bucket, **extra)
            except ClientError as exc:
                if _code(exc) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    # browsers

    def fault_for_browsers(self, origin: str) -> str | None:
        """Why pages of `origin` (`https://host`) could not PUT here; None when they can.

        Asked as a browser asks before it uploads. A store whose answer cannot be had is a fault.
        """
        url = self.presign_put("checks/browser", bytes=1, expires_s=60).url
        asked = {
            "Origin": origin,
            "Access-Control-Request-Method": "PUT",
            "Access-Control-Request-Headers": "content-type",
        }
        with requests.Session() as session:
            session.trust_env = False  # as above: no proxy unasked
            try:
                answer = session.options(url, headers=asked, timeout=10, allow_redirects=False)
            except requests.RequestException as exc:
                return f"the store could not be asked: {type(exc).__name__}"
        said = answer.headers
        methods = _listed(said.get("Access-Control-Allow-Methods", ""))
        headers = _listed(said.get("Access-Control-Allow-Headers", ""))
        if said.get("Access-Control-Allow-Origin") not in ("*", origin):
            return f"its CORS rules let no page of {origin} upload (HTTP {answer.status_code})"
        if not methods & {"put", "*"}:
            return f"its CORS rules let pages of {origin} make no PUT"
        if not headers & {"content-type", "*"}:
            return f"its CORS rules let pages of {origin} send no Content-Type"
        return None

    def allow_browsers(self, origin: str) -> None:
        """Add a CORS rule for uploads from pages of `origin`; other rules stay.

        Raises: StorageError, also where the key may not (`s3:PutBucketCORS`), or the store knows
        no such rules.
        """
        with self._translated("CORS rules"):
            try:
                rules = self._client.get_bucket_cors(Bucket=self._bucket)["CORSRules"]
            except ClientError as exc:
                if _code(exc) != "NoSuchCORSConfiguration":
                    raise
                rules = []
            ours = {
                "ID": _CORS_RULE,
                "AllowedOrigins": [origin],
                "AllowedMethods": ["GET", "PUT", "HEAD"],
                # by name: R2 does not take "*"
                "AllowedHeaders": ["content-type"],
                "MaxAgeSeconds": 3600,
            }
            others = [rule for rule in rules if rule.get("ID") != _CORS_RULE]
            self._client.put_bucket_cors(
                Bucket=self._bucket, CORSConfiguration={"CORSRules": [*others, ours]}
            )

    # URLs

    def presign_put(
        self,
        key: str,
        *,
        bytes: int,
        expires_s: float = LONGEST_URL_S,
        sha256: str | None = None,
        content_type: str = "application/octet-stream",
        overwrite: bool = True,
    ) -> Upload:
        """A PUT of exactly `bytes` bytes to `key`.

        With `sha256` (hex) the store refuses any other content; without `overwrite` it refuses
        (412) a key that exists.
        """
        if not 0 <= bytes <= LARGEST_PUT:
            raise StorageError(
                f"{key} would have {bytes} bytes; one upload may have up to {LARGEST_PUT}",
                code="too_large",
                retryable=False,
            )
        parameters: dict[str, Any] = {"ContentLength": bytes, "ContentType": content_type}
        headers = {"Content-Length": str(bytes), "Content-Type": content_type}
        if sha256 is not None:
            digest = base64.b64encode(_digest(sha256)).decode()
            parameters["ChecksumSHA256"] = headers["x-amz-checksum-sha256"] = digest
        if not overwrite:
            parameters["IfNoneMatch"] = headers["If-None-Match"] = "*"
        url = self._presign("put_object", key, expires_s, parameters)
        return Upload(url=url, headers=headers)

    def presign_get(
        self, key: str, *, expires_s: float = LONGEST_URL_S, filename: str | None = None
    ) -> str:
        """A GET of `key`, ranges included. `filename` is what a browser saves it as."""
        parameters = {}
        if filename is not None:
            parameters["ResponseContentDisposition"] = (
                f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
            )
        return self._presign("get_object", key, expires_s, parameters)

    def _presign(
        self, method: str, key: str, expires_s: float, parameters: Mapping[str, Any]
    ) -> str:
        with self._translated(key):
            url: str = self._client.generate_presigned_url(
                method,
                Params={"Bucket": self._bucket, "Key": key, **parameters},
                ExpiresIn=max(1, min(int(expires_s), LONGEST_URL_S)),
            )
        return url

    # writing

    def put_bytes(
        self, key: str, body: bytes, *, content_type: str = "application/octet-stream"
    ) -> None:
        with self._translated(key):
            self._client.put_object(
                Bucket=self._bucket, Key=key, Body=body, ContentType=content_type
            )

    def put_file(
        self, key: str, path: Path, *, content_type: str = "application/octet-stream"
    ) -> None:
        """Upload `path`, in parts when it is large."""
        with self._translated(key):
            self._client.upload_file(
                str(path), self._bucket, key, ExtraArgs={"ContentType": content_type}
            )

    def copy(self, source: str, target: str) -> None:
        """Within the bucket, done by the store."""
        with self._translated(source):
            self._client.copy(
                {"Bucket": self._bucket, "Key": source}, Bucket=self._bucket, Key=target
            )

    def delete(self, key: str) -> None:
        """Of a key that is not there too."""
        with self._translated(key):
            try:
                self._client.delete_object(Bucket=self._bucket, Key=key)
            except ClientError as exc:
                if _status(exc) != 404:
                    raise

    def delete_prefix(self, prefix: str) -> int:
        """Everything below `prefix`; how many objects there were. `prefix` ends with a slash."""
        if not prefix.endswith("/") or prefix == "/":
            raise StorageError(f"{prefix!r} is no folder", code="bad_prefix", retryable=False)
        gone = 0
        batch: list[str] = []
        for stored in self.list_prefix(prefix):
            batch.append(stored.key)
            if len(batch) == _DELETE_BATCH:
                gone += self._delete_batch(batch)
                batch = []
        return gone + (self._delete_batch(batch) if batch else 0)

    def _delete_batch(self, keys: list[str]) -> int:
        with self._translated(keys[0]):
            answer = self._client.delete_objects(
                Bucket=self._bucket,
                Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True},
            )
        failed = answer.get("Errors") or []
        if failed:
            raise StorageError(
                f"{len(failed)} of {len(keys)} objects could not be deleted: "
                f"{failed[0].get('Code', '')} for {failed[0].get('Key', '')}"
            )
        return len(keys)

    # reading

    def head(self, key: str) -> int | None:
        """Its size in bytes, or None when it is not there."""
        try:
            with self._translated(key):
                answer = self._client.head_object(Bucket=self._bucket, Key=key)
        except NotFound:
            return None
        return int(answer["ContentLength"])

    def get_bytes(self, key: str, *, range: tuple[int, int] | None = None) -> bytes:
        """All of `key`, or `range` = (first, last), both included."""
        with self.open(key, range=range) as stream:
            return stream.read()

    @contextlib.contextmanager
    def open(self, key: str, *, range: tuple[int, int] | None = None) -> Iterator[Readable]:
        """Its bytes as a stream that can be read once, forwards."""
        extra = {} if range is None else {"Range": f"bytes={range[0]}-{range[1]}"}
        with self._translated(key):
            body = self._client.get_object(Bucket=self._bucket, Key=key, **extra)["Body"]
        with contextlib.closing(body):
            yield _Body(body, lambda: self._translated(key))

    def get_file(self, key: str, path: Path) -> None:
        """Download to `path`; a half-written file is never left there."""
        partial = path.with_name(path.name + ".part")
        try:
            with self._translated(key):
                self._client.download_file(self._bucket, key, str(partial))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def list_prefix(self, prefix: str) -> Iterator[Stored]:
        """Objects below `prefix`, in the order of their keys."""
        with self._translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=prefix
            )
            for page in pages:
                for row in page.get("Contents", ()):
                    yield Stored(key=row["Key"], bytes=int(row["Size"]))

    # checking

    def check(self) -> None:
        """Write, read and delete a small object: for `doctor` and `readyz`."""
        key = f"checks/{secrets.token_hex(8)}"
        body = secrets.token_bytes(32)
        self.put_bytes(key, body)
        try:
            if self.get_bytes(key) != body:
                raise StorageError("the store gave back something else than was put into it")
        finally:
            self.delete(key)

    def verify(self, key: str, *, bytes: int, sha256: str) -> None:
        """Read `key` through: size and SHA-256 (hex).

        Raises:
            StorageError: `code` is `weights_size` or `weights_checksum`; asking again will not
                help.
            NotFound: nothing was uploaded.
        """
        self._expect_size(key, bytes)
        digest = hashlib.sha256()
        with self.open(key) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        _expect_digest(key, digest.digest(), sha256)

    def verify_safetensors(self, key: str, *, bytes: int, sha256: str) -> Weights:
        """Read `key` through: size, header, every number finite, SHA-256 (hex).

        Raises:
            StorageError: as `verify`, and `weights_format` or `weights_not_finite`.
            NotFound: nothing was uploaded.
        """
        self._expect_size(key, bytes)
        digest = hashlib.sha256()
        with self.open(key) as stream:
            weights = read_weights(stream, bytes, digest.update)
        _expect_digest(key, digest.digest(), sha256)
        return weights

    def _expect_size(self, key: str, bytes: int) -> None:
        size = self.head(key)
        if size is None:
            raise NotFound(f"nothing was uploaded to {key}")
        if size != bytes:
            raise StorageError(
                f"{key} has {size} bytes, {bytes} were announced",
                code="weights_size",
                retryable=False,
            )

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """botocore's errors as ours. Their texts hold no key: only its code and status are kept."""
        try:
            yield
        except ClientError as exc:
            if _status(exc) == 404:
                raise NotFound(f"{what} is not in the store ({_code(exc)})") from None
            raise StorageError(
                f"the store refused {what}: {_code(exc)} (HTTP {_status(exc)})",
                code="storage_refused",
                retryable=_status(exc) >= 500 or _status(exc) == 429,
            ) from None
        except BotoCoreError as exc:
            raise StorageError(
                f"the store could not be asked for {what}: {type(exc).__name__}"
            ) from None
        except OSError as exc:
            raise StorageError(f"the store's answer for {what} broke off: {exc}") from None


def _status(exc: ClientError) -> int:
    return int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(exc: ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))


def _listed(header: str) -> set[str]:
    return {item.strip().lower() for item in header.split(",")}


def _expect_digest(key: str, got: bytes, sha256: str) -> None:
    if got != _digest(sha256):
        raise StorageError(
            f"{key} has SHA-256 {got.hex()}, {sha256.lower()} was announced",
            code="weights_checksum",
            retryable=False,
        )


def _digest(sha256: str) -> bytes:
    try:
        digest = bytes.fromhex(sha256)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise StorageError(
            f"{sha256[:80]!r} is no SHA-256 in hexadecimal", code="bad_sha256", retryable=False
        )
    return digest
