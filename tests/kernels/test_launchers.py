"""Compiled handles and `kernel[grid]` pass the same to Triton's launcher, in every version of Triton that is there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHER = "AWRSR_OTHER_TRITON"  # a folder for PYTHONPATH, such as pip install --target FOLDER --no-deps triton==3.6.0 makes

pytest.importorskip("triton", reason="needs Triton")


@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_both_launch_paths_pass_the_same(version: str, tmp_path: Path) -> None:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler for the stub driver")
    other = os.environ.get(OTHER, "")
    if version != "installed" and not other:
        pytest.skip(f"needs Triton {version} in a folder that {OTHER} names")
    path = [other] * (version != "installed") + [str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.launchers", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    triton = found.pop("triton")
    assert version == "installed" or triton.startswith(version)
    if not triton.startswith(("3.6", "3.9")):
        pytest.skip(f"Triton {triton} has launchers that `handles.py` does not know: every launch goes by `kernel[grid]`")
    assert len(found) == 10
    for name, pairs in found.items():
        assert len(pairs) >= 3, f"{name}: not launched by handle"
        for by_handle, by_grid in pairs:
            assert by_handle and by_handle == by_grid, name
