"""Quantisation against its definition, written out in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gptface_dist.tokenizers import codebook
from gptface_dist.tokenizers.codebook import choose_rows, hash_seed, histogram, nearest, perplexity, quantise, share_used

SMALL = st.integers(-3, 3).map(float)


@settings(deadline=None)
@given(st.data())
def test_the_nearest_code_is_nearest(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 4))
    rows = data.draw(arrays.arrays(np.float32, (data.draw(st.integers(1, 9)), width), elements=SMALL))
    book = data.draw(arrays.arrays(np.float32, (data.draw(st.integers(1, 9)), width), elements=SMALL))
    found = nearest(torch.from_numpy(rows), torch.from_numpy(book)).numpy()
    distances = np.square(rows[:, None] - book[None]).sum(2)
    assert np.array_equal(distances[np.arange(len(rows)), found], distances.min(1))


def test_parts_of_the_rows_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, book = torch.randn(100, 5, generator=generator), torch.randn(30, 5, generator=generator)
    whole = nearest(rows, book)
    monkeypatch.setattr(codebook, "DISTANCES", 7 * 30)
    assert torch.equal(nearest(rows, book), whole)
    monkeypatch.setattr(codebook, "DISTANCES", 1)
    assert torch.equal(nearest(rows, book), whole)


def test_far_from_zero_near_codes_are_told_apart() -> None:
    book = torch.tensor([[1000.0, 0.0], [1000.001, 0.0]])
    rows = torch.tensor([[1000.0004, 0.0], [1000.0008, 0.0]])
    assert nearest(rows, book).tolist() == [0, 1]


def test_quantising_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 5, generator=generator, requires_grad=True)
    book = torch.randn(7, 3, generator=generator, requires_grad=True)
    found = quantise(latents, book)
    z, e = latents.detach().numpy(), book.detach().numpy()
    expected = np.empty_like(z)
    for b, i, j in np.ndindex(2, 4, 5):
        code = int(np.square(e - z[b, :, i, j]).sum(1).argmin())
        assert int(found.codes[b, i, j]) == code
        expected[b, :, i, j] = e[code]
    assert np.array_equal(found.latents.detach().numpy(), expected), "to the bit"
    mean = float(np.square(expected - z).mean())
    assert found.codebook_loss.item() == pytest.approx(mean)
    assert found.commitment_loss.item() == pytest.approx(mean)


def test_where_gradients_go() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 3, 4, 4, generator=generator, requires_grad=True)
    book = torch.randn(7, 3, generator=generator, requires_grad=True)
    found = quantise(latents, book)
    weights = torch.randn(1, 3, 4, 4, generator=generator)

    def gradients(value: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return torch.autograd.grad(value, [latents, book], retain_graph=True, allow_unused=True)  # type: ignore[return-value]

    of_latents, of_book = gradients((found.latents * weights).sum())
    assert of_latents is not None
    assert torch.equal(of_latents, weights)
    assert of_book is None, "the picture's loss does not move codes"
    of_latents, of_book = gradients(found.codebook_loss)
    assert of_latents is None
    assert of_book is not None
    counts = histogram(found.codes, 7)
    assert torch.equal(of_book.abs().sum(1) > 0, counts > 0), "codes in use move, the others stay"
    of_latents, of_book = gradients(found.commitment_loss)
    assert of_book is None
    assert of_latents is not None
    torch.testing.assert_close(of_latents, 2 * (latents - found.latents).detach() / latents.numel())


def test_use_of_the_codebook_by_hand() -> None:
    counts = histogram(torch.tensor([[0, 0], [3, 3]]), 8)
    assert counts.tolist() == [2, 0, 0, 2, 0, 0, 0, 0]
    assert share_used(counts) == 0.25
    assert perplexity(counts) == pytest.approx(2)
    assert perplexity(torch.tensor([5, 0, 0])) == pytest.approx(1)
    frequencies = [0.5, 0.25, 0.25]
    assert perplexity(torch.tensor([2, 1, 1])) == pytest.approx(math.exp(-sum(p * math.log(p) for p in frequencies)))


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 1 << 40), st.integers(0, 1 << 30))
def test_chosen_rows(total: int, count: int, seed: int, step: int) -> None:
    rows = choose_rows(total, count, seed, step)
    assert torch.equal(rows, choose_rows(total, count, seed, step))
    assert len(rows) == count
    assert all(0 <= row < total for row in rows.tolist())
    assert count > total or len(set(rows.tolist())) == count


def test_seeds_of_neighbours_differ() -> None:
    seeds = {hash_seed(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 1 << 63 for seed in seeds)
