"""Tests that every codec passes. Legend: N tokens, D channels."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from skipcoder.pipeline.store.codec import Arrays, Codec, Spec

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
            assert coded[suffix].dtype == np.dtype(spec.dtype), suffix
            assert coded[suffix].shape[0] == (1 if spec.per_unit else N), suffix
            assert coded[suffix].ndim == (2 if spec.wide else 1), suffix

    def test_what_comes_back(self) -> None:
        z_ND = self.activations()
        decoded_ND = self.codec.decode(self.codec.encode(z_ND))
        assert decoded_ND.dtype == torch.bfloat16 and decoded_ND.shape == z_ND.shape
        error = (decoded_ND.double() - z_ND.double()).square().sum()
        assert error <= self.lost * (z_ND.double() - z_ND.double().mean(0)).square().sum()

    def test_same_bytes_every_time(self) -> None:
        once, again = self.codec.encode(self.activations()), self.codec.encode(self.activations())
        assert all(once[suffix].tobytes() == again[suffix].tobytes() for suffix in once)

    def test_any_range_of_rows_can_be_decoded(self) -> None:
        coded = self.codec.encode(self.activations())
        some = {s: coded[s] if spec.per_unit else coded[s][7:50] for s, spec in self.codec.arrays.items()}
        assert torch.equal(self.codec.decode(_copies(some)), self.codec.decode(_copies(coded))[7:50])

    def test_holes_decode_to_nan(self) -> None:
        coded = self.codec.encode(self.activations()[:2])
        hole = {suffix: _hole(coded[suffix], spec) for suffix, spec in self.codec.arrays.items()}
        assert self.codec.decode(_copies(hole)).isnan().all()
        assert self.codec.decode({**_copies(coded), "": hole[""]}).isnan().all()  # a hole in the codes alone

    def test_codes_that_are_the_values_decode_where_they_lie(self) -> None:
        z_ND = self.activations()
        values_ND = torch.empty(N, D, dtype=torch.bfloat16)
        codes = self.codec.codes_of(values_ND)
        if codes is None:
            pytest.skip("codes are other numbers than the values")
        codes[:] = self.codec.encode(z_ND)[""]
        assert torch.equal(values_ND, z_ND)


def _hole(array: np.ndarray, spec: Spec) -> np.ndarray:
    return np.full(array.shape, spec.fill_value, spec.dtype)


def _copies(coded: Arrays) -> Arrays:
    """Copy the arrays: decoding may reuse their memory."""
    return {suffix: array.copy() for suffix, array in coded.items()}
