"""The tuner without a GPU: what it tries and chooses by an invented clock, and its checks in the interpreter."""

from pathlib import Path

import pytest
import torch

from awrsr_kernels import launch_config, refined_attention, tuned
from awrsr_kernels.launch_config import LENGTHS, TABLE, TILED, Config, Key, choose
from awrsr_kernels.tuned import read_entries
from awrsr_kernels.tuning import __main__ as tune
from awrsr_kernels.tuning import timing
from awrsr_kernels.tuning.search import MARGIN, candidates, carried, search
from awrsr_kernels.tuning.timing import Bench, TuningCase, Workload, guards

from ..conftest import DEVICE
from .tuning import BACKWARD, CASES, FORWARD, H100, HERE, OTHER, TILED_FORWARD, Fake, quietly


@pytest.mark.parametrize("key", TABLE, ids=lambda key: "-".join(map(str, key)))
def test_candidates_can_be_launched_and_hold_the_tables_rows(key: Key) -> None:
    found = candidates(key)
    assert len(set(found)) == len(found) >= 10
    assert found[0] == TABLE[key][0].config and {row.config for row in TABLE[key]} <= set(found)
    for config in found:
        assert tuned.misfit(key, config) is None
        assert carried(key, config) <= 255 * 32 * config.num_warps
        if key.kernel in launch_config.RESIDENT_KERNELS:
            assert config.block_n in (16, config.block_m) and config.block_m <= 64
            assert (config.programs > 0) == (key.kernel == "resident_bwd")
        elif key.length != TILED:
            assert key.length <= config.block_m == config.block_n <= 64 and 1 <= config.programs <= 16 and config.num_stages == 1
        else:
            assert config.programs == 0 and config.num_warps in (4, 8) and 1 <= config.num_stages <= 3
    assert Config(64, 64, 4, 2) in candidates(TILED_FORWARD) and Config(128, 128, 8, 3) in candidates(TILED_FORWARD)
    assert Config(64, 128, 8, 3) not in candidates(Key("tiled_fwd", TILED, 256, 4))  # compiles to 1.4 MB, and for a minute


def test_a_case_knows_its_kernels() -> None:
    case = CASES[0]
    assert case.keys(H100) == [FORWARD, BACKWARD]
    assert {key.kernel for key in case._replace(length=200).keys(H100)} == set(launch_config.RESIDENT_KERNELS)
    assert {key.kernel for key in case._replace(length=300).keys(H100)} == set(launch_config.TILED_KERNELS)
    assert "tiled_bwd_tables" not in {key.kernel for key in case._replace(length=300, refinement="none").keys(H100)}
    assert case._replace(rank=100, refinement="none").keys(H100)[0].width == 64  # the rank of no table


@pytest.mark.parametrize("key", [key for key in TABLE if key.itemsize == 4], ids=lambda key: "-".join(map(str, key)))
def test_guards_belong_to_the_key_they_guard(key: Key) -> None:
    found = guards(key, torch.float32)
    assert {case.refinement for case in found} == {"none", "simple", "value", "additive"}
    assert all(case.ragged and case.dropout_p and case.kv_heads < case.heads for case in found)
    launched = [case for case in found if case.refinement != "none" or key.kernel != "tiled_bwd_tables"]
    assert all(key in case.keys(H100) and max(case.features()) == key.width for case in launched)


def test_the_fastest_over_all_cases_of_a_key_is_chosen() -> None:
    table = choose(FORWARD, H100)
    both, one = Config(64, 64, 2, 1, 4), Config(64, 64, 8, 1, 4)

    def ms(case: TuningCase, config: Config) -> float:  # `one` is fastest in the first case, and loses more in the second
        return {both: 0.8, one: 0.7 if case == CASES[0] else 1.3}.get(config, 1.0)

    found = search(FORWARD, CASES, table, Fake(ms), say=quietly)
    assert found.chosen == both and found.medians[both] == [0.8, 0.8] and found.medians[table] == [1.0, 1.0]
    assert not found.refused and not found.unreached


@pytest.mark.parametrize("gain,wins", [(0.0, False), (MARGIN - 0.005, False), (MARGIN + 0.005, True)])
def test_ties_keep_the_table(gain: float, wins: bool) -> None:
    table = choose(FORWARD, H100)
    found = search(FORWARD, CASES, table, Fake(lambda case, config: 1.0 if config == table else 1 / (1 + gain)), say=quietly)
    assert (found.chosen != table) == wins


def test_a_wrong_candidate_is_told_and_never_chosen() -> None:
    table, wrong, lines = choose(FORWARD, H100), Config(64, 64, 8, 1, 16), []

    def refusal(case: TuningCase, config: Config) -> str | None:
        return "WRONG: q is off by 1.0, allowed 0.1" if config == wrong and case == CASES[1] else None

    bench = Fake(lambda case, config: {wrong: 0.1, OTHER: 0.5}.get(config, 1.0), refusal)
    found = search(FORWARD, CASES, table, bench, say=lines.append)
    assert found.chosen == OTHER and list(found.refused) == [wrong]
    assert lines == ["short_fwd, 64x64 warps 8 programs 16: WRONG: q is off by 1.0, allowed 0.1"]
    assert wrong not in {config for _, config in bench.timed}


def test_a_winner_must_be_right_for_all_that_its_key_stands_for() -> None:
    """Such as a refinement that was not tuned for and takes more shared memory."""
    table, greedy = choose(FORWARD, H100), Config(64, 64, 8, 1, 16)

    def refusal(case: TuningCase, config: Config) -> str | None:
        return "skipped: out of shared memory" if config == greedy and case.refinement == "value" else None

    bench = Fake(lambda case, config: {greedy: 0.1, OTHER: 0.5}.get(config, 1.0), refusal)
    found = search(FORWARD, CASES, table, bench, say=quietly)
    assert found.chosen == OTHER and list(found.refused) == [greedy]


def test_where_the_tables_row_fails_the_fastest_right_one_is_chosen() -> None:
    table = choose(FORWARD, H100)
    bench = Fake(lambda case, config: 0.99 if config == OTHER else 1.0, lambda case, config: "no" if config == table else None)
    found = search(FORWARD, CASES, table, bench, say=quietly)
    assert found.chosen == OTHER and found.table == table and table in found.refused
    none_runs = search(FORWARD, CASES, table, Fake(lambda *_: 1.0, lambda *_: "no"), say=quietly)
    assert none_runs.chosen == table and not none_runs.medians
    assert "(refused)" in tune.results_table([found, none_runs])


def test_the_budget_ends_the_search_but_not_before_the_incumbents() -> None:
    table, current = choose(FORWARD, H100), candidates(FORWARD)[-1]
    ticks = iter(range(10**6))
    bench = Fake(lambda case, config: 0.5 if config == current else 1.0)
    found = search(FORWARD, CASES, table, bench, 4, current=current, say=quietly, now=lambda: next(ticks))
    checked = list(dict.fromkeys(config for case, config in bench.checked if case in CASES))
    assert checked[:2] == [table, current] and 2 <= len(checked) < len(candidates(FORWARD))
    assert found.unreached == len(candidates(FORWARD)) - len(checked) and found.chosen == current


def test_rounds_are_interleaved_and_medians_shrug_off_a_disturbance() -> None:
    table = choose(FORWARD, H100)
    calls = iter(range(10**6))
    bench = Fake(lambda case, config: 50.0 if next(calls) % 7 == 0 else 0.9 if config == OTHER else 1.0)
    assert search(FORWARD, CASES, table, bench, say=quietly).chosen == OTHER
    order = [config for case, config in bench.timed if case == CASES[0]]
    assert all(a != b for a, b in zip(order, order[1:], strict=False))


TINY = TuningCase(3, 2, 9, 8, 8, torch.float32, "additive", 0.2, ragged=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config]]:
    """Kernels by name with the configuration that each is launched with."""
    pytest.importorskip("triton", reason="needs Triton")
    from awrsr_kernels._triton import resident, resident_bwd, short, tiled, tiled_bwd, tiled_tables

    seen: list[tuple[str, Config]] = []
    inner = short.launch
    for module in (short, resident, resident_bwd, tiled, tiled_bwd, tiled_tables):

        def launch(kernel, grid, config, device, **arguments) -> None:  # type: ignore[no-untyped-def]
            block = arguments.get("BLOCK_L") or arguments.get("BLOCK") or (arguments["BLOCK_M"], arguments["BLOCK_N"])
            assert block in (config.block_m, (config.block_m, config.block_n))
            seen.append((kernel.__name__.removeprefix("_").removesuffix("_kernel"), config))
            inner(kernel, grid, config, device, **arguments)

        monkeypatch.setattr(module, "launch", launch)
    return seen


@pytest.mark.parametrize("kernel", dict.fromkeys(key.kernel for key in TABLE))
def test_a_forced_configuration_is_launched_and_right(
    kernel: str, launches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = TINY if kernel.startswith("short") else TINY._replace(batch=2, length=70)
    if kernel.startswith("tiled"):  # longer ones would take the interpreter long
        from awrsr_kernels._triton import problem

        for module in (timing, problem):
            monkeypatch.setattr(module, "is_resident", lambda *_: False)
    key = next(key for key in case.keys(launch_config.shared_memory(torch.device(DEVICE))) if key.kernel == kernel)
    config = Config(32, 32, 4, 1, 3) if key.length else Config(16, 32, 8, 1)  # short: a taller tile than its class
    assert config not in [row.config for row in TABLE[key]]
    assert Bench(torch.device(DEVICE)).refusal(case, key, config) is None
    assert {c for name, c in launches if name == kernel} == {config}
    assert config not in {c for name, c in launches if name != kernel}


def test_a_wrong_result_and_an_exception_are_refused(monkeypatch: pytest.MonkeyPatch, launches: list) -> None:
    key, config = TINY.keys(H100)[0], Config(16, 16, 4, 1, 2)
    bench = Bench(torch.device(DEVICE))
    assert bench.refusal(TINY, key, config) is None
    right = refined_attention
    monkeypatch.setattr(timing, "refined_attention", lambda *args, **more: right(*args, **more) * 1.001)
    found = bench.refusal(TINY, key, config)
    assert found is not None and found.startswith(f"WRONG at {TINY}: out is off by")

    def fails(*args: object, **more: object) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    monkeypatch.setattr(timing, "refined_attention", fails)
    assert bench.refusal(TINY, key, config) == f"skipped at {TINY}: RuntimeError: out of resource: shared memory"


def test_candidates_are_compiled_ahead_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own; one that fails there, as all do without a GPU, is left to the check that comes later."""
    key = TINY.keys(H100)[0]
    monkeypatch.setattr(tune, "candidates", lambda _: [Config(16, 16, warps, 1, 1) for warps in (1, 2, 4)])
    assert tune.compile_ahead({key: [TINY], key._replace(length=32): [TINY]}, 2, 60) == 6
    assert tune.compile_ahead({key: [TINY]}, 1, 0) == 0


def test_what_a_kernel_leaves_unwritten_is_wrong(monkeypatch: pytest.MonkeyPatch, launches: list) -> None:
    """Even where the memory that it was given holds the right result of a candidate before it."""
    from awrsr_kernels._triton import short

    torch.use_deterministic_algorithms(False)
    workload = Workload(TINY, torch.device(DEVICE))
    assert workload.wrong() == []
    monkeypatch.setattr(short, "launch", lambda *_, **more: None)
    assert any(line.startswith("out is off by nan") for line in workload.wrong())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_large_batch_is_compared_by_an_excerpt(dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    case = TINY._replace(batch=7, dropout_p=dropout_p)
    monkeypatch.setattr(timing, "REFERENCE_BYTES", 3 * 12 * 8 * case.heads * case.length**2)
    workload = Workload(case, torch.device(DEVICE))
    assert workload.index.tolist() == ([0, 1, 2] if dropout_p else [0, 3, 6])
    assert workload.references[0]["out"].shape[0] == 3 and workload.wrong() == []
    workload.excerpt_dout[5] = 1.0
    workload.lengths[5] = case.length
    assert any("is not zero where that of the output is" in line for line in workload.wrong())


def test_the_whole_search_in_the_interpreter(path: Path, launches: list) -> None:
    """Times of the interpreter mean nothing, but everything runs."""
    device, key = torch.device(DEVICE), Key("short_fwd", LENGTHS[0], 64, 4)
    rival = Config(16, 16, 2, 1, 4)
    found = search(key, [TINY], choose(key, H100), Bench(device), 0, current=rival, say=quietly)
    assert set(found.medians) == {found.table, rival} and not found.refused
    tune.save(path, found, *HERE)
    assert len(read_entries(path)) == (found.chosen == rival)
