"""Absorption on planted coders, and its parts."""

import numpy as np
import pytest
import scipy.sparse

from skipcoder.evals.tasks.absorption import LETTERS, Probes, Spelling, absorption, fit_probes, split_latents

E = 32
RNG = np.random.default_rng(0)
WORDS = 600
LETTER_W = RNG.integers(0, 3, WORDS)
"""Words of a, b and c."""
D = np.eye(E)[:3]
"""Their directions."""


def planted(absorbed_W: np.ndarray, scale: float = 1.0) -> tuple[scipy.sparse.csr_array, np.ndarray, np.ndarray]:
    """Codes, y and decoder: latent of the letter, except where the word's own latent (3 + its number) has taken the
    letter's direction over."""
    codes = np.zeros((WORDS, 3 + WORDS))
    W_dec = np.zeros((3 + WORDS, E))
    W_dec[:3] = D
    for w, letter in enumerate(LETTER_W):
        own = np.zeros(E)
        own[3 + w % (E - 3)] = 1
        W_dec[3 + w] = own + (D[letter] if absorbed_W[w] else 0)
        codes[w, letter] = 0 if absorbed_W[w] else 2
        codes[w, 3 + w] = 2
    W_dec *= scale
    return scipy.sparse.csr_array(codes), codes @ W_dec, W_dec


def result_of(absorbed_W: np.ndarray, scale: float = 1.0) -> dict:
    codes, y, W_dec = planted(absorbed_W, scale)
    is_it = LETTER_W[:, None] == np.arange(3)
    probes = Probes(list("abc"), D, np.where(is_it, 1.0, -1.0), dict.fromkeys("abc", 1.0))
    split = {letter: [i] for i, letter in enumerate("abc")}
    return absorption(probes, Spelling(codes, y, LETTER_W), W_dec, split)


@pytest.mark.parametrize("scale", [1.0, 0.01, 50.0])
def test_planted_absorption_scores_one_and_a_clean_coder_zero(scale: float) -> None:
    """Whatever the decoder's norms: an SAE's are 1 before its scales are folded, a transcoder's anything."""
    everywhere, nowhere = (result_of(np.full(WORDS, value), scale) for value in (True, False))
    assert everywhere["absorption_full"] == everywhere["absorption_fraction"] == 1
    assert nowhere["absorption_full"] == nowhere["absorption_fraction"] == 0
    assert everywhere["absorption_full_ci"] == [1, 1]


def test_a_third_absorbed_is_a_third() -> None:
    absorbed = RNG.random(WORDS) < 1 / 3
    found = result_of(absorbed)
    wanted = np.mean([absorbed[letter == LETTER_W].mean() for letter in range(3)])
    assert found["absorption_full"] == pytest.approx(wanted) == found["absorption_fraction"]
    low, high = found["absorption_full_ci"]
    assert low < wanted < high and high - low < 0.2
    assert [detail["letter"] for detail in found["absorption_details"]] == ["a", "b", "c"]


def test_fraction_where_the_letter_still_fires_weakly() -> None:
    """Main latent 0.6 of the projection, absorber 1.4: 0.7 of it is absorbed, none of it fully."""
    codes, _, W_dec = planted(np.full(WORDS, True))
    dense = codes.toarray()
    dense[np.arange(WORDS), LETTER_W] = 0.6
    dense[np.arange(WORDS), 3 + np.arange(WORDS)] = 1.4
    probes = Probes(list("abc"), D, np.where(LETTER_W[:, None] == np.arange(3), 1.0, -1.0), dict.fromkeys("abc", 1.0))
    spelling = Spelling(scipy.sparse.csr_array(dense), dense @ W_dec, LETTER_W)
    found = absorption(probes, spelling, W_dec, {letter: [i] for i, letter in enumerate("abc")})
    assert found["absorption_full"] == 0
    assert found["absorption_fraction"] == pytest.approx(0.7)


def test_split_latents_are_found_and_counted() -> None:
    is_letter = np.arange(1000) % 4 == 0
    codes = np.zeros((1000, 50))
    codes[is_letter, 7] = 3  # one latent tells it all
    codes[:, 20:] = RNG.random((1000, 30)) < 0.1
    assert split_latents(scipy.sparse.csr_array(codes), is_letter)[0] == [7]
    for scale in (1e-3, 1e3):  # the same coder, its decoder the other way
        assert split_latents(scipy.sparse.csr_array(scale * codes), is_letter)[0] == [7]
    assert split_latents(scipy.sparse.csr_array((1000, 50)), is_letter) == ([], [])
    halves = np.flatnonzero(is_letter)
    codes[:, 7] = 0
    codes[halves[::2], 7] = 3
    codes[halves[1::2], 9] = 3  # two that share the work
    assert set(split_latents(scipy.sparse.csr_array(codes), is_letter)[0]) == {7, 9}
    codes[:, [7, 9]] = 0
    codes[~is_letter, 5] = 3  # the only help is a latent that says no
    assert 5 not in split_latents(scipy.sparse.csr_array(codes), is_letter)[0]


def test_probes_find_planted_directions_and_leave_out_letters_that_cannot_be_told() -> None:
    letters = np.arange(1200) % 4
    y = 0.1 * RNG.standard_normal((1200, E))
    y[:, :3] += 2 * (letters[:, None] == np.arange(3))  # the fourth letter leaves no trace but their absence
    half = 600
    probes = fit_probes(y[:half], letters[:half], y[half:], letters[half:])
    assert {"a", "b", "c"} <= set(probes.letters) <= set(LETTERS[:4])
    for letter in "abc":
        d = probes.directions_AE[probes.letters.index(letter)]
        assert np.linalg.norm(d) == pytest.approx(1)
        assert d.argmax() == LETTERS.index(letter)
    noise = fit_probes(y[:half, 3:], letters[:half], y[half:, 3:], letters[half:])
    assert noise.letters == [] and set(noise.f1) == set(LETTERS[:4])
    empty = absorption(
        noise, Spelling(scipy.sparse.csr_array((half, 5)), y[half:, 3:], letters[half:]), np.ones((5, E - 3)), {}
    )
    assert empty["absorption_full"] is None and empty["absorption_letters"] == 0
