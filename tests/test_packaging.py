"""The folders at the top are packages of ours without getting in anyone's way."""

import importlib.machinery
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.cli
def test_hugging_face_kernels_and_transformers_work_beside_ours() -> None:
    """Run from the checkout, where ./kernels lies on sys.path."""
    code = (
        "import kernels, transformers, skipcoder.kernels.encode as ours\n"
        "from transformers import LlamaConfig, LlamaModel\n"
        "LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,"
        " vocab_size=9))\n"
        "print(kernels.__file__); print(ours.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    theirs, ours = done.stdout.split()
    assert Path(theirs).is_relative_to(sysconfig.get_paths()["purelib"])
    assert Path(ours).resolve() == REPO / "kernels" / "encode.py"


@pytest.mark.parametrize("folder", ["pipeline", "trainer", "evals"])
def test_no_file_beside_an_entry_point_hides_another_module(folder: str) -> None:
    """`python pipeline/cache.py` puts pipeline/, with its files and rooms, first on sys.path."""
    site = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    for path in (p for p in (REPO / folder).iterdir() if p.suffix == ".py" or (p.is_dir() and p.name[0] != "_")):
        assert path.stem not in sys.stdlib_module_names, path
        assert importlib.machinery.PathFinder.find_spec(path.stem, site) is None, path


def test_public_names() -> None:
    import skipcoder

    assert {getattr(skipcoder, name).__name__ for name in skipcoder.__all__} == set(skipcoder.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = skipcoder.Nothing
