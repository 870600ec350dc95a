"""`Store` on S3 (or what speaks its protocol) and on Google Cloud Storage.

A PUT becomes visible whole or not at all, so files are written under their own names. There is no
rename: `publish` is a copy on the server, then a delete. A crash between the two leaves the
attempt beside the part, and neither counts: **the PUT of the commit record is the commit point**.
Until it, a resume deletes both; after it, only the leftover attempt.

The record, like every file whose name must be free, is created by one conditional request:
`If-None-Match: *` on S3, `x-goog-if-generation-match: 0` on Google's. pyarrow's filesystems cannot
send it (apache/arrow issue 44281), so these few small writes go through `obstore` (Rust's
object_store), and all others through pyarrow. Amazon S3, Google Cloud Storage, MinIO and Cloudflare
R2 honour the condition, and so does the moto server that the tests run against; a server that
ignores it would let two coordinators create one name, and only the lock would keep them apart.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from functools import cached_property
from typing import Any

from eevp_batch.errors import UsageError, first_line
from eevp_batch.storage import location
from eevp_batch.storage.retries import may_pass
from eevp_batch.storage.store import Store

OBJECT_STORES = ("s3", "gcs")

# For the conditional requests; `retries` repeats them, and knows its own object when it sees it.
_NO_RETRIES = {"max_retries": 0, "retry_timeout": timedelta(seconds=60)}
_NEEDED = (
    "an output on an object store needs obstore and boto3: pip install 'eevp-batch[object-store]'"
)


class ObjectStore(Store):
    """A prefix in a bucket."""

    creates_atomically = True
    reads_at_once = 32

    def publish(self, src: str, dst: str) -> None:
        """See `Store.publish`; `src` is deleted once `dst` is whole."""
        self._try(f"copying {src} to {dst}", lambda: self._copy(src, dst))
        self.delete(src, missing_ok=True)

    def delete(self, rel: str, missing_ok: bool = False) -> None:
        """See `Store.delete`; without a look first, where nothing depends on it."""
        if not missing_ok:
            super().delete(rel)
            return
        with contextlib.suppress(FileNotFoundError):
            self._try(f"deleting {rel}", lambda: self._remove(rel))

    def _write(self, rel: str, data: bytes) -> None:
        self._put(rel, data)

    def _copy(self, src: str, dst: str) -> None:
        try:
            self.filesystem.copy_file(self.path(src), self.path(dst))
        except OSError as error:
            if may_pass(error) or self._exists(src):
                raise
            raise FileNotFoundError(f"{self.text}: no file {src}") from error

    def _create(self, rel: str, data: bytes) -> None:
        """One conditional PUT; other clients' ways to fail become the `OSError`s of ours."""
        obstore, bucket = self._conditional
        key = self.path(rel).partition("/")[2]
        try:
            obstore.put(bucket, key, data, mode="create", use_multipart=False)
        except obstore.exceptions.AlreadyExistsError as error:
            # S3 says the same (409) while another request for the name is under way.
            if not self._exists(rel):
                raise ConnectionError(f"{rel}: connection aborted: {first_line(error)}") from error
            raise FileExistsError(f"{self.text}: {rel} exists already") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.text}: no such bucket: {first_line(error)}") from error
        except (
            obstore.exceptions.PermissionDeniedError,
            obstore.exceptions.UnauthenticatedError,
        ) as error:
            raise PermissionError(f"{self.text}: {rel}: {first_line(error)}") from error
        except obstore.exceptions.BaseError as error:
            raise OSError(f"{rel}: {first_line(error)}") from error

    def _create_folder(self, folder: str) -> None:
        """There are no folders."""

    @cached_property
    def _conditional(self) -> tuple[Any, Any]:
        """The module for conditional requests, and the bucket as it sees it.

        Raises:
            UsageError: it is not installed, or finds no credentials.
        """
        try:
            import obstore
            import obstore.store
        except ImportError as error:
            raise UsageError(f"{self.text}: {_NEEDED}") from error
        name = self.root.partition("/")[0]
        options = location.client_options(self.filesystem)
        opened = _open_s3 if self.filesystem.type_name == "s3" else _open_google
        try:
            return obstore, opened(obstore.store, name, options)
        except ImportError as error:
            raise UsageError(f"{self.text}: {_NEEDED}") from error
        except (ValueError, obstore.exceptions.BaseError) as error:
            raise UsageError(f"{self.text}: cannot be written to: {first_line(error)}") from error


def _open_s3(stores: Any, bucket: str, options: dict[str, Any]) -> Any:
    """The bucket that a pyarrow filesystem with these options sees, for obstore.

    boto3 finds credentials where pyarrow does: environment, profiles, roles of the machine.
    """
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

    own: dict[str, Any] = {"region": options["region"]}
    if options["anonymous"]:
        own["skip_signature"] = True
    else:
        session = boto3.Session(region_name=options["region"])
        own["credential_provider"] = Boto3CredentialProvider(session)
    endpoint = options["endpoint_override"]
    if endpoint:
        own["endpoint"] = endpoint if "://" in endpoint else f"{options['scheme']}://{endpoint}"
    return stores.S3Store(
        bucket,
        virtual_hosted_style_request=options["force_virtual_addressing"],
        client_options=_client(own.get("endpoint", "")),
        retry_config=_NO_RETRIES,
        **own,
    )


def _open_google(stores: Any, bucket: str, options: dict[str, Any]) -> Any:
    """As `_open_s3`; credentials are the application's default ones, as pyarrow's are."""
    own: dict[str, Any] = {}
    endpoint = options["endpoint_override"]
    if endpoint:
        own["base_url"] = f"{options['scheme'] or 'https'}://{endpoint}"
    client = _client(own.get("base_url", ""))
    return stores.GCSStore(bucket, client_options=client, retry_config=_NO_RETRIES, **own)


def _client(endpoint: str) -> dict[str, Any]:
    return {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=location.CONNECT_TIMEOUT_S),
        "timeout": timedelta(seconds=location.REQUEST_TIMEOUT_S),
    }
