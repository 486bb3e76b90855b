"""The other tools themselves read what we write, and we what they write, on real SmolLM2 activations. Each part is
skipped where its tool is not at hand; none of them goes into our environment:

    pip install --no-deps --target DIR eai-sparsify schedulefree einops simple-parsing docstring-parser
    pip install --no-deps --target DIR sae-lens transformer-lens beartype better-abc jaxtyping fancy-einsum \
        typeguard wadler-lindig python-dotenv
    git clone https://github.com/decoderesearch/circuit-tracer    # not the package of that name on PyPI
    PYTHONPATH=DIR:circuit-tracer pytest tests/trainer/formats/test_peers.py
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder import readers
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.convert import converted
from skipcoder.trainer.config import MLP_KINDS, ActivationName, Kind
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.formats import circuit_tracer, saelens, sparsify
from skipcoder.trainer.formats.fit import Sample, fit
from tests.conftest import REPO
from tests.test_real_model import command
from tests.trainer.coders import assert_same_function, meta, random_coder

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would run in Triton's interpreter, as our kernels do here
D, WIDTH, K = 576, 2048, 16
CHOICES = (ActivationName.topk, ActivationName.groupmax)
TRANSCODERS = (Kind.transcoder, Kind.skip_transcoder)


def peer(name: str) -> Any:
    if name.startswith("circuit_tracer"):  # it wants huggingface_hub below 1, for one constant
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False  # type: ignore[attr-defined]
    return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    if not any(map(find_spec, ("sparsify", "sae_lens", "circuit_tracer"))):
        pytest.skip("no other tool is at hand")
    path = tmp_path_factory.mktemp("real") / "s.zarr"
    command("pipeline/cache.py", f"store.path={path}", "data.tokens=16384", "store.unit_rows=2")
    return Sample.of(ActivationStore.open(path), "layers.10.mlp", TokenFilter(), "train", 1024)


def coder_of(kind: Kind, activation: ActivationName) -> Any:
    coder = random_coder(kind, activation, D, WIDTH, K)
    coder.meta = meta("layers.0.mlp", kind)
    return coder


@pytest.mark.parametrize("activation", CHOICES)
@pytest.mark.parametrize("kind", MLP_KINDS)
def test_sparsify_loads_ours(kind: Kind, activation: ActivationName, sample: Sample, tmp_path: Path) -> None:
    theirs = peer("sparsify")
    coder = coder_of(kind, activation)
    sparsify.write(coder, tmp_path / "layers.10.mlp")
    loaded = theirs.SparseCoder.load_from_disk(tmp_path / "layers.10.mlp")
    x = sample.x_ND.float()
    assert_same_function(coder, x, loaded(x, x if kind == Kind.sae else sample.y_NE.float()).sae_out.detach())
    assert list(theirs.SparseCoder.load_many(str(tmp_path), local=True)) == ["layers.10.mlp"]


@pytest.mark.parametrize("kind", MLP_KINDS)
def test_a_coder_trained_by_sparsify_has_its_own_fvu(
    kind: Kind, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its Trainer, which saves it; its FVU of a batch is that of ours on the same batch."""
    peer("sparsify")
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    from peer_sparsify import Playback, Recipe
    from peer_sparsify import fit as trained

    x, y = sample.x_ND.float(), sample.y_NE.float()
    if kind is Kind.sae:
        x = y
    rows_RT = torch.arange(len(x)).view(-1, 32).repeat(5, 1)  # 40 steps of 128 tokens
    mine = trained(Playback(x, y), Playback.hookpoint, rows_RT, 4, Recipe(kind, K, 1024, 1e-2, 0), tmp_path)
    saved = tmp_path / "run" / Playback.hookpoint
    coder = readers.read(saved)
    assert isinstance(coder, SparseCoder)
    with torch.no_grad():
        theirs = mine(x, y)
    found = fit(coder, Sample(x, y), "output" if kind is Kind.sae else "input", "output")["fvu"]
    # Of a sum of squares of float32; the mean over 1,024 tokens is theirs in float32 too.
    assert theirs.fvu < 0.9 and found == pytest.approx(float(theirs.fvu), rel=1e-4)
    assert_same_function(coder, x, theirs.sae_out)
    sparsify.write(coder, tmp_path / "again")
    assert (tmp_path / "again" / sparsify.MARK).read_bytes() == (saved / sparsify.MARK).read_bytes()


@pytest.mark.parametrize("activation", [ActivationName.topk, ActivationName.batchtopk, ActivationName.jumprelu])
@pytest.mark.parametrize("kind", MLP_KINDS)
def test_saelens_loads_ours(kind: Kind, activation: ActivationName, sample: Sample, tmp_path: Path) -> None:
    theirs = peer("sae_lens")
    if activation == ActivationName.topk:
        import skipcoder.trainer.formats.saelens_classes  # noqa: F401 (registers the classes)
    coder = coder_of(kind, activation)
    saelens.write(coder, tmp_path, {"note": "kept"})
    loaded = theirs.SAE.load_from_disk(str(tmp_path))
    assert loaded.cfg.metadata.hook_name_out == "blocks.0.hook_mlp_out" and loaded.cfg.metadata.note == "kept"
    with torch.no_grad():
        assert_same_function(coder, sample.x_ND, loaded(sample.x_ND.float()))


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_saelens_loads_thresholds_without_our_classes(kind: Kind, sample: Sample, tmp_path: Path) -> None:
    theirs = peer("sae_lens")
    coder = converted(coder_of(kind, ActivationName.topk), sample.x_ND)
    assert fit(coder, sample, "input", "output")["l0"] == pytest.approx(K, abs=0.1)
    saelens.write(coder, tmp_path)
    with torch.no_grad():
        assert_same_function(coder, sample.x_ND, theirs.SAE.load_from_disk(str(tmp_path))(sample.x_ND.float()))


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "transcoder", "jumprelu_skip_transcoder"])
def test_we_load_saelens(architecture: str, subtracts: bool, sample: Sample, tmp_path: Path) -> None:
    peer("sae_lens")
    from sae_lens.registry import get_sae_class

    is_transcoder = architecture.endswith("transcoder")
    if is_transcoder and subtracts:
        return
    cls, config = get_sae_class(architecture)
    extra = {"d_out": D} if is_transcoder else {}
    extra |= {"k": K, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    theirs = cls(config(d_in=D, d_sae=WIDTH, apply_b_dec_to_input=subtracts, **extra))
    torch.manual_seed(0)
    for name, tensor in theirs.named_parameters():
        torch.nn.init.normal_(tensor, 1.0 if name == "threshold" else 0.0, D**-0.5)
    theirs.save_model(tmp_path)
    coder = readers.read(tmp_path)
    assert isinstance(coder, SparseCoder)
    with torch.no_grad():
        assert_same_function(coder, sample.x_ND, theirs(sample.x_ND.float()))


@pytest.mark.parametrize("activation", [ActivationName.topk, ActivationName.jumprelu])
@pytest.mark.parametrize("kind", TRANSCODERS)
def test_circuit_tracer_loads_ours(kind: Kind, activation: ActivationName, sample: Sample, tmp_path: Path) -> None:
    theirs = peer("circuit_tracer.utils.hf_utils")
    coders = []
    for layer in (1, 0):
        coder = coder_of(kind, activation)
        coder.meta = meta(f"layers.{layer}.mlp", kind)
        coder.b_dec += layer
        coders.append(coder)
    circuit_tracer.write(coders, tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    paths = [str(tmp_path / f"layer_{layer}.safetensors") for layer in (0, 1)]
    loaded = theirs.load_transcoders(
        config | {"transcoders": paths, "repo_id": "", "scan": "ours"}, lazy_decoder=False, device=torch.device("cpu")
    )
    assert loaded.feature_input_hook == "mlp.hook_in" and loaded.feature_output_hook == "hook_mlp_out"
    for layer, coder in ((1, coders[0]), (0, coders[1])):
        with torch.no_grad():
            assert_same_function(coder, sample.x_ND, loaded[layer](sample.x_ND.float()))
        again = readers.read(tmp_path, layer=layer)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), coder.parameters(), strict=True))
