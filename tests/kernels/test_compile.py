"""The kernels compile ahead of time, without a GPU, within the resources that `launch_config.py` and their budgets count on."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from awrsr_kernels import compile_report
from awrsr_kernels.checks import REFINEMENTS
from awrsr_kernels.compile_report import KINDS, TARGETS, cases, spill_budget
from awrsr_kernels.launch_config import (
    RESIDENT,
    RESIDENT_KERNELS,
    SHORT_KERNELS,
    STEP,
    STEP_TABLE,
    TABLE,
    TILED,
    TILED_KERNELS,
    Config,
    Key,
    choose,
    key_of,
    step_config,
)

SUMS = ("sum_partials", "sum_query_heads", "widen", "gather")  # of parts of gradients, after a backward, and of rows beside others
COLUMNS = "kernel regime refinement dtype dropout config target registers spill_bytes shared_bytes tensor_core_instructions"


def run(arguments: list[str], seconds: int = 580) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton", reason="needs Triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=seconds)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("report")
    options = ["--sample", "--jobs", "2", "--json", str(folder / "report.json"), "--cache", str(folder / "cache")]
    done = run(["-m", "awrsr_kernels.compile_report", *options])
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "report.json").read_text())


def test_every_kernel_and_refinement_compiles_within_its_budget(sample: list[dict[str, Any]]) -> None:
    for row in sample:
        assert set(COLUMNS.split()) | {"tensor_cores_expected", "budget_ok"} <= set(row), row
        assert row["budget_ok"] and row["tensor_cores_expected"] == (row["kernel"] not in ("decode_step", *SUMS))
        assert row["tensor_cores_expected"] == (row["tensor_core_instructions"] > 0)
        assert row["unset_registers"] == 0
        assert row["shared_bytes"] <= TARGETS[row["target"]].shared and row["programs_per_processor"] > 0
        assert row["shared_bytes"] > 0 or row["kernel"] in SUMS
        assert row["spill_bytes"] == 0 or row["kernel"] not in SUMS
    found = {(row["kernel"], row["refinement"], row["gaussian"]) for row in sample if row["target"] == "sm_90"}
    tiled = {"tiled_fwd", "tiled_bwd_rows", "tiled_bwd_columns"}
    stages = {f"{kernel}_stage{i}" for kernel in tiled for i in (1, 2)} | {"tiled_bwd_tables"}
    short = {(kernel, *kind) for kernel in SHORT_KERNELS for kind in KINDS}
    plain, refined = [kind for kind in KINDS if kind[0] == "none"], [kind for kind in KINDS if kind[0] != "none"]
    steps = {("decode_step", refinement, False) for refinement in REFINEMENTS}
    steps |= {("sum_partials", *kind) for kind in refined} | {("sum_query_heads", "none", True)}
    steps |= {(kernel, "additive", False) for kernel in ("widen", "gather")}
    short |= {(kernel, refinement, False) for kernel in RESIDENT_KERNELS for refinement in REFINEMENTS}
    assert found == short | steps | {(k, *kind) for k in tiled for kind in plain} | {(k, *kind) for k in stages for kind in refined}
    assert {row["target"] for row in sample} == set(TARGETS)


def test_half_precision_stays_in_registers_on_sm_90(sample: list[dict[str, Any]]) -> None:
    rows = [row for row in sample if row["target"] == "sm_90" and row["group"] == 1]
    forward = [row for row in rows if "fwd" in row["kernel"]]
    backward = [row for row in rows if row["kernel"] == "short_bwd" and not (row["gaussian"] or row["lagged"])]
    assert len(forward) == 11 + 4 + 14 + 3
    assert not any(row["spill_bytes"] for row in rows if row["kernel"] == "decode_step")
    assert not any(row["spill_bytes"] for row in forward)
    assert {row["refinement"]: row["spill_bytes"] <= 64 * (row["refinement"] == "additive") for row in backward} == dict.fromkeys(
        REFINEMENTS, True
    )


def test_rows_are_read_and_written_16_bytes_at_a_time(sample: list[dict[str, Any]]) -> None:
    for row in sample:
        if row["kernel"] == "decode_step":  # 16 bytes, but for the few new numbers
            assert row["loads"]["16"] > sum(row["loads"].values()) / 2, row
        if row["target"] == "sm_90" and row["regime"] == "short" and row["group"] == 1:
            tensors = 3 + 2 * (row["refinement"] != "none") + ("bwd" in row["kernel"])  # values of Gaussians are two halves
            tile = 2 if row["gaussian"] and row["refinement"] == "additive" else 4  # its q, k and tables are half as wide, too
            values = 1 + ("bwd" in row["kernel"])  # pairs, of halves each; a tile of 64 x 64 takes 128 threads four loads each
            assert row["loads"]["16"] == tile * (tensors - values) + 4 * values, row
            assert row["stores"]["16"] > 0


def test_the_table_says_what_the_kernels_take(sample: list[dict[str, Any]]) -> None:
    for row in sample:
        if row["length"] == STEP:
            assert row["config"] == step_config((row["width"],) * 3, 2)._asdict() and row["shared_bytes"] < 4096
        elif row["target"] == "sm_90" and row["kernel"] not in SUMS:
            kernel = row["kernel"].split("_stage")[0]
            entry = TABLE[Key(kernel, row["length"], row["width"], 2)][0]
            assert row["config"] == entry.config._asdict() and row["shared_bytes"] <= entry.shared


def test_issue_slots_and_exponentials_are_counted(sample: list[dict[str, Any]]) -> None:
    for row in sample:
        uncounted = row["length"] == STEP or row["kernel"] in SUMS or row["group"] > 1 or row["lagged"]
        if row["target"] not in ("sm_80", "sm_90") or uncounted:
            assert not {"issue_slots", "exponentials"} & set(row), row
            continue
        assert ("issue_slots_100" in row) == (row["length"] == RESIDENT)
        assert row["issue_slots"] > 100 and row.get("issue_slots_100", 0) < row["issue_slots"] / 2, row
        assert 1 < row["exponentials"] < 3 and row["issue_slots_budget"] is None  # the sample has dropout
        judged = row["exponentials_budget"]
        assert row["exponentials"] <= judged if row["refinement"] != "stochastic" else judged is None, row


def test_the_report_leaves_out_no_row_of_the_table() -> None:
    returned, steps = set(), set()
    for target, chip in TARGETS.items():
        for case in cases(target):
            if case.length == STEP:
                steps.add((case.width, 4 if case.dtype == "float32" else 2))
                continue
            kernels = {TILED: TILED_KERNELS, RESIDENT: RESIDENT_KERNELS}.get(case.length, SHORT_KERNELS)
            for kernel in kernels if case.refinement != "none" else kernels[:3]:
                key = Key(kernel, case.length, case.width, 4 if case.dtype == "float32" else 2)
                assert key_of(kernel, case.length or 1000, (case.width,) * 3, key.itemsize) == key
                returned.add((key, choose(key, chip.shared)))
    assert returned == {(key, row.config) for key, rows in TABLE.items() for row in rows} and steps == set(STEP_TABLE)
    for target in TARGETS:
        kinds = {(c.refinement, c.stochastic, c.dtype, c.dropout) for c in cases(target) if c.length != STEP}
        assert len(kinds) == len(KINDS) * 3 * 2


def test_a_row_over_its_budget_fails_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = cases("sm_90")[0]
    row = case.columns() | {"kernel": "short_fwd", "config": choose(Key("short_fwd", 16, 64, 2), 1 << 20)._asdict()}
    row |= {"registers": 9, "spill_bytes": 8, "shared_bytes": 1, "tensor_core_instructions": 1, "loads": {}}
    row |= {"programs_per_processor": 1, "spill_budget": spill_budget(case, "short_fwd"), "budget_ok": False}
    assert row["spill_budget"] == 0
    monkeypatch.setattr(compile_report, "compile_cases", lambda *_: iter([[row], [row | {"error": "Failed: it does"}]]))
    monkeypatch.setattr(compile_report, "find_spec", lambda _: True)
    assert compile_report.main([]) == 1
    printed = capsys.readouterr().out
    row |= {"issue_slots": 1234.0, "issue_slots_budget": 1000, "exponentials": 2.5, "exponentials_budget": 1.25}
    monkeypatch.setattr(compile_report, "compile_cases", lambda *_: iter([[row]]))
    assert compile_report.main([]) == 1
    counted = capsys.readouterr().out
    assert "1,234" in counted and "OVER BUDGET (spill 0, issue_slots 1,000, exponentials 1.25)" in counted
    assert "OVER BUDGET (spill 0)" in printed and "Failed: it does" in printed and "2 over their budget" in printed


# What ptxas 12.8 made of a product's second step, once its operands lie at UR4: UR8 is set at the end of the loop alone
MISASSEMBLED = """
        /*0010*/                   USGXT.U32 UR4, UR5, 0xe ;      /* 0x0000 */
        /*0020*/                   UMOV UR5, URZ ;
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR4].tnspB, RZ, !UPT ;
        /*0040*/                   UIADD3 UR6, UP0, UR8, 0x20, URZ ;
        /*0050*/                   UIADD3.X UR7, UR9, -0x3ffffff0, URZ, UP0, !UPT ;
        /*0060*/                   IMAD.WIDE R2, R62, UR6, RZ ;
        /*0070*/                   UIADD3.64 UR10, UR6, 0x20, URZ ;
        /*0080*/              @!UP1 UIADD3 UR12, UR11, 0x1, URZ ;
        /*0090*/                   UMOV UR8, UR4 ;
        /*00a0*/                   UMOV UR9, UR5 ;
"""


def test_registers_that_nothing_has_set_are_found() -> None:
    found = compile_report.unset_registers(MISASSEMBLED.replace("UR4, UR5, 0xe", "UR4, 0xe"))
    assert [line.split(",")[0] for line in found] == ["UIADD3 UR6", "UIADD3.X UR7"]
    assert compile_report.unset_registers(MISASSEMBLED.replace("UR8, 0x20", "UR4, 0x20").replace("UR9, -0x", "UR5, -0x"))[1:] == []


def test_narrow_products_are_assembled_right() -> None:
    """Where ptxas 12.8 went wrong: half precision, D_v of up to 32."""
    code = """
import os
from awrsr_kernels.compile_report import CompileCase, compile_case
for refinement, width, stochastic in (("none", 32, True), ("none", 16, False), ("simple", 16, False)):
    for length in (64, 0):
        case = CompileCase("sm_90", refinement, "bfloat16", False, length, width, stochastic=stochastic)
        print(*(row["unset_registers"] for row in compile_case(case)))
"""
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"0"}


@pytest.mark.parametrize(
    "usual,newer,taken", [("12.8", "12.9", True), ("12.9", "13.4", False), ("12.8", "12.8", False), ("9.0", "13.0", True)]
)
def test_the_newer_assembler_takes_our_kernels_where_the_usual_one_errs_and_no_others(
    usual: str, newer: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = pytest.importorskip("triton.knobs", reason="needs Triton")
    from triton.backends.nvidia import compiler

    from awrsr_kernels._triton import ptxas

    tools = SimpleNamespace(
        ptxas=SimpleNamespace(version=usual, path="usual"), ptxas_blackwell=SimpleNamespace(version=newer, path="newer")
    )
    monkeypatch.setattr(knobs, "nvidia", tools)
    monkeypatch.setattr(ptxas, "_version_of", lambda path: path)
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: tools.ptxas)
    monkeypatch.setattr(compiler, "get_ptxas_version", lambda arch=80: "usual")

    def assemblers() -> list[str]:
        return [compiler.get_ptxas(90).path, compiler.get_ptxas_version(90)]

    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    ptxas.install()
    assert assemblers() == ["usual"] * 2 and "TRITON_PTXAS_PATH" not in os.environ
    with ptxas.sound_ptxas(), ThreadPoolExecutor(1) as other:
        assert assemblers() == ["newer" if taken else "usual"] * 2
        assert other.submit(assemblers).result() == ["usual"] * 2  # somebody's kernels, compiled meanwhile
        monkeypatch.setenv("TRITON_PTXAS_PATH", "mine")
        assert assemblers() == ["usual"] * 2  # which reads the variable
    assert os.environ["TRITON_PTXAS_PATH"] == "mine"


def test_every_launch_of_ours_is_assembled_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from awrsr_kernels._triton import launch, ptxas

    seen: list[int] = []
    kernel = {(1,): lambda **arguments: seen.append(ptxas._ours.depth)}
    launch.launch(kernel, (1,), Config(16, 16, 1, 1), torch.device("cpu"))
    assert seen == [1] and ptxas._ours.depth == 0


def test_lengths_and_batches_compile_nothing_anew() -> None:
    code = """
from awrsr_kernels.compile_report import CompileCase, compile_case
for refinement, length, sizes in (
    ("simple", 64, ((33, 4), (47, 1), (64, 70), (48, 16))), ("none", 0, ((300, 4), (513, 1), (1024, 7))),
    ("additive", 256, ((70, 4), (200, 1), (256, 70))),
    ("value", 1, ((200, 4), (513, 1), (1024, 7))),
):
    case = CompileCase("sm_90", refinement, "bfloat16", True, length, 64)
    rows = [compile_case(case, window, batch) for window, batch in sizes]
    print(len(rows[0]), len({row["variant"] for call in rows for row in call}))
"""
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "3", "3", "3", "3", "3", "1", "1"]  # kernels of a call, and binaries for all calls together
