"""Training windows and batches against brute force: what is trained on, in which order, by which process."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awrsr.data.histories import Histories, spans
from awrsr.data.splits import Split, split
from awrsr.training.batches import Batch, Windows

from .small import as_numbered, make_lists

Pair = tuple[int, int]  # places in the flat array: of an event, of its target


@st.composite
def splits(draw: Any) -> Split:
    """Any histories, cut anywhere; items are all different, so that an item says where it stood."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in lengths]
    train_end, validation_end = np.array(ends, dtype=np.int64).T
    histories = Histories(np.arange(offsets[-1]), offsets, np.arange(offsets[-1]), np.arange(len(lengths)))
    return Split(histories, train_end, validation_end)


def sequences(parts: Split, max_len: int, windows: str) -> list[list[Pair]]:
    """By brute force: the pairs of each training sequence."""
    found = []
    for user, begin in enumerate(parts.histories.offsets[:-1].tolist()):
        pairs = [(begin + i, begin + i + 1) for i in range(int(parts.train_end[user]) - 1)]
        while pairs:
            found.append(pairs[-max_len:])
            pairs = pairs[:-max_len] if windows == "all" else []
    return found


def sequences_of(batch: Batch) -> list[list[Pair]]:
    bounds = batch.cu_seqlens.tolist()
    pairs = list(zip(batch.items.tolist(), batch.targets.tolist(), strict=True))
    return [pairs[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def windows_of(parts: Split, max_len: int, windows: str) -> Windows | None:
    """None where there is nothing to train on, which must be an error."""
    if sequences(parts, max_len, windows):
        return Windows(parts, max_len, windows)
    with pytest.raises(ValueError, match="no history has two events for training"):
        Windows(parts, max_len, windows)
    return None


kinds = st.sampled_from(["last", "all"])


@given(splits(), st.integers(1, 6), kinds)
def test_windows_are_those_of_brute_force(parts: Split, max_len: int, kind: str) -> None:
    windows = windows_of(parts, max_len, kind)
    if windows is None:
        return
    found = [[(i, i + 1) for i in range(a, a + n)] for a, n in zip(windows.start.tolist(), windows.length.tolist(), strict=True)]
    assert sorted(found) == sorted(sequences(parts, max_len, kind)) and len(windows) == len(found)


@given(splits(), st.integers(1, 6), kinds, st.integers(1, 5), st.integers(0, 3))
def test_every_pair_is_trained_on_once_per_epoch(parts: Split, max_len: int, kind: str, batch_size: int, epoch: int) -> None:
    windows = windows_of(parts, max_len, kind)
    if windows is None:
        return
    found = [each for batch in windows.batches(batch_size, 0, epoch) for each in sequences_of(batch)]
    assert sorted(found) == sorted(sequences(parts, max_len, kind))


@given(splits(), st.integers(1, 6), kinds)
def test_what_is_held_out_is_never_trained_on(parts: Split, max_len: int, kind: str) -> None:
    windows = windows_of(parts, max_len, kind)
    if windows is None:
        return
    held_out: set[int] = set()
    for part in ("validation", "test"):
        users, places = parts.targets(part)
        held_out |= set((parts.histories.offsets[users] + places).tolist())
    for batch in windows.batches(3, 0, 0):
        assert not held_out & set(batch.items.tolist()) and not held_out & set(batch.targets.tolist())


@pytest.mark.parametrize("how", ["leave-one-out", "last-n", "time"])
def test_no_split_leaks(how: str) -> None:
    """The flat array is its own clock and its own items: nothing trained on is at or after the user's first held-out event."""
    histories = as_numbered(make_lists(60, least=1, most=14))
    flat = np.arange(len(histories.items))
    times = np.random.default_rng(0).permutation(len(flat)) % 50  # users' events at moments of their own
    order = np.lexsort((times, np.repeat(np.arange(60), histories.lengths)))
    own = Histories(flat, histories.offsets, flat, histories.user_ids, times[order])
    parts = split(own, how, n=2, validation_from=30, test_from=40)
    first_held_out = own.offsets[:-1] + parts.train_end
    owner = np.repeat(np.arange(60), own.lengths)
    for kind in ("last", "all"):
        for batch in Windows(parts, 5, kind).batches(8, 0, 0):
            places = np.concatenate([batch.items.numpy(), batch.targets.numpy()])
            assert (places < first_held_out[owner[places]]).all()
            if how == "time":
                assert own.times is not None and (own.times[places] < 30).all()


@given(splits(), st.integers(1, 5), kinds, st.integers(1, 5), st.integers(1, 4))
def test_processes_share_a_batch(parts: Split, max_len: int, kind: str, batch_size: int, world: int) -> None:
    """Together, in order, they have what one process alone has; `first` and `events` place each among them."""
    windows = windows_of(parts, max_len, kind)
    if windows is None:
        return
    whole = list(windows.batches(batch_size, 7, 2))
    if len(windows) // len(whole) < world:
        with pytest.raises(ValueError, match=f"batch_size is {batch_size} .* each of {world} processes"):
            windows.batches(batch_size, 7, 2, 0, world)
        return
    shares = [list(windows.batches(batch_size, 7, 2, rank, world)) for rank in range(world)]
    for step, alone in enumerate(whole):
        mine = [share[step] for share in shares]
        assert [pair for each in mine for pair in sequences_of(each)] == sequences_of(alone)
        assert all(len(each.items) for each in mine)
        assert [each.first for each in mine] == np.cumsum([0, *(len(each.items) for each in mine)])[:-1].tolist()
        assert {each.events for each in mine} == {len(alone.items)} == {alone.events} and alone.first == 0


def order(windows: Windows, seed: int, epoch: int) -> list[int]:
    return [first for batch in windows.batches(8, seed, epoch) for ((first, _), *_) in sequences_of(batch)]


def test_seed_and_epoch_alone_decide_the_order() -> None:
    parts = split(as_numbered([list(range(i, i + 5)) for i in range(0, 200, 5)], items=200))
    windows = Windows(parts, 4)
    np.random.seed(1)
    usual = order(windows, 3, 1)
    np.random.seed(2)
    order(windows, 3, 0)  # what was drawn before does not matter: an epoch that is resumed has its own order
    assert order(windows, 3, 1) == usual == order(Windows(parts, 4), 3, 1)
    others = [order(windows, *pair) for pair in ((3, 2), (4, 1), (1, 3))]
    assert len({tuple(each) for each in [usual, *others]}) == 4
    assert all(sorted(each) == sorted(usual) for each in others)


def test_batches_are_of_nearly_equal_size() -> None:
    windows = Windows(split(as_numbered([[1, 2, 3, 4]] * 103)), 4)
    sizes = [len(batch.cu_seqlens) - 1 for batch in windows.batches(10, 0, 0)]
    assert sizes == [11] * 3 + [10] * 7 and len(windows.batches(10, 0, 0)) == 10
    assert [len(batch.cu_seqlens) - 1 for batch in windows.batches(1000, 0, 0)] == [103]


@given(splits(), st.integers(1, 6), kinds)
def test_the_longest_sequence_is_said(parts: Split, max_len: int, kind: str) -> None:
    windows = windows_of(parts, max_len, kind)
    if windows is None:
        return
    for batch in windows.batches(2, 0, 0):
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max()) <= max_len


def test_a_batch_does_not_share_memory_with_the_histories() -> None:
    parts = split(as_numbered([[1, 2, 3, 4]] * 4))
    (batch,) = Windows(parts, 4).batches(8, 0, 0)
    batch.items.zero_()
    batch.targets.zero_()
    assert parts.histories.items.tolist() == [1, 2, 3, 4] * 4


def test_another_kind_of_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="windows is 'first', must be last or all"):
        Windows(split(as_numbered([[1, 2, 3, 4]])), 4, "first")


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_spans_are_ranges_one_after_another(ranges: list[tuple[int, int]]) -> None:
    start, length = (np.array([each[i] for each in ranges], dtype=np.int64) for i in range(2))
    places, bounds = spans(start, length)
    assert places.tolist() == [place for a, n in ranges for place in range(a, a + n)]
    assert bounds.tolist() == [0, *np.cumsum([n for _, n in ranges]).astype(int).tolist()]
