"""The Hugging Face Hub: find commits, download and upload folders (huggingface_hub does the work)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipcoder.errors import UserError


def commit_of(repo: str, revision: str | None, kind: str) -> str:
    """Commit hash of a hub repository (`kind`: model or dataset), asked online, else from the local cache."""
    from huggingface_hub import HfApi, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, RepositoryNotFoundError

    try:
        found = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=20).sha
        assert found is not None
        return found
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
        for repository in cached:
            for stored in repository.revisions:
                if wanted in stored.refs or stored.commit_hash.startswith(wanted):
                    return stored.commit_hash
        raise UserError(
            f"cannot reach the hub for {kind} {repo!r} ({type(error).__name__}) and it is not in the local cache; "
            f"go online once, or point at a local copy"
        ) from error


def folder_of(name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """Path of a local folder, or of a download of ORG/NAME from the Hub: of its `subfolder`, if given."""
    if (found := Path(name).expanduser()).is_dir():
        return found / subfolder if subfolder else found
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{name}: no such directory, and no ORG/NAME of the Hugging Face Hub")
    from huggingface_hub import snapshot_download

    with _explained(name):
        patterns = f"{subfolder}/*" if subfolder else None
        downloaded = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    if subfolder and not (downloaded / subfolder).is_dir():
        raise UserError(f"{name} has no folder {subfolder}")
    return downloaded / subfolder if subfolder else downloaded


def upload(folder: Path, name: str, private: bool = False) -> str:
    """Upload a folder's files to a repository, creating it if needed; return the address of the commit."""
    from huggingface_hub import HfApi

    with _explained(name):
        api = HfApi(library_name="skipcoder")
        api.create_repo(name, private=private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Coder from skipcoder").commit_url
        )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn each of the Hub's errors into a UserError."""
    import httpx
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, httpx.TransportError) as error:
        raise UserError(
            f"{name}: the Hugging Face Hub cannot be reached ({str(error).splitlines()[0]}); unset HF_HUB_OFFLINE, "
            "check the network, or give a folder of this machine"
        ) from None
    except GatedRepoError:
        raise UserError(f"{name}: accept its conditions on the Hub, then log in: hf auth login") from None
    except RevisionNotFoundError as error:
        raise UserError(f"{name}: {str(error).splitlines()[-1]}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: no such repository on the Hub, or it is private: hf auth login") from None
    except LocalTokenNotFoundError:
        raise UserError(f"{name}: log in to the Hub first: hf auth login") from None
    except HFValidationError as error:
        raise UserError(f"{name}: {error}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "; log in with a token that may write: hf auth login" if status in (401, 403) else ""
        raise UserError(f"{name}: the Hub answers {status}: {str(error).splitlines()[0]}{hint}") from None
