"""SparseCoderSet: coders of several hookpoints of one model, at most one of each."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from natsort import natsorted

from skipcoder import hub
from skipcoder.errors import UserError
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.files import find_tensors


class SparseCoderSet(Mapping[str, SparseCoder]):
    """{hookpoint: its coder}, in natural order of the hookpoints; `skipcoder.splice(model, coders)` takes it."""

    def __init__(self, coders: Mapping[str, SparseCoder], name: str = "these coders") -> None:
        self._coders = {hookpoint: coders[hookpoint] for hookpoint in natsorted(coders)}
        if not coders:
            raise UserError(f"{name} holds no coder")
        models = {str(coder.meta.get("model")) for coder in coders.values()}
        if len(models) > 1:
            raise UserError(f"{name}: coders of different models: {'; '.join(sorted(models))}")

    @classmethod
    def load(cls, folder: str | Path) -> "SparseCoderSet":
        """Load the coders in the subfolders of a folder: runs of `hookpoint='layers.*.mlp'`, or an export of them.
        UserError if there are none, or if two are of one hookpoint or of different models."""
        found: dict[str, SparseCoder] = {}
        for path in coder_folders(Path(folder)):
            coder = SparseCoder.load(path)
            hookpoint = coder.meta.get("hookpoint", path.name)
            if hookpoint in found:
                raise UserError(f"{path} and {found[hookpoint].folder} are both of {hookpoint}: a set has one of each")
            found[hookpoint] = coder
        return cls(found, str(folder))

    @classmethod
    def from_pretrained(cls, name: str, revision: str | None = None, subfolder: str | None = None) -> "SparseCoderSet":
        """Load a set from a folder, or from ORG/NAME on the Hugging Face Hub."""
        return cls.load(hub.folder_of(name, revision, subfolder))

    def __getitem__(self, hookpoint: str) -> SparseCoder:
        return self._coders[hookpoint]

    def __iter__(self) -> Iterator[str]:
        return iter(self._coders)

    def __len__(self) -> int:
        return len(self._coders)

    def __repr__(self) -> str:
        names, first = list(self), next(iter(self.values()))
        what = f"{first.cfg.kind}, {first.cfg.activation} k={first.cfg.k}, {first.cfg.width:,} latents"
        return f"<{type(self).__name__} of {len(self)}: {names[0]} to {names[-1]}; the first: {what}>"


def coder_folders(folder: Path) -> list[Path]:
    """Return the subfolders of a folder that hold a coder, in natural order; UserError if it is none or has none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory")
    if find_tensors(folder):
        raise UserError(f"{folder} is one coder, not a set: name the folder that holds the runs of all hookpoints")
    within = natsorted(path for path in folder.iterdir() if path.is_dir())
    found = [path for path in within if find_tensors(path)]
    if not found:
        raise UserError(f"{folder} holds no folder with a coder; train a set with hookpoint='layers.*.mlp'")
    return found
