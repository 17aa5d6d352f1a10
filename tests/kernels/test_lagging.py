"""Rows of earlier positions, in packed and in padded batches: sequences never meet, and nothing precedes their first items."""

import pytest
import torch

from awrsr_kernels.lagging import lag, lagged, packed_places, padded_places

LENGTHS = [3, 0, 1, 5]
H, F = 2, 3


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, H, F, generator=generator, dtype=torch.float64) for length in LENGTHS]


def by_hand(x: torch.Tensor, steps: int) -> torch.Tensor:
    """(n, H, F): row by row."""
    return torch.stack([x[i - steps] if i >= steps else torch.zeros(H, F, dtype=x.dtype) for i in range(len(x))]) if len(x) else x


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_a_row_is_an_earlier_one_of_its_own_sequence(steps: int) -> None:
    wanted = [by_hand(x, steps) for x in sequences()]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    rows = torch.cat([*sequences(), torch.ones(2, H, F)])  # the last two belong to no sequence
    found = lag(rows, steps, packed_places(cu_seqlens, len(rows)), dim=0)
    assert torch.equal(found[: sum(LENGTHS)], torch.cat(wanted))
    for side in ("left", "right"):
        x, size = torch.full((len(LENGTHS), H, 6, F), torch.nan, dtype=torch.float64), 6
        for b, each in enumerate(sequences()):
            first = size - len(each) if side == "left" else 0
            x[b, :, first : first + len(each)] = each.transpose(0, 1)
        places = padded_places(torch.tensor(LENGTHS), size, side)
        by_rows = lag(x.transpose(1, 2), steps, places, dim=-3).transpose(1, 2)
        for b, each in enumerate(wanted):
            first = size - len(each) if side == "left" else 0
            assert torch.equal(lag(x, steps, places)[b, :, first : first + len(each)], each.transpose(0, 1))
            assert torch.equal(by_rows[b, :, first : first + len(each)], each.transpose(0, 1))


@pytest.mark.parametrize("dim", [-2, -3])
def test_products_of_lagged_rows_add_up_with_their_factors(dim: int) -> None:
    q, k = (torch.randn(2, H, 6, F, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    factors = torch.tensor([[1.0, 0.5, 0.25], [2.0, 0.0, -1.0]], dtype=torch.float64)
    places = padded_places(None, 6)
    scores = q @ k.transpose(-1, -2)
    wanted = sum(factors[:, a, None, None] * torch.nn.functional.pad(scores, (a, 0, a, 0))[..., :6, :6] for a in range(3))
    turn = (lambda x: x.transpose(1, 2)) if dim == -3 else (lambda x: x)
    left, right = turn(lagged(turn(q), factors, places, dim=dim)), turn(lagged(turn(k), 3, places, dim=dim))
    torch.testing.assert_close(left @ right.transpose(-1, -2), wanted)
    shared = turn(lagged(turn(q), factors[0], places, dim=dim))
    torch.testing.assert_close(shared[:, 0], left[:, 0])
