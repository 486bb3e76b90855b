"""Cheap fingerprints of files and hub repositories, so that a re-run can tell change from no change."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from skipcoder.pipeline.errors import UserError

_WHOLE = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def of_files(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over names below `root`, sizes and contents, in the order given.

    Files over 1 MiB are sampled (256 places of 4 KiB, both ends among them): enough for weights, which
    training changes everywhere; a text file of which only unsampled bytes changed is not noticed.
    """
    total = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        total.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                total.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                total.update(file.read(_SAMPLE_BYTES))
    return total.hexdigest()[:32]


def hub_commit(repo: str, revision: str | None, kind: str) -> str:
    """Commit hash of a hub repository (`kind`: model or dataset): asked online, else from the local cache."""
    from huggingface_hub import HfApi, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, RepositoryNotFoundError

    try:
        commit = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=20).sha
        assert commit is not None
        return commit
    except RepositoryNotFoundError:
        raise UserError(
            f"no {kind} {repo!r} on the Hugging Face hub, and no such directory here; "
            "gated and private ones need a token (HF_TOKEN)"
        ) from None
    except Exception as error:  # requests, httpx, httpx2: the hub client's HTTP errors share no base class
        try:
            cached = [r for r in scan_cache_dir().repos if r.repo_id == repo and r.repo_type == kind]
        except CacheNotFound:
            cached = []
        wanted = revision or "main"
        for found in cached:
            for stored in found.revisions:
                if wanted in stored.refs or stored.commit_hash.startswith(wanted):
                    return stored.commit_hash
        raise UserError(
            f"cannot reach the hub for {kind} {repo!r} ({type(error).__name__}) and it is not in the local cache; "
            f"go online once, or point at a local copy"
        ) from error
