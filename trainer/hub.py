"""The Hugging Face Hub: folders from it and to it (huggingface_hub does the work)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipcoder.pipeline.errors import UserError


def folder_of(name: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """A folder of this machine, or ORG/NAME on the Hub, of which `subfolder` (or all) is downloaded."""
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
    """Put a folder's files into a repository, making it where there is none; returns the address of the commit."""
    from huggingface_hub import HfApi

    with _explained(name):
        api = HfApi(library_name="skipcoder")
        api.create_repo(name, private=private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Coder from skipcoder").commit_url
        )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What the Hub cannot do becomes one message."""
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
