"""Runs compared: files, variants and seeds, paired users; the statistics against scipy, brute force and known truth."""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from awrsr.evaluation import significance
from awrsr.evaluation.compare import Comparison, compare
from awrsr.files import mark_stale, write_json

USERS, RANKS = 40, "ranks_test.parquet"


def write_run(
    folder: Path, ranks: Sequence[int] | np.ndarray, users: Sequence[Any] | None = None, *, part: str = "test", **config: Any
) -> Path:
    """A run folder as training leaves it, with one target per user unless `users` says whose they are."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "metrics.json", {"config": {"refinement": "none", "seed": 0, "out": str(folder)} | config}, seal=True)
    owner = [f"u{i}" for i in range(len(ranks))] if users is None else list(users)
    frame = pl.DataFrame(
        {"user": owner, "item": [f"i{i}" for i in range(len(ranks))], "position": range(len(ranks)), "rank": list(map(int, ranks))}
    )
    frame.write_parquet(folder / f"ranks_{part}.parquet")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def runs(tmp_path: Path, rng: np.random.Generator) -> list[Path]:
    """Two seeds of each of two variants."""
    options = itertools.product(("none", "additive"), (0, 1))
    return [
        write_run(tmp_path / f"{name}{seed}", rng.integers(1, 50, USERS), refinement=name, seed=seed, threads=1 + seed)
        for name, seed in options
    ]


def only(rows: list[Any], **wanted: Any) -> Any:
    (row,) = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return row


def test_seeds_of_one_variant_are_grouped_and_named_by_what_differs(runs: list[Path]) -> None:
    found = compare(runs)
    assert found.runs == {"refinement=none": [*map(str, runs[:2])], "refinement=additive": [*map(str, runs[2:])]}
    assert found.baseline == "refinement=none"


def test_several_differing_options_make_a_name_together(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [1, 2], layers=1, rank=8, loss="bce")
    b = write_run(tmp_path / "b", [1, 3], layers=2, rank=8, loss="bce")
    c = write_run(tmp_path / "c", [1, 3], layers=2, rank=8)
    assert list(compare([a, b, c]).runs) == ["layers=1, loss=bce", "layers=2, loss=bce", "layers=2, loss=sampled_softmax"]


def test_runs_from_before_an_option_join_those_that_leave_it_as_it_was(tmp_path: Path) -> None:
    old = [write_run(tmp_path / f"old{seed}", [1, 2], seed=seed, correlation_norm=False) for seed in (0, 1)]
    new = [write_run(tmp_path / f"new{seed}", [1, 2], seed=seed, item_init="normal", average=0) for seed in (2, 3)]
    other = write_run(tmp_path / "other", [1, 3], item_init="cooccurrence", average=0)
    found = compare([*old, *new, other])
    assert {name: len(runs) for name, runs in found.runs.items()} == {"item_init=normal": 4, "item_init=cooccurrence": 1}


def test_metrics_are_those_of_the_ranks(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [1, 2, 11, 4])
    b = write_run(tmp_path / "b", [3, 3, 3, 20], refinement="simple")
    rows = compare([a, b], metrics=["HR@2", "NDCG@3", "MRR"]).summaries
    assert only(rows, variant="refinement=none", metric="HR@2").mean == 0.5
    assert only(rows, variant="refinement=none", metric="NDCG@3").mean == pytest.approx((1 + 1 / np.log2(3)) / 4)
    assert only(rows, variant="refinement=simple", metric="NDCG@3").mean == pytest.approx(3 / 2 / 4)
    assert only(rows, variant="refinement=simple", metric="MRR").mean == pytest.approx((1 + 1 / 20) / 4)


def test_mean_and_deviation_are_over_seeds(runs: list[Path]) -> None:
    means = [(pl.read_parquet(run / RANKS)["rank"].to_numpy() <= 10).mean() for run in runs[:2]]
    row = only(compare(runs).summaries, variant="refinement=none", metric="HR@10")
    assert row.seeds == 2
    assert row.mean == pytest.approx(np.mean(means))
    assert row.sd == pytest.approx(np.std(means, ddof=1))


def test_a_users_targets_are_averaged_before_users_are(tmp_path: Path) -> None:
    owners = ["a", "a", "a", "b", "c"]
    one = write_run(tmp_path / "one", [1, 1, 5, 5, 1], owners)
    two = write_run(tmp_path / "two", [5, 1, 5, 1, 5], owners, refinement="simple")
    found = compare([one, two], metrics=["HR@1"])
    assert (found.users, found.targets) == (3, 5)
    assert found.summaries[0].mean == pytest.approx((2 / 3 + 0 + 1) / 3)
    (row,) = found.differences
    assert row.p_t_raw == pytest.approx(stats.ttest_rel([1 / 3, 1, 0], [2 / 3, 0, 1]).pvalue)
    assert "several targets" in str(found)


def test_the_order_of_rows_does_not_matter(runs: list[Path]) -> None:
    before = compare(runs).to_json()
    path = runs[2] / RANKS
    pl.read_parquet(path).reverse().write_parquet(path)
    assert compare(runs).to_json() == before


def test_ids_read_as_numbers_meet_the_same_ids_read_as_text(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [1, 2, 3], [10, 9, 8])
    b = write_run(tmp_path / "b", [1, 1, 3], ["10", "9", "8"], refinement="simple")
    assert compare([a, b], metrics=["MRR"]).differences[0].difference == pytest.approx(1 / 6)


def test_paired_tests_are_of_users_averaged_over_seeds(runs: list[Path]) -> None:
    reciprocal = [1 / pl.read_parquet(run / RANKS).sort("user")["rank"].to_numpy() for run in runs]
    base, other = np.mean(reciprocal[:2], 0), np.mean(reciprocal[2:], 0)
    (row,) = compare(runs, metrics=["MRR"], resamples=20_000).differences
    assert row.difference == pytest.approx((other - base).mean())
    assert row.gain == pytest.approx((other - base).mean() / base.mean())
    assert row.p_t_raw == pytest.approx(stats.ttest_rel(other, base).pvalue)
    flips = {"permutation_type": "samples", "n_resamples": 20_000, "rng": 1}
    wanted = stats.permutation_test((other, base), lambda x, y: np.mean(x - y), **flips)
    assert row.p_flip_raw == pytest.approx(wanted.pvalue, abs=0.02)


def test_many_rows_do_not_hide_what_every_user_shows(tmp_path: Path) -> None:
    """The permutation test's least p, times the rows, stays below the level, however few resamples the bootstrap takes."""
    names = ["none", *(f"kind{i}" for i in range(12))]
    folders = [
        write_run(tmp_path / f"{name}{seed}", [30 if name == "none" else 1] * 40, refinement=name, seed=seed)
        for name in names
        for seed in range(5)
    ]
    found = compare(folders, resamples=50)
    assert len(found.differences) == 36 and {row.verdict for row in found.differences} == {"better"}
    assert found.flips == 36 * 200 and f"of {found.flips:,} flips" in str(found) and found.to_json()["flips"] == found.flips


def test_holm_corrects_over_every_row_of_the_table(tmp_path: Path, rng: np.random.Generator) -> None:
    folders = [write_run(tmp_path / name, rng.integers(1, 30, 60), refinement=name) for name in ("none", "simple", "value")]
    rows = compare(folders).differences
    assert len(rows) == 6
    for raw, corrected in (("p_t_raw", "p_t"), ("p_flip_raw", "p_flip")):
        assert [getattr(row, corrected) for row in rows] == pytest.approx(significance.holm([getattr(row, raw) for row in rows]))


@pytest.mark.parametrize("name", ["folder", "variant"])
def test_the_baseline_can_be_named(runs: list[Path], name: str) -> None:
    found = compare(runs, baseline=runs[3] if name == "folder" else "refinement=additive")
    assert found.baseline == "refinement=additive"
    assert {row.variant for row in found.differences} == {"refinement=none"}
    ahead, behind = found.differences[0], compare(runs).differences[0]
    assert ahead.difference == pytest.approx(-behind.difference)
    assert ahead.p_t == pytest.approx(behind.p_t)


def test_the_validation_part_is_read_on_request(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [1, 1], part="validation")
    b = write_run(tmp_path / "b", [2, 2], part="validation", refinement="simple")
    assert compare([a, b], part="validation", metrics=["MRR"]).differences[0].difference == -0.5


def test_equal_seeds_give_equal_numbers_and_others_other_ones(runs: list[Path]) -> None:
    first, again, other = (compare(runs, seed=seed, resamples=200).to_json() for seed in (3, 3, 4))
    assert first == again
    assert first["summaries"] != other["summaries"]


def five_seeds(tmp_path: Path, gain: float, rng: np.random.Generator) -> list[Path]:
    """Five seeds of two variants on 400 users, of which "additive" puts a further share `gain` of targets first."""
    hard = rng.random(400)
    folders = []
    for name, chance in (("none", 0.2), ("additive", 0.2 + gain)):
        for seed in range(5):
            hit = hard * 0.9 + rng.random(400) * 0.1 < chance
            folders.append(write_run(tmp_path / f"{name}{seed}", np.where(hit, 1, 40), refinement=name, seed=seed))
    return folders


def test_a_planted_gain_is_found_with_five_seeds(tmp_path: Path, rng: np.random.Generator) -> None:
    found = compare(five_seeds(tmp_path, 0.1, rng), metrics=["HR@10"])
    (row,) = found.differences
    assert row.verdict == "better"
    assert row.low < 0.1 < row.high
    assert "better" in str(found) and "support no claim" not in str(found)


def test_without_a_gain_none_is_shown(tmp_path: Path, rng: np.random.Generator) -> None:
    (row,) = compare(five_seeds(tmp_path, 0.0, rng), metrics=["HR@10"]).differences
    assert row.verdict == "not shown"
    assert row.low < 0 < row.high


def test_few_seeds_support_no_claim_however_clear_the_difference(tmp_path: Path, rng: np.random.Generator) -> None:
    folders = five_seeds(tmp_path, 0.3, rng)
    found = compare([*folders[:5], *folders[5:9]], metrics=["HR@10"])
    (row,) = found.differences
    assert row.shown and row.verdict == "no claim"
    assert "Fewer than 5 seeds support no claim: refinement=additive (4)." in str(found)


def test_one_seed_has_no_deviation_and_says_that_its_interval_is_over_users(tmp_path: Path) -> None:
    found = compare([write_run(tmp_path / "a", [1, 20, 1]), write_run(tmp_path / "b", [1, 1, 9], refinement="simple")])
    assert all(row.sd is None for row in found.summaries)
    assert "one seed is over users only" in str(found)


def test_equal_ranks_are_no_difference(tmp_path: Path) -> None:
    found = compare([write_run(tmp_path / "a", [1, 20, 3]), write_run(tmp_path / "b", [1, 20, 3], refinement="simple")])
    assert all((row.difference, row.p_t, row.p_flip, row.low, row.high) == (0, 1, 1, 0, 0) for row in found.differences)


def test_a_gain_over_nothing_is_left_out(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", [20, 20]), write_run(tmp_path / "b", [1, 20], refinement="simple")]
    found = compare(folders, metrics=["HR@10"])
    assert found.differences[0].gain is None
    json.dumps(found.to_json(), allow_nan=False)


def test_the_table_has_a_line_per_variant_and_metric(runs: list[Path]) -> None:
    found = compare(runs)
    lines = str(found).splitlines()
    assert lines[0] == f"test: 4 runs, {USERS} users, {USERS} targets"
    assert sum(line.startswith("refinement=") for line in lines) == 2 * 3 + 3
    row = only(found.summaries, variant="refinement=additive", metric="MRR")
    assert any(line.split()[:4] == [row.variant, "2", "MRR", f"{row.mean:.4f}"] for line in lines)
    assert max(map(len, lines)) <= 132


def test_the_dictionary_is_json_and_whole(runs: list[Path]) -> None:
    found: Comparison = compare(runs)
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored == found.to_json()
    assert stored["differences"][0]["verdict"] == "no claim"
    parts = ["part", "users", "targets", "resamples", "flips", "confidence", "runs", "baseline"]
    assert list(stored) == [*parts, "summaries", "differences", "notes"]


def test_one_variant_has_no_differences(runs: list[Path]) -> None:
    found = compare(runs[:2])
    assert list(found.runs) == ["all runs"]
    assert found.differences == []
    assert "against" not in str(found)


def test_other_or_fewer_targets_are_an_error_that_counts_them(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [1, 2, 3, 4])
    b = write_run(tmp_path / "b", [1, 2, 3, 4], ["u0", "u1", "other", "u3"], refinement="simple")
    with pytest.raises(ValueError, match=r"a and .*b ranked different test targets: 1 of 4 .* 1 others"):
        compare([a, b])
    write_run(b, [1, 2, 3], refinement="simple")
    with pytest.raises(ValueError, match=r"1 of 4 are not in the latter, which has 0 others"):
        compare([a, b])


def test_one_seed_of_a_variant_twice_is_an_error(runs: list[Path], tmp_path: Path) -> None:
    twin = write_run(tmp_path / "twin", np.ones(USERS), refinement="none", seed=1)
    for repeated in (runs[1], twin):
        with pytest.raises(ValueError, match=r"none1 and .* have the same configuration and seed 1"):
            compare([*runs, repeated])


def with_metrics(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "metrics.json").write_text(text)


def with_ranks(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], object]:
    return lambda folder: change(pl.read_parquet(folder / RANKS)).write_parquet(folder / RANKS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("moved")), "none1 is not a folder"),
        (lambda folder: (folder / "metrics.json").unlink(), "none1 has no metrics.json"),
        (lambda folder: (folder / RANKS).unlink(), "none1 has no ranks_test.parquet"),
        (with_metrics('{"config": {"see'), "none1/metrics.json is not JSON"),
        (with_metrics('{"test": {}}'), 'none1/metrics.json has no options under "config"'),
        (with_metrics('{"config": []}'), 'none1/metrics.json has no options under "config"'),
        (lambda folder: (folder / RANKS).write_bytes(b"PAR1"), "none1/ranks_test.parquet cannot be read as Parquet"),
        (with_ranks(lambda x: x.drop("position")), "lacks column.* position"),
        (with_ranks(lambda x: x.with_columns(pl.col("rank") + 0.5)), "column rank is Float64, must be whole numbers"),
        (with_ranks(lambda x: x.with_columns(pl.col("rank") * 0)), "rank below 1"),
        (with_ranks(lambda x: x.with_columns(pl.when(pl.col("position") > 0).then(pl.col("rank")))), "empty cells"),
        (with_ranks(lambda x: pl.concat([x, x[:1]])), "a target more than once"),
    ],
)
def test_a_broken_run_is_an_error_that_names_it(runs: list[Path], damage: Callable[[Path], object], message: str) -> None:
    damage(runs[1])
    with pytest.raises(ValueError, match=message):
        compare(runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["HR@10", "recall"]}, "metric is 'recall', must be HR@k, NDCG@k or MRR"),
        ({"metrics": ["HR@0"]}, "metric is 'HR@0'"),
        ({"metrics": []}, "metrics is empty"),
        ({"part": "train"}, "part is 'train'"),
        ({"baseline": "elsewhere"}, "baseline is 'elsewhere', must be one of the runs or of the variants: refinement=none"),
        ({"resamples": 0}, "resamples is 0"),
    ],
)
def test_bad_options_are_named(runs: list[Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(runs, **options)


def test_one_run_or_one_user_is_nothing_to_compare(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", [1, 2], ["u", "u"]), write_run(tmp_path / "b", [1, 1], ["u", "u"], refinement="simple")]
    with pytest.raises(ValueError, match=r"1 folder.* must have 2 or more"):
        compare(folders[:1])
    with pytest.raises(ValueError, match=r"1 user\(s\), must be 2 or more"):
        compare(folders)


# The statistics themselves.


def test_holm_worked_by_hand() -> None:
    assert significance.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.9, 0.8]).tolist() == [1, 1]


def test_the_t_test_is_scipys(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 50, 3))
    assert significance.t_test(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_the_sign_flip_test_is_that_of_all_flips(rng: np.random.Generator) -> None:
    x = rng.normal(0.4, 1, size=(10, 2))
    flips = np.array(list(itertools.product([-1, 1], repeat=10)))
    exact = (np.abs(flips @ x) >= np.abs(x.sum(0)) * (1 - 1e-9)).mean(0)
    assert significance.sign_flip_test(x, 40_000, rng) == pytest.approx(exact, abs=0.01)


def test_flips_that_tie_with_what_was_seen_count(rng: np.random.Generator) -> None:
    x = np.full((3, 1), 0.1)  # of 8 flips, all plus and all minus reach the sum
    assert significance.sign_flip_test(x, 20_000, rng)[0] == pytest.approx(0.25, abs=0.02)


def test_resampled_means_vary_as_the_mean_of_users_does(rng: np.random.Generator) -> None:
    x = rng.normal(size=(200, 2))
    x[:, 1] += x[:, 0]
    wanted = np.cov(x.T, ddof=0) / 200
    assert np.cov(significance.resampled_means(x, 20_000, rng).T) == pytest.approx(wanted, rel=0.1)


def test_parts_of_resampling_do_not_change_its_numbers(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    x = rng.normal(size=(30, 2))

    def both() -> list[np.ndarray]:
        return [f(x, 50, np.random.default_rng(1)) for f in (significance.resampled_means, significance.sign_flip_test)]

    whole = both()
    monkeypatch.setattr(significance, "_AT_A_TIME", 30 * 8)
    for got, wanted in zip(both(), whole, strict=True):
        np.testing.assert_allclose(got, wanted)


def test_p_values_are_uniform_where_there_is_nothing_to_find(rng: np.random.Generator) -> None:
    reciprocal = 1 / rng.integers(1, 100, size=(2, 200, 1500))
    differences = reciprocal[0] - reciprocal[1]
    for p in (significance.t_test(differences), significance.sign_flip_test(differences, 999, rng)):
        for level in (0.05, 0.2, 0.5):
            assert (p <= level).mean() == pytest.approx(level, abs=4 * (level * (1 - level) / 1500) ** 0.5 + 0.01)


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (2, 1.0), (5, 0.0), (5, 1.0), (5, 3.0)])
def test_intervals_cover_the_truth(seeds: int, seed_sd: float, rng: np.random.Generator) -> None:
    # Users differ, seeds differ, and each user's luck with each seed; seed_sd is relative to what the users leave unknown.
    covered, users = 0, 100
    for _ in range(400):
        x = rng.normal(size=users) + rng.normal(size=(seeds, users)) + seed_sd * rng.normal(size=(seeds, 1)) / users**0.5
        draws = significance.resampled_means(x.mean(0)[:, None], 300, rng)
        draws += significance.seed_deviations(x.mean(1)[:, None], 300, rng)
        low, high = significance.interval(draws)
        covered += int(low[0] <= 0 <= high[0])
    assert 0.92 <= covered / 400 <= 0.995


def test_ranks_that_are_damaged_or_of_another_training_are_refused(home: Path, tmp_path: Path) -> None:
    """Parquet has no checksums of its own here: a flipped bit would change a result by a rank."""
    one, two = (Path(shutil.copytree(home / name, tmp_path / name)) for name in ("run", "plain"))
    assert compare([one, two]).users
    whole = (one / RANKS).read_bytes()
    for change in (whole[:9] + bytes([whole[9] ^ 4]) + whole[10:], (two / RANKS).read_bytes()):
        (one / RANKS).write_bytes(change)
        with pytest.raises(ValueError, match=f"{one / RANKS} is damaged, or of another training than metrics.json: rerun its"):
            compare([one, two])


def test_results_without_checksums_or_of_an_earlier_model_are_warned_of(runs: list[Path]) -> None:
    (runs[0] / "metrics.json").write_text(json.dumps({"config": {"refinement": "none", "seed": 0}}))
    with pytest.warns(UserWarning, match=f"{runs[0] / 'metrics.json'} was written by an older version, without checksums"):
        compare(runs)
    mark_stale(runs[1], ["metrics.json"])
    with pytest.warns(UserWarning, match=f"{runs[1] / 'metrics.json'} is of an earlier model than {runs[1]}: rerun its training"):
        compare(runs)
