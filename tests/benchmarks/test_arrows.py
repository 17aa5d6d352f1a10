"""The folders of the benchmarks import one way: everything uses common/, which uses none of the others."""

import ast
from pathlib import Path

import benchmarks

ROOT = Path(benchmarks.__file__).parent
ARROWS = {"common": set(), "operator": {"common"}, "training": {"common"}, "study": {"common"}, "gpu": {"common", "operator"}}


def test_imports_go_one_way() -> None:
    for folder, allowed in ARROWS.items():
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level == 1:
                    continue
                names = [each.name for each in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                if isinstance(node, ast.ImportFrom):
                    prefix = "benchmarks" if node.level == 2 else None
                    names = [".".join(x for x in (prefix, node.module) if x)] if node.module else [f"benchmarks.{x}" for x in names]
                for parts in (name.split(".") for name in names if name.startswith("benchmarks.")):
                    assert parts[1] in allowed | {folder}, f"{path.relative_to(ROOT)} imports {'.'.join(parts)}"
