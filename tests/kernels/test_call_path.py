"""From a public call to each kernel by searching for the next name: CONTRIBUTING's hops, followed through the source."""

import ast
import functools
from pathlib import Path

import pytest

import awrsr_kernels

ROOT = Path(awrsr_kernels.__file__).parent
Hop = tuple[str, str]  # a function, "Class.method" or assigned name, and its file
Node = ast.FunctionDef | ast.ClassDef | ast.Assign

CALLS: list[Hop] = [
    ("refined_attention", "api.py"),
    ("refined_attention_varlen", "api.py"),
    ("stochastic_refined_attention", "stochastic.py"),
    ("stochastic_refined_attention_varlen", "stochastic.py"),
]
TO_FUNCTION: list[Hop] = [
    ("run", "backends.py"),
    ("triton_attention", "_triton/autograd.py"),
    ("TritonAttention.forward", "_triton/autograd.py"),
    ("launch_forward", "_triton/autograd.py"),
]
RESIDENT, RESIDENT_BWD = "_triton/resident.py", "_triton/resident_bwd.py"
TABLES, LAGS = "_triton/tiled_tables.py", "_triton/lags.py"
FROM_BACKWARD: list[Hop] = [
    ("TritonAttention.backward", "_triton/autograd.py"),
    ("gradients_of", "_triton/autograd.py"),
    ("launch_backward", "_triton/autograd.py"),
]
TO_SUMS: list[Hop] = [
    *FROM_BACKWARD,
    ("launch_short_backward", "_triton/short.py"),
    ("Gradients.summed", "_triton/reduce.py"),
]
TO_TILED_BACKWARD: list[Hop] = [*FROM_BACKWARD, ("launch_tiled_backward", "_triton/tiled_bwd.py")]
PATHS: list[list[Hop]] = [
    *(
        [call, *TO_FUNCTION, ("launch_short_forward", "_triton/short.py"), ("_short_fwd_kernel", "_triton/short.py")]
        for call in CALLS
    ),
    [CALLS[0], *TO_FUNCTION, ("launch_tiled_forward", "_triton/tiled.py"), ("_tiled_fwd_kernel", "_triton/tiled.py")],
    [CALLS[0], *TO_FUNCTION, ("launch_resident_forward", RESIDENT), ("_resident_fwd_kernel", RESIDENT)],
    [*FROM_BACKWARD, ("launch_resident_backward", RESIDENT_BWD), ("_resident_bwd_kernel", RESIDENT_BWD)],
    [*FROM_BACKWARD, ("launch_short_backward", "_triton/short.py"), ("_short_bwd_kernel", "_triton/short.py")],
    *(
        [*TO_TILED_BACKWARD, (f"TiledBackward.{launcher}", "_triton/tiled_bwd.py"), (kernel, "_triton/tiled_bwd.py")]
        for launcher, kernel in (
            ("launch_stage", "_tiled_bwd_rows_kernel"),
            ("launch_stage", "_tiled_bwd_columns_kernel"),
        )
    ),
    [*TO_TILED_BACKWARD, ("launch_tables", TABLES), ("_tiled_bwd_tables_kernel", TABLES)],
    [CALLS[0], *TO_FUNCTION, ("launch_tiled_forward", "_triton/tiled.py"), ("launch_widen", LAGS), ("_widen_kernel", LAGS)],
    [
        *TO_TILED_BACKWARD,
        ("TiledBackward.gather_lags", "_triton/tiled_bwd.py"),
        ("launch_gather", LAGS),
        ("_gather_kernel", LAGS),
    ],
    [*TO_SUMS, ("Gradients.sum_partials", "_triton/reduce.py"), ("_sum_partials_kernel", "_triton/reduce.py")],
    [*TO_SUMS, ("Gradients.sum_query_heads", "_triton/reduce.py"), ("_sum_query_heads_kernel", "_triton/reduce.py")],
    [
        ("refined_attention_step", "decoding.py"),
        ("_kernel_step", "decoding.py"),
        ("triton_step", "_triton/decode.py"),
        ("launch_step", "_triton/decode.py"),
        ("_decode_step_kernel", "_triton/decode.py"),
    ],
]


@functools.cache
def parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def definition(name: str, file: str) -> Node:
    """Where a file defines a name, at its head or in a class."""
    scope: ast.Module | ast.ClassDef = parsed(file)
    *classes, last = name.split(".")
    for wanted in classes:
        scope = next(node for node in scope.body if isinstance(node, ast.ClassDef) and node.name == wanted)
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == last:
            return node
        if isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id == last for x in node.targets):
            return node
    raise AssertionError(f"{file} does not define {name}")


def names(node: ast.AST) -> set[str]:
    """Every name that stands in a piece of source, of variables and of attributes."""
    every = ast.walk(node)
    return {x.id if isinstance(x, ast.Name) else x.attr for x in every if isinstance(x, ast.Name | ast.Attribute)}


def imported(name: str, file: str, source: str) -> bool:
    """Whether a file takes a name from another one."""
    module = source.removesuffix(".py").split("/")[-1]
    froms = (node for node in ast.walk(parsed(file)) if isinstance(node, ast.ImportFrom))
    return any((node.module or "").split(".")[-1] == module and name in [x.name for x in node.names] for node in froms)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path[0][0]} to {path[-1][0]}")
def test_each_hop_names_the_next(path: list[Hop]) -> None:
    for (name, file), (following, source) in zip(path, path[1:], strict=False):
        definition(following, source)
        first = following.split(".")[0]  # autograd finds a Function's forward and backward by itself
        if name.split(".")[0] == first:  # another method
            first = following.split(".")[1]
        assert first in names(definition(name, file)), f"{name} in {file} does not name {following}"
        assert file == source or imported(first, file, source), f"{file} does not import {first} from {source}"


def test_the_planned_call_reaches_the_launches_by_name() -> None:
    hops = [
        CALLS[0],
        ("look", "plans.py"),
        ("Plan.__call__", "_triton/plan.py"),
        ("PlannedAttention.forward", "_triton/plan.py"),
        ("Repeated.results", "_triton/repeat.py"),
        ("Launches.run", "_triton/record.py"),
        ("Launches.run_by_handle", "_triton/record.py"),
    ]
    for (name, file), (following, _) in zip(hops, hops[1:], strict=False):
        assert following == "Plan.__call__" or {*following.split(".")} & names(definition(name, file)), (name, following)
    page = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(name in page for name, _ in hops)


def test_contributing_lists_these_hops() -> None:
    page = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = [tuple(line.split()[:2]) for line in page.splitlines() if line.startswith("    ") and ".py  " in f"{line}  "]
    assert PATHS[0] == [hop for hop in listed if hop in PATHS[0]]
    assert all(name.rpartition(".")[2] in page for path in PATHS for name, _ in path if name.startswith("launch_"))


def test_every_kernel_has_a_path() -> None:
    kernels = {
        node.name
        for path in (ROOT / "_triton").glob("*.py")
        for node in parsed(str(path.relative_to(ROOT))).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert kernels == {path[-1][0] for path in PATHS}
