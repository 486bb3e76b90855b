"""The place at a path or an address."""

from pathlib import Path

from skipcoder.errors import UserError
from skipcoder.pipeline.store.objects import Bucket
from skipcoder.pipeline.store.place import Directory, Place

SCHEMES = ("s3://", "gs://")


def place_at(path: str | Path | Place) -> Place:
    """Directory for a path, Bucket for an address; UserError for what can be neither."""
    if isinstance(path, Place):
        return path
    if "://" not in str(path):
        if not Path(path).name:
            raise UserError(f"{str(path)!r} cannot be a store; name a directory of its own")
        return Directory(Path(path))
    if not str(path).startswith(SCHEMES):
        raise UserError(f"{path}: only paths and addresses that begin with {' or '.join(SCHEMES)} can be stores")
    address = str(path).rstrip("/")
    if "/" not in address.split("://")[1]:
        raise UserError(f"{path}: a store needs a name inside the bucket, as {address}/name.zarr")
    return Bucket(address)


def beside(store: Place) -> Place:
    """Return the place beside a store for what can be recomputed from it (`NAME.derived/`)."""
    return place_at(f"{store.parent}/{store.stem}.derived")
