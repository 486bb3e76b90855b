"""Stores in object stores, through obstore: `s3://bucket/x.zarr`, `gs://bucket/x.zarr`.

A file appears whole when its upload has ended; `create` is a conditional put (`If-None-Match: *`), which on S3, GCS
and S3-compatible servers succeeds for one of several writers.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from skipcoder.errors import UserError
from skipcoder.pipeline.store.place import Place


class Bucket(Place):
    """A prefix of a bucket, through obstore. Account and endpoint come from the environment (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, ...) or from the machine's own role."""

    parallel = 32

    address = ""

    def __init__(self, address: str) -> None:
        self.address = address
        with _explained(address):
            self._store = _connect(address)

    def __str__(self) -> str:
        return self.address

    def read(self, name: str) -> bytes:
        import obstore

        with _explained(self.address):
            return bytes(obstore.get(self._store, name).bytes())

    def read_range(self, name: str, start: int, length: int) -> np.ndarray:
        import obstore

        with _explained(self.address):
            try:
                if start < 0:
                    content = obstore.get(self._store, name, options={"range": {"suffix": -start}}).bytes()
                else:
                    content = obstore.get_range(self._store, name, start=start, length=length)
            except obstore.exceptions.BaseError:
                if obstore.head(self._store, name)["size"] > max(start, 0):
                    raise
                return np.empty(0, np.uint8)  # beyond the end of a file, which servers refuse
            return np.frombuffer(memoryview(content), np.uint8)[:length]

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        import obstore

        with _explained(self.address):
            obstore.put(self._store, name, pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def create(self, name: str, content: bytes) -> bool:
        import obstore

        with _explained(self.address):
            try:
                obstore.put(self._store, name, content, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
        return True

    def delete(self, name: str) -> None:
        import obstore

        with _explained(self.address), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, name)

    def sizes(self, folder: str = "") -> dict[str, int]:
        import obstore

        with _explained(self.address):
            found = (o for some in obstore.list(self._store, folder or None) for o in some)
            return {o["path"]: o["size"] for o in found if o["path"]}  # "": what web consoles create for a folder

    def is_empty(self) -> bool:
        import obstore

        with _explained(self.address):
            return not any(o["path"] for some in obstore.list(self._store, chunk_size=10) for o in some)

    def exists(self, name: str) -> bool:
        import obstore

        try:
            with _explained(self.address):
                obstore.head(self._store, name)
        except FileNotFoundError:
            return False
        return True

    @property
    def parent(self) -> Place:
        return Bucket(self.address.rsplit("/", 1)[0])

    def neighbours(self) -> list[Place]:
        import obstore

        parent = str(self.parent)
        with _explained(parent):
            found = obstore.list_with_delimiter(_connect(parent))["common_prefixes"]
        addresses = [f"{parent}/{name.rstrip('/')}" for name in sorted(found)]
        return [Bucket(a) for a in addresses if a.endswith(".zarr") and a != self.address]

    def zarr(self) -> Any:
        from zarr.storage import ObjectStore

        return ObjectStore(self._store)

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[bool]:
        """Yield False: object stores have no locks that end with a process. Two captures of the same configuration
        write the same bytes, and records are made by `create`."""
        yield False


@lru_cache(maxsize=64)
def _connect(address: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError:
        raise UserError(f"{address}: object stores need: pip install 'skipcoder[cloud]'") from None
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")  # such as a server on this machine
    return from_url(address, client_options={"allow_http": True} if plain else None)


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn obstore's errors, which come after its own retries, into a UserError; pass on FileNotFoundError."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        raise UserError(
            f"{address}: {str(error).splitlines()[0]}; check the address, the account (AWS_ACCESS_KEY_ID, "
            "GOOGLE_SERVICE_ACCOUNT, ...) and AWS_ENDPOINT_URL"
        ) from None
