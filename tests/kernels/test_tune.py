"""The tuner without a GPU: what it tries and chooses by an invented clock, its file, forced configurations in the interpreter."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from awrsr_kernels import launch_config, refined_attention, tuned
from awrsr_kernels.launch_config import LENGTHS, TABLE, TILED, Config, Key, choose
from awrsr_kernels.tuned import forced, read_entries, tuned_entries, tuned_for, write_entries
from awrsr_kernels.tuning import __main__ as tune
from awrsr_kernels.tuning import timing as _tune_bench
from awrsr_kernels.tuning.search import MARGIN, candidates, carried, search
from awrsr_kernels.tuning.timing import Bench, Case, Workload, guards

from ..conftest import DEVICE

H100 = 232448
FORWARD, BACKWARD = Key("short_fwd", 64, 64, 2), Key("short_bwd", 64, 64, 2)
TILED_FORWARD = Key("tiled_fwd", TILED, 64, 2)
OTHER = Config(64, 64, 8, 1, 2)
CASES = [Case(8, 2, 50, 32, 32, torch.bfloat16), Case(8, 2, 50, 64, 64, torch.bfloat16)]
HERE = ("A GPU", "3.6.0")
ALONE = ("--processes", "1")


def entry(key: Key = FORWARD, config: Config = OTHER, gpu: str = HERE[0], triton: str = HERE[1]) -> dict:
    return {"gpu": gpu, "triton": triton, "key": list(key), "config": list(config), "source": "a test"}


class Fake:
    """An instrument whose times and refusals are functions of case and configuration."""

    def __init__(self, ms: Callable[[Case, Config], float], refusal: Callable[[Case, Config], str | None] | None = None) -> None:
        self.ms, self.refuse = ms, refusal or (lambda case, config: None)
        self.checked: list[tuple[Case, Config]] = []
        self.timed: list[tuple[Case, Config]] = []

    def refusal(self, case: Case, key: Key, config: Config) -> str | None:
        self.checked.append((case, config))
        return self.refuse(case, config)

    def time(self, case: Case, key: Key, config: Config) -> float:
        assert (case, config) in self.checked, "timed before it was checked"
        self.timed.append((case, config))
        return self.ms(case, config)


def quietly(line: str) -> None:
    pass


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("AWRSR_KERNELS_TUNED", str(tmp_path / "cache" / "tuned.json"))
    tuned._of.cache_clear()
    yield tuned.tuned_path()
    tuned._of.cache_clear()


# What is tried


@pytest.mark.parametrize("key", TABLE, ids=lambda key: "-".join(map(str, key)))
def test_candidates_can_be_launched_and_hold_the_tables_rows(key: Key) -> None:
    found = candidates(key)
    assert len(set(found)) == len(found) >= 10
    assert found[0] == TABLE[key][0].config and {row.config for row in TABLE[key]} <= set(found)
    for config in found:
        assert tuned.misfit(key, config) is None
        assert carried(key, config) <= 255 * 32 * config.num_warps
        if key.length != TILED:
            assert key.length <= config.block_m == config.block_n <= 64 and 1 <= config.programs <= 16 and config.num_stages == 1
        else:
            assert config.programs == 0 and config.num_warps in (4, 8) and 1 <= config.num_stages <= 3
    assert Config(64, 64, 4, 2) in candidates(TILED_FORWARD) and Config(128, 128, 8, 3) in candidates(TILED_FORWARD)
    assert Config(64, 128, 8, 3) not in candidates(Key("tiled_fwd", TILED, 256, 4))  # compiles to 1.4 MB, and for a minute


def test_a_case_knows_its_kernels() -> None:
    case = CASES[0]
    assert case.keys(H100) == [FORWARD, BACKWARD]
    assert {key.kernel for key in case._replace(length=200).keys(H100)} == set(launch_config.TILED_KERNELS)
    assert "tiled_bwd_tables" not in {key.kernel for key in case._replace(length=200, refinement="none").keys(H100)}
    assert case._replace(rank=100, refinement="none").keys(H100)[0].width == 64  # the rank of no table


@pytest.mark.parametrize("key", [key for key in TABLE if key.itemsize == 4], ids=lambda key: "-".join(map(str, key)))
def test_guards_belong_to_the_key_they_guard(key: Key) -> None:
    found = guards(key, torch.float32)
    assert {case.refinement for case in found} == {"none", "simple", "value", "additive"}
    assert all(case.ragged and case.dropout_p and case.kv_heads < case.heads for case in found)
    launched = [case for case in found if case.refinement != "none" or key.kernel != "tiled_bwd_tables"]
    assert all(key in case.keys(H100) and max(case.features()) == key.width for case in launched)


# The search


def test_the_fastest_over_all_cases_of_a_key_is_chosen() -> None:
    table = choose(FORWARD, H100)
    both, one = Config(64, 64, 2, 1, 4), Config(64, 64, 8, 1, 4)

    def ms(case: Case, config: Config) -> float:  # `one` is fastest in the first case, and loses more in the second
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

    def refusal(case: Case, config: Config) -> str | None:
        return "WRONG: q is off by 1.0, allowed 0.1" if config == wrong and case == CASES[1] else None

    bench = Fake(lambda case, config: {wrong: 0.1, OTHER: 0.5}.get(config, 1.0), refusal)
    found = search(FORWARD, CASES, table, bench, say=lines.append)
    assert found.chosen == OTHER and list(found.refused) == [wrong]
    assert lines == ["short_fwd, 64x64 warps 8 programs 16: WRONG: q is off by 1.0, allowed 0.1"]
    assert wrong not in {config for _, config in bench.timed}


def test_a_winner_must_be_right_for_all_that_its_key_stands_for() -> None:
    """Such as a refinement that was not tuned for and takes more shared memory."""
    table, greedy = choose(FORWARD, H100), Config(64, 64, 8, 1, 16)

    def refusal(case: Case, config: Config) -> str | None:
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


# The file


def test_cache_round_trip(path: Path) -> None:
    assert read_entries(path) == []
    write_entries(path, [entry(), entry(BACKWARD)])
    assert read_entries(path) == [entry(), entry(BACKWARD)]
    write_entries(path, [])
    assert read_entries(path) == []


def test_merging_keeps_other_gpus_versions_and_keys() -> None:
    old = [entry(), entry(BACKWARD), entry(gpu="Another"), entry(triton="3.9.0")]
    new = entry(config=Config(64, 64, 2, 1, 1))
    assert tuned.merged(old, [new], *HERE, [FORWARD]) == [*old[1:], new]
    assert tuned.merged(old, [], *HERE, [FORWARD]) == old[1:]  # the table's row was as good


def test_a_write_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entries(path, [entry()])
    with pytest.raises(TypeError):
        write_entries(path, [entry(), {"gpu": object()}])
    monkeypatch.setattr(tuned.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_entries(path, [])
    assert read_entries(path) == [entry()] and [p.name for p in path.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    "text,told",
    [
        ("{", "is no JSON"),
        ("[]", "must be an object of version 1"),
        ('{"version": 2, "entries": []}', "must be an object of version 1"),
        ('{"version": 1}', "must be an object of version 1"),
        (json.dumps({"version": 1, "entries": [entry(), 7]}), "entry 1 is 7; it must name gpu"),
        (json.dumps({"version": 1, "entries": [entry() | {"gpu": 3}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry() | {"key": [["short_fwd"], 64, 64, 2]}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry() | {"key": ["short_fwd", 63, 64, 2]}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry() | {"config": [64, 64, 4]}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry() | {"config": [64, 64, True, 1, 4]}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry(config=Config(32, 64, 4, 1, 4))]}), "entry 0 .* from the length class, 64"),
        (json.dumps({"version": 1, "entries": [entry(config=Config(64, 64, 3, 1, 4))]}), "entry 0 .*num_warps must be"),
        (json.dumps({"version": 1, "entries": [entry(config=Config(64, 64, 4, 1, 0))]}), "entry 0 .*programs must be"),
        (json.dumps({"version": 1, "entries": [entry(TILED_FORWARD, Config(48, 64, 4, 1))]}), "entry 0 .*powers of two"),
    ],
)
def test_a_malformed_file_is_named_with_its_entry(text: str, told: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{path}.*{told}"):
        read_entries(path)
    assert tune.main(["--list"]) == 1
    assert str(path) in capsys.readouterr().err


def test_a_tuned_entry_goes_before_the_table_on_its_own_gpu_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entries(path, [entry(gpu="Another"), entry(triton="3.0.0"), entry(BACKWARD)])
    assert tuned_entries(read_entries(path), *HERE) == {BACKWARD: OTHER}
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    found = tuned_for(torch.device("cuda", 0))
    assert choose(BACKWARD, H100, found) == OTHER != choose(BACKWARD, H100)
    assert choose(FORWARD, H100, found) == choose(FORWARD, H100)
    write_entries(path, [entry()])  # is seen at once
    assert choose(FORWARD, H100, tuned_for(torch.device("cuda", 0))) == OTHER
    assert tuned_for(torch.device("cpu")) == {}


# Forced configurations


def test_forced_nests_and_ends_and_reaches_other_threads() -> None:
    cpu, found = torch.device("cpu"), []
    inner = Config(64, 64, 2, 1, 1)
    with forced({FORWARD: OTHER}):
        with pytest.raises(RuntimeError), forced({FORWARD: inner, BACKWARD: inner}):
            thread = threading.Thread(target=lambda: found.append(dict(tuned_for(cpu))))  # as autograd's threads do
            thread.start()
            thread.join()
            raise RuntimeError
        assert tuned_for(cpu) == {FORWARD: OTHER} and choose(FORWARD, H100, tuned_for(cpu)) == OTHER
    assert tuned_for(cpu) == {} and found == [{FORWARD: inner, BACKWARD: inner}]


def test_forcing_what_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="configs is .*from the length class, 64"), forced({FORWARD: Config(32, 32, 4, 1, 4)}):
        pass
    with pytest.raises(ValueError, match="no such key"), forced({Key("short_fwd", 128, 64, 2): OTHER}):
        pass


# Checks in the interpreter

TINY = Case(3, 2, 9, 8, 8, torch.float32, "additive", 0.2, ragged=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config]]:
    """Kernels by name with the configuration that each is launched with."""
    pytest.importorskip("triton", reason="needs Triton")
    from awrsr_kernels._triton import short, tiled, tiled_bwd

    seen: list[tuple[str, Config]] = []
    inner = short.launch
    for module in (short, tiled, tiled_bwd):

        def launch(kernel, grid, config, device, **arguments) -> None:  # type: ignore[no-untyped-def]
            block = arguments.get("BLOCK_L") or (arguments["BLOCK_M"], arguments["BLOCK_N"])
            assert block in (config.block_m, (config.block_m, config.block_n))
            seen.append((kernel.__name__.removeprefix("_").removesuffix("_kernel"), config))
            inner(kernel, grid, config, device, **arguments)

        monkeypatch.setattr(module, "launch", launch)
    return seen


@pytest.mark.parametrize("kernel", [*launch_config.SHORT_KERNELS, *launch_config.TILED_KERNELS])
def test_a_forced_configuration_is_launched_and_right(kernel: str, launches: list) -> None:
    case = TINY if kernel.startswith("short") else TINY._replace(batch=2, length=70)
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
    monkeypatch.setattr(_tune_bench, "refined_attention", lambda *args, **more: right(*args, **more) * 1.001)
    found = bench.refusal(TINY, key, config)
    assert found is not None and found.startswith(f"WRONG at {TINY}: out is off by")

    def fails(*args: object, **more: object) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    monkeypatch.setattr(_tune_bench, "refined_attention", fails)
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
    monkeypatch.setattr(_tune_bench, "REFERENCE_BYTES", 3 * 12 * 8 * case.heads * case.length**2)
    workload = Workload(case, torch.device(DEVICE))
    assert workload.index.tolist() == ([0, 1, 2] if dropout_p else [0, 3, 6])
    assert workload.exact["out"].shape[0] == 3 and workload.wrong() == []
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


# The command line


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    told = capsys.readouterr()
    assert "tuning needs a GPU (NVIDIA of compute capability 8.0 or newer, or AMD)" in told.err and not told.out


@pytest.mark.parametrize(
    "options,told",
    [
        (["--shapes", "1,2,3"], "was '1,2,3', must be B,H,L,D"),
        (["--shapes", "1,2,3,257"], "D and R up to 256"),
        (["--dropout", "1"], "must be a number in [0, 1)"),
        (["--seconds", "soon"], "was 'soon', must be a number"),
        (["--processes", "0"], "was 0, must be at least 1"),
        (["--preset", "long", "--shapes", "1,1,1,1"], "leave one of them out"),
        (["--kernel", "short"], "invalid choice: 'short'"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(options)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_help_teaches_by_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--help"])
    examples = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m")]
    assert len(examples) == 5
    for line in examples:
        tune.make_parser().parse_args(line.split()[3:])


def test_the_list_shows_table_and_source(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_entries(path, [entry()])
    assert tune.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert "tuned for A GPU, Triton 3.6.0: 64x64 warps 8 programs 2\n      a test" in told and str(path) in told
    assert told.count("tiled_bwd_tables") == sum(key.kernel == "tiled_bwd_tables" for key in TABLE)


@pytest.fixture
def pretended(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU as far as the command line looks at one."""
    monkeypatch.setattr(tune, "missing_gpu", lambda cases: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "shared_memory", lambda device: H100)
    for module in (tune, tuned):
        monkeypatch.setattr(module, "machine", lambda device: HERE)
    return path


def test_a_run_from_options_to_file(pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    winner, stale = {FORWARD: OTHER, BACKWARD: TABLE[BACKWARD][0].config}, Key("short_fwd", 32, 64, 2)
    old = [entry(BACKWARD), entry(stale, Config(32, 32, 1, 1, 1)), entry(gpu="Another")]
    write_entries(pretended, old)
    bench = Fake(lambda case, config: 0.5 if config in winner.values() and config.num_warps > 4 else 1.0)
    monkeypatch.setattr(tune, "Bench", lambda device: bench)
    shapes = ["--shapes", "8,2,50,32", "8,2,50,64,16", "--refinement", "simple", "additive", "--kernel", "short_fwd", "short_bwd"]
    assert tune.main([*shapes, *ALONE]) == 0
    found = read_entries(pretended)
    assert found[:2] == old[1:]
    mine = tuned_entries(found, *HERE)
    assert mine[FORWARD] == OTHER and mine[stale] == Config(32, 32, 1, 1, 1)
    source = found[-1]["source"] if found[-1]["key"][0] == "short_fwd" else found[-2]["source"]
    assert "B 8 H 2 L 50 D 64 R 16 bfloat16 additive: 0.5000 ms, table 1.0000 ms" in source and "torch" in source
    told = capsys.readouterr().out
    assert "100.0%" in told and str(pretended) in told


@pytest.mark.parametrize("name", ["tuned.json", "another.json"])
def test_what_the_file_has_is_tried_again_wherever_it_lies(name: str, pretended: Path) -> None:
    path = pretended.with_name(name) if name != pretended.name else pretended
    write_entries(path, [entry()])
    bench = Fake(lambda case, config: 0.5 if config == OTHER else 1.0)
    tune.tune({FORWARD: CASES[:1]}, torch.device("cuda"), bench, path, HERE, 0.0)  # no time for any but those known
    assert tuned_entries(read_entries(path), *HERE)[FORWARD] == OTHER


def test_a_kernel_that_no_shape_reaches_is_told(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--preset", "long", "--kernel", "short_fwd"])
    assert "none of the shapes reaches" in capsys.readouterr().err


def test_a_broken_row_of_the_table_is_an_error(
    pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = TABLE[FORWARD][0].config
    monkeypatch.setattr(tune, "Bench", lambda device: Fake(lambda *_: 1.0, lambda case, c: "WRONG" if c == table else None))
    assert tune.main(["--shapes", "8,2,50,64", "--kernel", "short_fwd", *ALONE]) == 1
    assert "please report it" in capsys.readouterr().err and len(read_entries(pretended)) == 1


def test_interrupted_it_keeps_what_it_found(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Fake):
        def refusal(self, case: Case, key: Key, config: Config) -> str | None:
            if key == BACKWARD:
                raise KeyboardInterrupt
            return super().refusal(case, key, config)

    monkeypatch.setattr(tune, "Bench", lambda device: Interrupted(lambda case, config: 0.5 if config == OTHER else 1.0))
    assert tune.main(["--shapes", "8,2,50,64", *ALONE]) == 130
    assert tuned_entries(read_entries(pretended), *HERE) == {FORWARD: OTHER}


def test_a_file_that_cannot_be_written_is_told_before_the_work(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretended.parent.write_text("a file where the folder should be", encoding="utf-8")
    assert tune.main(["--shapes", "8,2,50,64", *ALONE]) == 1
    assert "awrsr_kernels.tune: " in capsys.readouterr().err
