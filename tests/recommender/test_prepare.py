"""From options to a split: what is read, filtered and held out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awrsr.data.prepare import DataOptions, divide, histories, moment

ROWS = "user,item,time\n" + "".join(f"{user},{item},2024-01-{item + user:02d}\n" for user in (1, 2) for item in range(1, 9))


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "events.csv").write_text(ROWS, encoding="utf-8")
    return str(tmp_path / "events.csv")


@pytest.mark.parametrize("text", ["1717156800", "2024-05-31T12:00:00", "2024-05-31 12:00:00Z", "2024-05-31T14:00:00+02:00"])
def test_a_moment_is_a_number_or_a_date(text: str) -> None:
    assert moment("test_from", text) == 1717156800.0


def test_no_moment_is_none_and_nonsense_is_named() -> None:
    assert moment("test_from", "") is None
    for text in ("31/05/2014", "soon", "nan"):
        with pytest.raises(ValueError, match=f"test_from is '{text}', must be a number"):
            moment("test_from", text)


def test_a_split_by_time_divides_at_the_moments(data: str) -> None:
    options = DataOptions(data=data, split="time", validation_from="2024-01-06", test_from="2024-01-08")
    parts = divide(histories(options), options)
    assert parts.train_end.tolist() == [4, 3] and parts.validation_end.tolist() == [6, 5]
    users, places = parts.targets("test")
    assert users.tolist() == [0, 0, 1, 1, 1] and places.tolist() == [6, 7, 5, 6, 7]


def test_moments_beside_the_data_say_where_the_data_are(data: str) -> None:
    options = DataOptions(data=data, split="time", validation_from="2030-01-01", test_from="2031-01-01")
    with pytest.raises(ValueError, match=r"leaves nothing for validation: .* times run from 170\d{7} to 170\d{7}$"):
        divide(histories(options), options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"holdout": 3}, "holdout is 3, which needs the split last-n; split is 'leave-one-out'"),
        ({"test_from": "2024-01-08", "split": "none"}, "test_from is '2024-01-08', which needs the split time"),
        ({"validation_from": "5", "split": "none"}, "validation_from is '5', which needs the split time; split is 'none'"),
    ],
)
def test_options_of_another_split_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


def test_filters_apply_in_order_collapse_then_core(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 7 7 7 8\n2 7 8 9\n3 8 8 8\n", encoding="utf-8")
    options = DataOptions(data=str(tmp_path / "a.txt"), format="lines", collapse=True, min_user_events=2)
    kept = histories(options)
    assert [kept.item_ids[kept.of(user)].tolist() for user in range(kept.num_users)] == [[7, 8], [7, 8, 9]]
    with pytest.raises(ValueError, match="min_user_events=9, min_item_events=1 leave nothing of a"):
        histories(DataOptions(data=str(tmp_path / "a.txt"), format="lines", min_user_events=9))


def test_without_a_file_the_made_up_histories_are_read() -> None:
    found = histories(DataOptions())
    assert found.num_users == 4000 and found.repeats() and DataOptions().name == "synthetic"
    assert np.array_equal(found.items, histories(DataOptions()).items)
