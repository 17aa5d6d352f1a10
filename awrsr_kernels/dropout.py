"""Counter-based dropout: the same bits from every backend, layout, tile and device.

The keep bit of the weight (sequence b, query head h, row i, column j), i and j counted from the sequence's first real item, is
16 bits of Philox4x32-7 (Salmon et al., SC 2011; seven rounds are the fewest that pass BigCrush) under the seed as key and

    counter = (j // 8, h, i, b)

One call of the generator yields four 32-bit words and so serves the eight columns 8g .. 8g+7: column 8g + 2w + u takes the low
(u = 0) or high (u = 1) half of word w. A weight is kept when its 16 bits are at least round(65536 p): p is rounded to a multiple
of 1/65536, and the scale 1/(1-p) uses the rounded p. `_triton/primitives.py` draws the same bits inside the kernels.
"""

import torch
from torch import Tensor

WEIGHTS_PER_CALL = 8
ROUNDS = 7

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def quantise(dropout_p: float) -> tuple[int, float]:
    """(threshold, scale): keep a weight when its 16 bits are >= threshold, multiply what is kept by scale."""
    threshold = min(round(dropout_p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 on int64 tensors that hold 32-bit words; counters broadcast, so early rounds run on small tensors."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((high >> 32) & _WORD) ^ c1 ^ k0, ((low >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = high & _WORD, low & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep_bits(seed: Tensor, sequence: Tensor, heads: int, rows: Tensor, columns: int, first: Tensor | None) -> Tensor:
    """(n, heads, len(rows), columns) int64 below 65536: the 16 bits that decide over each weight of n sequences.

    seed: () int64. sequence: (n,) index in the batch. rows: (m,) positions in the window; columns counts from the window's
    first position. first: (n,) position of the first real item in the window, None where that is position 0 throughout.
    """
    device, n = rows.device, sequence.shape[0]
    groups = torch.arange((columns + WEIGHTS_PER_CALL - 1) // WEIGHTS_PER_CALL, device=device)
    local_rows = rows[None] if first is None else (rows[None] - first[:, None]) & _WORD
    words = philox(
        seed,
        groups.view(1, 1, 1, -1),
        torch.arange(heads, device=device).view(1, -1, 1, 1),
        local_rows[:, None, :, None],
        sequence.view(-1, 1, 1, 1),
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(halves, dim=-1).flatten(-2)
    if first is None:
        return bits[..., :columns]
    local = (torch.arange(columns, device=device) - first[:, None]).clamp_(min=0)
    return bits.gather(-1, local[:, None, None, :].expand(n, heads, rows.shape[0], columns))


def scaled_mask(
    seed: Tensor,
    dropout_p: float,
    sequence: Tensor,
    heads: int,
    rows: Tensor,
    columns: int,
    first: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Z of the definition: the mask times 1/(1-p), (n, heads, len(rows), columns) in `dtype`."""
    threshold, scale = quantise(dropout_p)
    return (keep_bits(seed, sequence, heads, rows, columns, first) >= threshold).to(dtype).mul_(scale)
