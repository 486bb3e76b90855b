"""Tests that every activation passes. Legend: N tokens, D input width, M latents."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from skipcoder.kernels.encode import Codes
from skipcoder.trainer.coder.activations import ACTIVATIONS
from skipcoder.trainer.coder.coder import SparseCoder, make_coder
from skipcoder.trainer.coder.fold import fold
from skipcoder.trainer.config import CoderConfig, Kind, TrainConfig
from skipcoder.trainer.data.ranks import ALONE

N, D, M, K = 50, 12, 32, 4


class ActivationTests:
    """Inherit, register the activation in ACTIVATIONS, and set its `name`."""

    name: ClassVar[str]

    @pytest.fixture(params=[Kind.sae, Kind.transcoder, Kind.skip_transcoder])
    def coder(self, request: pytest.FixtureRequest) -> SparseCoder:
        """A coder with random weights, in training mode."""
        coder = make_coder(CoderConfig(kind=request.param, activation=self.name, k=K, width=M), D, D)
        generator = torch.Generator().manual_seed(1)
        for p in coder.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
        coder.activation.begin(coder, self.inputs(), K, ALONE)
        return coder

    def inputs(self, seed: int = 0) -> Tensor:
        """Random inputs [N, D]."""
        return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))

    def test_codes_are_codes(self, coder: SparseCoder) -> None:
        for training in (True, False):
            codes = coder.train(training).encode(self.inputs())
            assert (codes.values >= 0).all() and (codes.values > 0).any()
            assert ((codes.indices >= 0) & (codes.indices < M)).all() and codes.indices.dtype == torch.int64
            values, indices = codes.padded()
            assert values.shape == indices.shape and len(values) == N
            fired = torch.zeros(N, M).index_put((codes.token, codes.indices), (codes.values > 0).float(), True)
            assert fired.max() <= 1  # no latent twice on one token
            assert torch.equal(codes.by_latent.sum_weights((codes.values > 0).float()), fired.sum(0))

    def test_a_step_gives_gradients_that_do_not_change(self, coder: SparseCoder) -> None:
        found = []
        for _ in range(2):
            coder.zero_grad(set_to_none=True)
            state = {name: tensor.clone() for name, tensor in coder.state_dict().items()}
            step = coder.activation.step(coder, K, ALONE)
            codes = step.encode(self.inputs())
            step.backward(N)
            coder.decode(codes, self.inputs()).square().sum().backward()
            terms = step.finish(1.0, first=False)
            found.append([p.grad for p in coder.parameters() if p.grad is not None] + list(terms.values()))
            coder.load_state_dict(state)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert coder.W_enc.grad is not None and self._silent(codes) <= set(_zero_rows(coder.W_enc.grad))

    def _silent(self, codes: Codes) -> set[int]:
        return set(range(M)) - set(codes.indices[codes.values > 0].tolist())

    def test_no_tokens(self, coder: SparseCoder) -> None:
        out = coder(self.inputs()[:0])
        assert out.y_hat.shape == (0, D) and len(out.values) == 0

    def test_saved_loaded_and_folded_it_says_the_same(self, coder: SparseCoder, tmp_path: Path) -> None:
        coder.activation.calibrate(coder, self.inputs())
        coder.requires_grad_(False).eval().save(tmp_path)
        again, out = SparseCoder.load(tmp_path), coder(self.inputs(2))
        assert type(again.activation) is type(ACTIVATIONS[self.name])
        folded = fold(coder, 4.0, 4.0)
        for found, scale in ((again(self.inputs(2)), 1.0), (folded(4.0 * self.inputs(2)), 4.0)):
            assert torch.equal(found.indices, out.indices) and torch.equal(found.values, out.values)
            assert torch.equal(found.y_hat, scale * out.y_hat)

    def test_the_usual_training_is_accepted(self, coder: SparseCoder) -> None:
        cfg = TrainConfig(coder=coder.cfg)
        coder.activation.check(cfg.coder)
        coder.activation.check_training(cfg)


def _zero_rows(grad_MD: Tensor) -> list[int]:
    return (~grad_MD.any(1)).nonzero()[:, 0].tolist()
