"""The kernels compile ahead of time, without a GPU, within the resources that `launch_config.py` counts on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


def report(folder: Path, *options: str) -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="needs Triton")
    path = folder / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks/compile_report.py"), "--json", str(path), *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("refinement", ["none", "simple", "value", "additive"])
def test_every_kernel_compiles_for_sm_90(refinement: str, length: int, tmp_path: Path) -> None:
    rows = report(tmp_path, "--refinement", refinement, "--length", str(length), "--jobs", "1")
    kernels = {row["kernel"].split()[0] for row in rows}
    tiled = {"tiled_fwd", "tiled_bwd_rows", "tiled_bwd_columns"} | ({"tiled_bwd_tables"} if refinement != "none" else set())
    assert kernels == ({"short_fwd", "short_bwd"} if length == 64 else tiled)
    for row in rows:
        forward = "fwd" in row["kernel"]
        assert row["shared"] <= (98304 if length == 64 else 115200)  # what launch_config.py says they take
        assert row["tensor_core"] > 0
        assert row["stack"] <= (0 if forward else 900), row  # bytes per thread that do not fit in registers


@pytest.mark.parametrize("arch,length", [("sm_80", 64), ("sm_100", 512), ("gfx942", 512)])
def test_a_kernel_compiles_for_other_gpus(arch: str, length: int, tmp_path: Path) -> None:
    dtype = "float16" if arch == "sm_80" else "bfloat16"
    rows = report(tmp_path, "--arch", arch, "--refinement", "none", "--length", str(length), "--dtype", dtype, "--jobs", "1")
    assert rows and all(0 <= row["shared"] <= SHARED[arch] and row["tensor_core"] > 0 for row in rows)


def test_lengths_and_batches_compile_nothing_anew() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.compile_report import Case, compile_case
for refinement, sizes in (("simple", ((33, 4), (47, 1), (64, 7), (48, 16))), ("none", ((200, 4), (513, 1), (1024, 7)))):
    rows = [compile_case(Case("sm_90", refinement, "bfloat16", length, 64, 64, batch=batch)) for length, batch in sizes]
    print(len(rows[0]), len({{row["variant"] for call in rows for row in call}}))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "3", "3"]  # kernels of a call, and binaries for all calls together
