"""Imports go down the floors named here, never in circles; every file is short and opens with a sentence on its purpose."""

import ast
import contextlib
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .selection import SLOW, SLOW_FIXTURES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("awrsr_kernels", "awrsr", "benchmarks", "tests")  # each may import those before it

# The floors of each package, the lowest first. A room is a module or a folder; it imports rooms of lower floors alone.
FLOORS = {
    "awrsr_kernels": [
        "torch_state tolerance habits lagging",
        "values",
        "checks dropout wasserstein launch_config",
        "call tuned issue_slots",
        "windows operators plans",
        "reference _torch _triton",
        "backends",
        "jagged cache tables multihead",
        "api",
        "stochastic decoding",
        "module",
        "integrations tuning compile_report",
        "tune __init__",
    ],
    "awrsr": [
        "processes progress",
        "files options habits",
        "lock data",
        "config",
        "presets",
        "models",
        "model_file recommending",
        "evaluation",
        "run_folder",
        "training answers",
        "recommender",
        "analysis export search",
        "cli",
        "__init__ __main__",
    ],
}
TRITON = {"_triton", "tuning", "tuned", "compile_report"}  # the rooms that may import Triton
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 110


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, anywhere in it: a module, or a module and a name of it."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), each.name]) for each in node.names)


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package: str) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms.split()}
    for path in python_files(package):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[0] in PACKAGES[PACKAGES.index(package) + 1 :]:
                raise AssertionError(f"{path.relative_to(ROOT)} imports {name} from a package above its own")
            if parts[0] == package and len(parts) > 1 and parts[1] in floor and parts[1] != room:
                assert floor[parts[1]] < floor[room], f"{path.relative_to(ROOT)} imports {name}, which is not on a floor below"


def test_benchmarks_share_what_is_common() -> None:
    for path in python_files("benchmarks/common"):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("benchmarks.")}
        assert rooms <= {"common"}, f"{path.relative_to(ROOT)} imports {rooms}"


def test_no_import_is_circular() -> None:
    modules = {module_of(path): path for path in python_files("awrsr_kernels", "awrsr", "benchmarks")}
    arrows: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        arrows[module] = {name for name in names if name in modules and name != module}
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle


def test_the_operator_enters_the_recommender_by_one_door() -> None:
    doors = [path for path in python_files("awrsr") if any(name.startswith("awrsr_kernels") for name in imports(path))]
    assert [path.relative_to(ROOT / "awrsr").as_posix() for path in doors] == ["models/attention.py"]


def test_triton_is_imported_where_kernels_are() -> None:
    for path in python_files("awrsr_kernels", "awrsr"):
        room = path.relative_to(ROOT).parts[1].removesuffix(".py")
        assert room in TRITON or not [name for name in imports(path) if name.split(".")[0] == "triton"], path


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is device code: a long kernel keeps in registers what a split one would have to hand over."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_files_are_short_and_say_what_they_are_for() -> None:
    for path in [*python_files(*PACKAGES), ROOT / "setup.py"]:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        tree = ast.parse(text)
        assert text.count("\n") <= MOST_LINES, f"{name} has {text.count(chr(10))} lines"
        purpose = ast.get_docstring(tree) or ""
        assert purpose[:1].isupper() or purpose[:1] in "`AI", f"{name} does not open with a sentence: {purpose[:60]!r}"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
                lines = (node.end_lineno or node.lineno) - node.lineno
                assert lines <= MOST_LINES_OF_A_FUNCTION, f"{name}: {node.name} has {lines} lines"


def test_the_oldest_python_that_is_promised_is_what_lint_allows(tmp_path: Path) -> None:
    promised = re.search(r'python_requires=">=([0-9.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert promised
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'target-version = "py{promised[1].replace(".", "")}"' in settings and f'python_version = "{promised[1]}"' in settings
    newer = tmp_path / "newer.py"
    newer.write_text('"""Newer syntax, which ast.parse reads with any feature_version."""\n\nx = {(0,): 1}\nprint(x[*(0,)])\n')
    syntax = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", "pyproject.toml", "--ignore", "ALL"]
    every = subprocess.run([*syntax, *PACKAGES, "setup.py"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert not every.returncode, every.stdout + every.stderr
    refused = subprocess.run([*syntax, newer], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"on Python {promised[1]}" in refused.stdout, refused.stdout + refused.stderr


def requirements() -> Iterator[Requirement]:
    """All of setup.py: the lists in its call of setup."""
    lists = {"install_requires", "extras_require"}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg in lists:
            value = ast.literal_eval(node.value)
            yield from map(Requirement, value if isinstance(value, list) else [each for extra in value.values() for each in extra])


def test_requirements_are_bounded_above_and_agree_with_what_is_pinned_and_installed() -> None:
    wanted = list(requirements())
    unbounded = {each.name for each in wanted if not {bound.operator for bound in each.specifier} & {"<", "<=", "=="}}
    assert unbounded == {"furo"} and len(wanted) > 30, unbounded
    for name in ("constraints.txt", "constraints-libraries.txt"):
        lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
        for pin in map(Requirement, filter(None, lines)):
            versions = [bound.version for bound in pin.specifier if bound.operator == "=="]
            for each in (each for each in wanted if each.name == pin.name):
                assert all(map(each.specifier.contains, versions)), f"{name} has {pin}, setup.py {each}"
    for each in wanted:  # numpy and setuptools: older ones only for RecBole
        with contextlib.suppress(PackageNotFoundError):
            assert each.name in ("numpy", "setuptools") or each.specifier.contains(version(each.name)), each


def forwarding_files() -> list[str]:
    """Commands at the old places, which only forward."""
    files = [path for path in (ROOT / "benchmarks").glob("*.py") if "from forward import" in path.read_text(encoding="utf-8")]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


@pytest.mark.parametrize("command", [*forwarding_files(), "awrsr_kernels.tune"])
def test_old_commands_run_from_where_they_were(command: str) -> None:
    arguments = [command] if command.endswith(".py") else ["-m", command]
    done = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert not done.returncode and "usage:" in done.stdout, done.stderr


def test_what_the_fast_selection_leaves_out_as_slow_is_there() -> None:
    for name in (*SLOW, *(f"{file}::{fixture}" for file, fixture in SLOW_FIXTURES.items())):
        file, _, function = name.partition("::")
        assert f"def {function}" in (ROOT / file).read_text(encoding="utf-8"), name
