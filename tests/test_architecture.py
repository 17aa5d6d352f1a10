"""The recommender's imports go one way: the operator enters by one door, and what reads data knows nothing of models."""

import ast
from pathlib import Path

import awrsr

ROOT = Path(awrsr.__file__).parent
ARROWS = {  # module: those of the package that it may import, at its head or inside a function
    "options": set(),
    "config": {"data", "options"},
    "files": set(),
    "data": {"files", "options"},
    "attention": set(),
    "batches": {"data"},
    "distance": {"attention"},
    "losses": {"distance"},
    "cooccurrence": {"data"},
    "loop": {"config", "files"},
    "recommender": {"batches", "config", "data", "distance", "files", "train"},
    "model": {"attention", "config", "distance", "recommender"},
    "ranking": {"batches", "data", "files", "recommender"},
    "train": {"batches", "config", "cooccurrence", "data", "files", "loop", "losses", "ranking", "recommender"},
    "tables": {"files", "recommender"},
    "significance": set(),
    "compare": {"config", "files", "ranking", "significance"},
    "explain": {"files"},
    "analyse": {"config", "data", "model", "ranking", "recommender", "significance"},
    "analysis_page": {"analyse", "config"},
    "export": {"attention", "files", "model"},
}
COMMANDS = {"cli", "commands", "__main__", "__init__"}  # these put the others together


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, how many folders up; 0 for one outside the package) of every import in a file."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(each.name, 0) for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module, node.level)] if node.module else [(each.name, node.level) for each in node.names]
    return found


def test_imports_go_one_way() -> None:
    for path in ROOT.rglob("*.py"):
        inside = path.relative_to(ROOT)
        module = inside.parts[0].removesuffix(".py")
        for name, level in imports(path):
            if level == len(inside.parts) and module not in COMMANDS:
                assert name.split(".")[0] in ARROWS[module], f"{inside} imports {name}"
            assert not name.startswith(("benchmarks", "tests")), f"{inside} imports {name}"


def test_the_operator_enters_by_one_door() -> None:
    doors = {path.name for path in ROOT.rglob("*.py") if any(name.startswith("awrsr_kernels") for name, _ in imports(path))}
    assert doors == {"attention.py"}
