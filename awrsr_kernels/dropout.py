"""Counter-based dropout: the same bits from every backend, layout, tile and device.

The keep bit of the weight (sequence b, query head h, row i, column j), i and j counted from the sequence's first real item, is
16 bits of Philox4x32-7 (Salmon et al., SC 2011; seven rounds are the fewest that pass BigCrush) under the seed as key and

    counter = (j // 8, h, i, b)

One call of the generator yields four 32-bit words and so serves the eight columns 8g .. 8g+7: column 8g + 2w + u takes the low
(u = 0) or high (u = 1) half of word w. A weight is kept when its 16 bits are at least round(65536 p): p is rounded to a multiple
of 1/65536, at most 65534 of them, and the scale 1/(1-p) uses the rounded p. `_triton/primitives.py` draws the same bits inside
the kernels.
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
    threshold = min(round(dropout_p * 65536), 65534)  # float16 holds the scale, 32768
    return threshold, 65536 / (65536 - threshold)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 on int64 tensors whose low halves hold 32-bit words; counters broadcast, so early rounds run on small tensors."""
    rounds = torch.arange(ROUNDS, device=seed.device)
    keys = [((seed >> 32 * i) + rounds * step & _WORD).unbind() for i, step in enumerate(_KEY_STEPS)]
    for k0, k1 in zip(*keys, strict=True):
        # c1 and c3 may carry more than their word: what the exclusive or adds above it, the mask takes away
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((high >> 32) ^ (c1 ^ k0)).bitwise_and_(_WORD)
        c2 = ((low >> 32) ^ (c3 ^ k1)).bitwise_and_(_WORD)
        c1, c3 = high, low
    return c0, c1, c2, c3


def draw(seed: Tensor, dropout_p: float, counter: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Z of the eight columns of each counter (j // 8, h, i, b), in a last dimension of its own after those they broadcast to."""
    threshold, scale = quantise(dropout_p)
    words = torch.stack([word.to(torch.int32) for word in torch.broadcast_tensors(*philox(seed, *counter))], dim=-1)
    signed = words.view(torch.int16) ^ -32768  # 16 bits compare as unsigned numbers when the highest is flipped
    return (signed >= threshold - 32768).to(dtype).mul_(scale)


def scaled_mask(
    seed: Tensor,
    dropout_p: float,
    sequence: Tensor,
    heads: int | range,
    rows: Tensor,
    columns: int,
    first: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Z of the definition: the mask times 1/(1-p), (n, heads, len(rows), columns) in `dtype`.

    seed: () int64. sequence: (n,) index in the batch. heads: how many, or which. rows: (m,) positions in the window; columns counts
    from the window's first position. first: (n,) position of the first real item in the window, None where that is position 0
    throughout.
    """
    device, n = rows.device, sequence.shape[0]
    groups = torch.arange((columns + WEIGHTS_PER_CALL - 1) // WEIGHTS_PER_CALL, device=device)
    local_rows = rows[None] if first is None else (rows[None] - first[:, None]) & _WORD
    heads = heads if isinstance(heads, range) else range(heads)
    head = torch.arange(heads.start, heads.stop, device=device).view(-1, 1, 1)
    counter = groups, head, local_rows[:, None, :, None], sequence.view(-1, 1, 1, 1)
    mask = draw(seed, dropout_p, counter, dtype).flatten(-2)
    if first is None:
        return mask[..., :columns]
    local = (torch.arange(columns, device=device) - first[:, None]).clamp_(min=0)
    return mask.gather(-1, local[:, None, None, :].expand(n, len(heads), rows.shape[0], columns))
