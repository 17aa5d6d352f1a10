"""Rows without padding, which the adapters for recommender libraries share."""

import pytest
import torch

from awrsr_kernels import RefinedMultiheadAttention, refined_attention
from awrsr_kernels.integrations.packed import PackedAttention, pack, unpack

from ..conftest import DEVICE

B, L, E, H = 4, 7, 12, 3
LENGTHS = torch.tensor([7, 2, 0, 4], device=DEVICE)


def real(side: str) -> torch.Tensor:
    place = torch.arange(L, device=DEVICE)
    return place >= L - LENGTHS[:, None] if side == "left" else place < LENGTHS[:, None]


def test_items_are_packed_in_order_and_put_back() -> None:
    x = torch.randn(B, L, E, device=DEVICE)
    for side in ("left", "right"):
        mask = real(side)
        rows, where = pack(x, mask)
        assert rows.shape == (1, 13, E) and where.cu_seqlens.tolist() == [0, 7, 9, 9, 13] and where.max_seqlen == 7
        torch.testing.assert_close(unpack(rows, mask), x * mask[..., None])


def test_is_the_module_without_padding() -> None:
    attention = PackedAttention(E, H, max_len=9, rank=5, gate_init=0.5, device=DEVICE)
    plain = RefinedMultiheadAttention(E, H, max_len=9, rank=5, gate_init=0.5, device=DEVICE)
    plain.load_state_dict(attention.state_dict())
    x, mask = torch.randn(B, L, E, device=DEVICE), real("left")
    rows, where = pack(x, mask)
    found, weights = attention(rows, rows, rows, attn_mask=where, key_padding_mask=None, need_weights=False)
    torch.testing.assert_close(unpack(found, mask)[mask], plain(x, lengths=LENGTHS)[mask])
    assert weights is None


def test_queries_may_come_from_rows_of_their_own() -> None:
    for tables in ("position", "content"):
        attention = PackedAttention(E, H, max_len=9, rank=5, refinement="simple", tables=tables, bias=False, device=DEVICE)
        x, other, mask = torch.randn(B, L, E, device=DEVICE), torch.randn(B, L, E, device=DEVICE), real("left")
        q, k, v = (attention.qkv(rows).chunk(3, -1)[i].unflatten(-1, (H, -1)) for i, rows in enumerate((other, x, x)))
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        w_q, w_k = attention.w_q, attention.w_k
        if tables == "position":
            w_q, w_k = w_q[-L:], w_k[-L:]
        else:
            w_q, w_k = ((other @ w)[:, None].expand(-1, H, -1, -1) for w in attention.to_tables.chunk(2, -1))
        expected = refined_attention(q, k, v, w_q, w_k, refinement="simple", lengths=LENGTHS, backend="reference")
        (rows, where), (queries, _) = pack(x, mask), pack(other, mask)
        found, _ = attention(queries, rows, rows, attn_mask=where)
        torch.testing.assert_close(unpack(found, mask)[mask], attention.out(expected.transpose(1, 2).flatten(-2))[mask])


class Doubled(torch.nn.Linear):
    """An adapter that has a linear map's names: what is read from its weight misses what it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("how", ["replaced", "hooked"])
def test_a_map_that_is_more_than_its_weight_does_it_for_queries_of_their_own(how: str) -> None:
    attention = PackedAttention(E, H, max_len=9, refinement="none", device=DEVICE)
    doubled = Doubled(E, attention.qkv.out_features, device=DEVICE)
    doubled.load_state_dict(attention.qkv.state_dict())
    if how == "replaced":
        attention.qkv = doubled
    else:
        attention.qkv.register_forward_hook(lambda _, x, found: 2 * found)
    (rows, where) = pack(torch.randn(B, L, E, device=DEVICE), real("left"))
    expected, _ = attention(rows, rows, rows, attn_mask=where)
    other = rows.clone()  # the same numbers
    torch.testing.assert_close(attention(rows, other, other, attn_mask=where)[0], expected)


def test_the_mask_may_be_numbers() -> None:
    x, mask = torch.randn(B, L, E, device=DEVICE), real("left")
    for kind in (torch.float32, torch.int64, torch.uint8):
        (rows, where), (expected, same) = pack(x, mask.to(kind)), pack(x, mask)
        assert torch.equal(rows, expected) and torch.equal(where.cu_seqlens, same.cu_seqlens) and where.max_seqlen == 7
        assert torch.equal(unpack(rows, mask.to(kind)), unpack(rows, mask))


def test_there_may_be_no_histories() -> None:
    attention = PackedAttention(E, H, max_len=9, device=DEVICE)
    nobody = torch.zeros(0, L, dtype=torch.bool, device=DEVICE)
    rows, where = pack(torch.randn(0, L, E, device=DEVICE), nobody)
    assert rows.shape == (1, 0, E) and where.cu_seqlens.tolist() == [0] and where.max_seqlen == 0
    found = unpack(attention(rows, rows, rows, attn_mask=where)[0], nobody)
    found.sum().backward()
    assert found.shape == (0, L, E)
    assert all(value.grad is not None and not value.grad.any() for value in attention.parameters())


def test_longer_histories_are_refused_unless_tables_come_from_content() -> None:
    rows, where = pack(torch.randn(B, L, E, device=DEVICE), real("left"))
    with pytest.raises(ValueError, match="max_len is 6; it must be at least the longest history, 7 items"):
        PackedAttention(E, H, max_len=6, device=DEVICE)(rows, rows, rows, attn_mask=where)
    PackedAttention(E, H, max_len=6, tables="content", device=DEVICE)(rows, rows, rows, attn_mask=where)


def test_a_batch_may_be_all_padding() -> None:
    attention = PackedAttention(E, H, max_len=9, device=DEVICE)
    nothing = torch.zeros(B, L, dtype=torch.bool, device=DEVICE)
    rows, where = pack(torch.randn(B, L, E, device=DEVICE, requires_grad=True), nothing)
    found, _ = attention(rows, rows, rows, attn_mask=where)
    found.sum().backward()
    assert unpack(found, nothing).shape == (B, L, E)
