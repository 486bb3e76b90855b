"""Tests that every codec passes. Legend: N tokens, D channels."""

from typing import ClassVar

import torch

from skipcoder.pipeline.store.codecs import Codec, Coded, Spec

N, D = 96, 20


class CodecTests:
    """Inherit, and set `codec`."""

    codec: ClassVar[type[Codec]]
    lost: ClassVar[float] = 0.0
    """Largest share of the variance of normally distributed bfloat16 activations that may be lost."""

    def activations(self) -> torch.Tensor:
        """Random activations [N, D], with channels of different size."""
        z_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, D)
        return z_ND.to(torch.bfloat16)

    def test_arrays_are_those_described(self) -> None:
        coded = self.codec.encode(self.activations())
        assert coded.keys() == self.codec.arrays.keys()
        for suffix, spec in self.codec.arrays.items():
            assert coded[suffix].dtype == getattr(torch, spec.dtype), suffix
            assert coded[suffix].shape[0] == (1 if spec.per_unit else N), suffix
            assert coded[suffix].shape[1:] == (() if spec.width is None else (spec.width(D),)), suffix

    def test_what_comes_back(self) -> None:
        z_ND = self.activations()
        decoded_ND = self._decoded(self.codec.encode(z_ND))
        error = (decoded_ND.double() - z_ND.double()).square().sum()
        assert error <= self.lost * (z_ND.double() - z_ND.double().mean(0)).square().sum()
        assert torch.equal(decoded_ND, z_ND) or not self.codec.exact

    def test_same_bytes_every_time(self) -> None:
        once, again = self.codec.encode(self.activations()), self.codec.encode(self.activations())
        assert all(torch.equal(once[suffix], again[suffix]) for suffix in once)

    def test_any_range_of_rows_can_be_decoded(self) -> None:
        coded = self.codec.encode(self.activations())
        some = {s: coded[s] if spec.per_unit else coded[s][7:50] for s, spec in self.codec.arrays.items()}
        assert torch.equal(self._decoded(some), self._decoded(coded)[7:50])

    def test_holes_decode_to_nan(self) -> None:
        coded = self.codec.encode(self.activations()[:2])
        hole = {suffix: _hole(coded[suffix], spec) for suffix, spec in self.codec.arrays.items()}
        assert self._decoded(hole).isnan().all()

    def _decoded(self, coded: Coded) -> torch.Tensor:
        """Decode copies: decoding may reuse the memory of the codes."""
        z_ND = torch.empty(coded[""].shape, dtype=torch.bfloat16)
        self.codec.decode({suffix: array.clone() for suffix, array in coded.items()}, z_ND)
        return z_ND


def _hole(array: torch.Tensor, spec: Spec) -> torch.Tensor:
    return torch.full_like(array, spec.fill_value)
