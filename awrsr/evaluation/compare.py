"""Compares runs: the metrics of each variant over its seeds, and whether they differ from the baseline on the same users.

U users, R runs, V variants, C metrics, K resamples. A run is the folder that training writes.
"""

import itertools
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.random import Generator

from ..config import REMOVED, earlier_values
from ..files import checksum, read_json, stale
from . import significance
from .ranking import OF_RANKS, metric

Variants = dict[str, list[Path]]  # name -> folders of its seeds
PARTS = ("validation", "test")
KEYS = ["user", "position", "item"]
FEWEST_SEEDS = 5  # seeds alone move NDCG@10 by some 3 %
LEVEL = 1 - significance.CONFIDENCE
FLIPS_PER_ROW = 200  # makes the smallest p of the permutation test, corrected for its rows, a tenth of LEVEL

# Options that may differ within a variant: the seed, the machine, and what is written.
NOT_A_VARIANT = frozenset("seed out data threads devices nodes accelerator backend progress logger".split())


@dataclass(frozen=True)
class Summary:
    """One metric of one variant: mean and standard deviation over its seeds, and interval over users and seeds."""

    variant: str
    metric: str
    seeds: int
    mean: float
    sd: float | None  # None: one seed
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One metric of one variant minus that of the baseline, on the same users."""

    variant: str
    metric: str
    difference: float
    gain: float | None  # difference / the baseline's mean; None: that mean is 0
    low: float
    high: float
    p_t: float  # paired t-test over users, Holm-corrected
    p_flip: float  # sign-flip permutation test over users, Holm-corrected
    p_t_raw: float
    p_flip_raw: float
    enough_seeds: bool  # both variants have FEWEST_SEEDS

    @property
    def shown(self) -> bool:
        """Whether tests and interval agree that there is a difference; with enough seeds that is a claim."""
        return max(self.p_t, self.p_flip) < LEVEL and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> str:
        if not self.enough_seeds:
            return "no claim"
        return "not shown" if not self.shown else "better" if self.difference > 0 else "worse"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of `compare`; `str` formats it as tables."""

    part: str
    users: int
    targets: int
    resamples: int
    flips: int
    confidence: float = significance.CONFIDENCE
    runs: dict[str, list[str]]  # variant -> folders of its seeds
    baseline: str
    summaries: list[Summary]
    differences: list[Difference]

    @property
    def notes(self) -> list[str]:
        """Notes that a reader needs to interpret the numbers."""
        notes = [f"Intervals: {self.confidence:.0%}, {self.resamples:,} bootstrap resamples of users and seeds."]
        if self.targets > self.users:
            notes.append("Some users have several targets, which are averaged first, so that every user counts the same.")
        if self.differences:
            notes += [
                f"p: paired over users, with these seeds held fixed; Holm-corrected over the {len(self.differences)} rows.",
                f"p (flips): of {self.flips:,} flips, so at least {len(self.differences) / (self.flips + 1):.2g} in the best row.",
                f'"better", "worse": both p below {LEVEL:.2g} and the interval on one side of 0.',
            ]
        few = [f"{name} ({len(folders)})" for name, folders in self.runs.items() if len(folders) < FEWEST_SEEDS]
        if few:
            notes.append(f"Fewer than {FEWEST_SEEDS} seeds support no claim: {', '.join(few)}.")
        if any(len(folders) == 1 for folders in self.runs.values()):
            notes.append("The interval of a variant with one seed is over users only: another seed may well fall outside.")
        return notes

    def to_json(self) -> dict[str, Any]:
        """All fields, in types that json can write."""
        differences = [asdict(row) | {"shown": row.shown, "verdict": row.verdict} for row in self.differences]
        return asdict(self) | {"differences": differences, "notes": self.notes}

    def __str__(self) -> str:
        runs = sum(map(len, self.runs.values()))
        blocks = [f"{self.part}: {runs} runs, {self.users:,} users, {self.targets:,} targets"]
        rows = [["variant", "seeds", "metric", "mean", "sd", "interval"]]
        for s in self.summaries:
            sd = "-" if s.sd is None else f"{s.sd:.4f}"
            rows.append([s.variant, str(s.seeds), s.metric, f"{s.mean:.4f}", sd, f"{s.low:.4f} .. {s.high:.4f}"])
        blocks.append(_aligned(rows))
        if self.differences:
            rows = [[f"against {self.baseline}", "metric", "difference", "gain", "interval", "p (t)", "p (flips)", ""]]
            for d in self.differences:
                gain = "-" if d.gain is None else f"{d.gain:+.1%}"
                ends = f"{d.low:+.4f} .. {d.high:+.4f}"
                p = [f"{x:.3f}" if x >= 0.001 else "<0.001" for x in (d.p_t, d.p_flip)]
                rows.append([d.variant, d.metric, f"{d.difference:+.4f}", gain, ends, *p, d.verdict])
            blocks.append(_aligned(rows))
        return "\n\n".join([*blocks, "\n".join(self.notes)])


def compare(
    runs: Sequence[Path | str],
    *,
    part: str = "test",
    metrics: Sequence[str] = ("HR@10", "NDCG@10", "MRR"),
    baseline: Path | str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare runs by the ranks that they gave to the same targets.

    Runs whose configurations differ only in `seed`, `out` and settings of the machine are seeds of one variant. Every number is a
    mean over users, and the targets of a user are averaged first. Intervals are bootstrapped over users, with the same resamples
    for all variants, and over seeds. Tests are paired over users: the t-test, and the permutation test that flips signs. Smucker,
    Allan and Carterette (2007) find that these two agree on ranking metrics, unlike Wilcoxon's test and the sign test.

    Args:
        runs: two or more run folders.
        part: "test" or "validation".
        metrics: HR@k, NDCG@k, MRR.
        baseline: the run folder or the name of the variant to compare the others with. Default: the variant of the first run.
        resamples: number of bootstrap resamples, and least number of permutations; the test uses FLIPS_PER_ROW per row if that is
            more.
        seed: random seed of the bootstrap and the permutation test.

    Raises:
        ValueError: a folder, file or metric cannot be read; runs ranked different targets; a run is given twice.
    """
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, must be one of {', '.join(PARTS)}")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, must be 1 or more")
    metrics = list(dict.fromkeys(metrics))
    if not metrics:
        raise ValueError("metrics is empty, must name at least one of HR@k, NDCG@k, MRR")
    for name in metrics:
        metric(name, np.ones(1))
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise ValueError(f"runs has {len(folders)} folder(s), must have 2 or more to compare")

    variants = _variants(folders, [_config(folder) for folder in folders])
    named = _baseline(folders[0] if baseline is None else baseline, variants)
    values, targets = _paired_values(folders, part, metrics)
    flips = max(resamples, FLIPS_PER_ROW * len(metrics) * (len(variants) - 1))

    rng = np.random.default_rng(seed)
    run_means = values.mean(0)  # (R, C)
    seeds = [[folders.index(folder) for folder in members] for members in variants.values()]  # numbers of the runs
    per_user = np.stack([values[:, members].mean(1) for members in seeds], 1)  # (U, V, C)
    means = significance.resampled_means(per_user.reshape(len(values), -1), resamples, rng)
    means = means.reshape(resamples, len(variants), len(metrics))
    for v, members in enumerate(seeds):
        means[:, v] += significance.seed_deviations(run_means[members], resamples, rng)
    return Comparison(
        part=part,
        users=len(values),
        targets=targets,
        resamples=resamples,
        flips=flips,
        runs={name: [str(folder) for folder in members] for name, members in variants.items()},
        baseline=named,
        summaries=[row for v, name in enumerate(variants) for row in _summaries(name, metrics, run_means[seeds[v]], means[:, v])],
        differences=_differences(named, metrics, variants, per_user, means, flips, rng),
    )


def _summaries(variant: str, metrics: list[str], run_means: np.ndarray, draws: np.ndarray) -> list[Summary]:
    """Rows of one variant, from (S, C) means of its seeds and (K, C) resampled ones."""
    low, high = (x.tolist() for x in significance.interval(draws))
    mean, seeds = run_means.mean(0).tolist(), len(run_means)
    sd = run_means.std(0, ddof=1).tolist() if seeds > 1 else [None] * len(metrics)
    return [Summary(variant, metrics[c], seeds, mean[c], sd[c], low[c], high[c]) for c in range(len(metrics))]


def _differences(
    baseline: str, metrics: list[str], variants: Variants, per_user: np.ndarray, means: np.ndarray, flips: int, rng: Generator
) -> list[Difference]:
    """Rows of every variant except the baseline, which are one family for Holm's correction, from (U, V, C) values per user and
    (K, V, C) resampled means."""
    names = list(variants)
    base = names.index(baseline)
    others = [v for v in range(len(names)) if v != base]
    if not others:
        return []
    paired, draws = (np.concatenate([x[:, v] - x[:, base] for v in others], 1) for x in (per_user, means))
    p_t, p_flip = significance.t_test(paired), significance.sign_flip_test(paired, flips, rng)
    numbers = {"difference": paired.mean(0), "p_t_raw": p_t, "p_flip_raw": p_flip}  # in each row, as fields of Difference
    numbers |= {"p_t": significance.holm(p_t), "p_flip": significance.holm(p_flip)}
    numbers |= zip(("low", "high"), significance.interval(draws), strict=True)
    base_mean, rows = per_user[:, base].mean(0), []
    for i, (v, c) in enumerate(itertools.product(others, range(len(metrics)))):
        row = {name: float(column[i]) for name, column in numbers.items()}
        gain = row["difference"] / float(base_mean[c]) if base_mean[c] else None
        enough = min(len(variants[names[v]]), len(variants[baseline])) >= FEWEST_SEEDS
        rows.append(Difference(names[v], metrics[c], gain=gain, enough_seeds=enough, **row))
    return rows


def _config(folder: Path) -> dict[str, Any]:
    """The options of a run."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder, must be a run folder that awrsr train wrote")
    path = folder / "metrics.json"
    try:
        stored = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no metrics.json: it is not a run folder, or the run has not finished") from None
    config = stored.get("config") if isinstance(stored, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f'{path} has no options under "config", where awrsr train writes them')
    if "checksum" not in stored:
        warnings.warn(f"{path} was written by an older version, without checksums, so damage would go unnoticed", stacklevel=4)
    if path.name in stale(folder):
        warnings.warn(f"{path} is of an earlier model than {folder}: rerun its training to finish it", stacklevel=4)
    return config


def _variants(folders: list[Path], configs: list[dict[str, Any]]) -> Variants:
    """Folders by variant, in the order of first appearance. A variant is named by the options that differ between variants."""
    usual = earlier_values()
    defaults = REMOVED["model"] | REMOVED["training"] | usual["model"] | usual["training"]  # for runs that lack an option

    def text(config: dict[str, Any], name: str) -> str:
        value = config.get(name, defaults.get(name, "unset"))
        return value if isinstance(value, str) else json.dumps(value)

    names = dict.fromkeys(name for config in configs for name in config if name not in NOT_A_VARIANT)
    differing = [name for name in names if len({text(config, name) for config in configs}) > 1]
    variants: Variants = {}
    seen: dict[tuple[str, str], Path] = {}
    for folder, config in zip(folders, configs, strict=True):
        variant = ", ".join(f"{name}={text(config, name)}" for name in differing) or "all runs"
        seed = f"seed {config['seed']}" if "seed" in config else "no seed"
        if (variant, seed) in seen:
            raise ValueError(
                f"{seen[variant, seed]} and {folder} have the same configuration and {seed}: "
                "the seeds of a variant must differ, or one run would count twice"
            )
        seen[variant, seed] = folder
        variants.setdefault(variant, []).append(folder)
    return variants


def _baseline(named: Path | str, variants: Variants) -> str:
    """The name of the variant to compare with."""
    for variant, members in variants.items():
        if str(named) == variant or Path(named).resolve() in [folder.resolve() for folder in members]:
            return variant
    raise ValueError(f"baseline is {str(named)!r}, must be one of the runs or of the variants: {'; '.join(variants)}")


def _paired_values(folders: list[Path], part: str, metrics: list[str]) -> tuple[np.ndarray, int]:
    """(U, R, C) metrics of every user in every run, and the number of targets of all users."""
    first = _ranks(folders[0], part)
    users = first["user"].rle_id().to_numpy()
    counts = np.bincount(users)
    if len(counts) < 2:
        raise ValueError(f"{folders[0]} ranked targets of {len(counts)} user(s), must be 2 or more to compare")
    values = np.empty((len(counts), len(folders), len(metrics)))
    for r, folder in enumerate(folders):
        ranks = first if r == 0 else _ranks(folder, part)
        if not ranks[KEYS].equals(first[KEYS]):
            missing, added = (a.join(b, on=KEYS, how="anti").height for a, b in ((first, ranks), (ranks, first)))
            raise ValueError(
                f"{folders[0]} and {folder} ranked different {part} targets: {missing:,} of {first.height:,} are not in the "
                f"latter, which has {added:,} others. Runs can be compared only on the same data and split"
            )
        for c, name in enumerate(metrics):
            values[:, r, c] = np.bincount(users, weights=metric(name, ranks["rank"].to_numpy())) / counts
    return values, first.height


def _ranks(folder: Path, part: str) -> pl.DataFrame:
    """Checked ranks of a run, sorted by target; ids are text, so that the number 7 equals the text "7"."""
    path = folder / f"ranks_{part}.parquet"
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}, which awrsr train writes at its end")
    known = read_json(folder / "metrics.json").get(OF_RANKS, {}).get(part)  # older runs have none
    if known not in (None, checksum(path)):
        raise ValueError(f"{path} is damaged, or of another training than metrics.json: rerun its training to write both anew")
    try:
        ranks = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    lacking = [name for name in (*KEYS, "rank") if name not in ranks.columns]
    if lacking:
        raise ValueError(f"{path} lacks column(s) {', '.join(lacking)}; it has {', '.join(ranks.columns)}")
    for name in ("position", "rank"):
        if not ranks[name].dtype.is_integer():
            raise ValueError(f"{path}: column {name} is {ranks[name].dtype}, must be whole numbers")
    ranks = ranks.select(pl.col("user", "item").cast(pl.String), pl.col("position", "rank").cast(pl.Int64))
    if sum(ranks.null_count().row(0)):
        raise ValueError(f"{path} has empty cells, must have a user, item, position and rank in every row")
    if not (ranks["rank"] >= 1).all():
        raise ValueError(f"{path} has a rank below 1, must be 1 (best) or more")
    if ranks.select(KEYS).is_duplicated().any():
        raise ValueError(f"{path} has a target more than once: no two rows may have the same user, position and item")
    return ranks.sort(KEYS)


def _aligned(rows: list[list[str]]) -> str:
    """Lines with aligned columns: names to the left, numbers to the right."""
    columns = []
    for i, cells in enumerate(zip(*rows, strict=True)):
        width, is_name = max(map(len, cells)), i == 0 or cells[0] in ("metric", "")
        columns.append([cell.ljust(width) if is_name else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
