"""`pytest --fast`: from every test file what fits into a few seconds, one case of each test, and a line on what was left out."""

import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from typing import Any

import pytest

FILE_SECONDS = 3.0  # of processor time, after which no other test of a file starts

# What takes longer than that by itself: files, tests, and tests that use a fixture.
SLOW = (
    "tests/docs/test_docs.py::test_the_pages_build_without_a_warning",
    "tests/kernels/test_compile.py::test_lengths_and_batches_compile_nothing_anew",
    "tests/kernels/test_compile.py::test_narrow_products_are_assembled_right",
    "tests/kernels/test_distributed.py",
    "tests/torture/test_slice.py",
    "tests/recommender/test_lock.py::test_two_commands_with_one_folder_never_mix",
    "tests/kernels/test_torch_export.py::test_an_aotinductor_package_gives_the_same",
    "tests/recommender/test_ends.py::test_a_full_disk_is_one_line_and_leaves_nothing",
    "tests/recommender/test_ends.py::test_too_little_memory_is_one_line",
    "tests/recommender/test_nodes.py::test_machines_without_a_shared_disk_resume_together",
    "tests/recommender/test_processes.py::test_a_forked_worker_computes_what_its_parent_does",
)
SLOW_FIXTURES = {"tests/kernels/test_compile.py": "sample"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help=f"one case of each test, {FILE_SECONDS:.0f} s of each file, nothing slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        config.pluginmanager.register(Fast(config), "fast selection")


class Fast:
    """Chooses the tests and counts what it leaves out; with xdist the workers do, and report to the process that prints."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.spent: dict[str, float] = defaultdict(float)  # seconds of processor time, by file
        self.cut: Counter[str] = Counter()  # tests that came when the time of their file was over
        self.cases = self.slow = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        tests: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            tests[item.nodeid.partition("[")[0]].append(item)
        chosen = [random.Random(name).choice(cases) for name, cases in tests.items()]  # the same ones each time
        kept = [item for item in chosen if not is_slow(item)]
        self.cases, self.slow = len(items) - len(chosen), len(chosen) - len(kept)
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        began = processor_seconds()
        result = yield
        self.spent[file_of(item)] += processor_seconds() - began
        return result

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.spent[file_of(item)] > FILE_SECONDS:
            self.cut[file_of(item)] += 1
            pytest.skip(f"the {FILE_SECONDS:.0f} s of this file are over")

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["left out"] = self.cases, self.slow, dict(self.cut)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.cases, self.slow, cut = getattr(node, "workeroutput", {}).get("left out", (self.cases, self.slow, {}))
        self.cut.update(cut)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        files = ", ".join(f"{count} of {file.removeprefix('tests/')}" for file, count in sorted(self.cut.items()))
        late = f"{sum(self.cut.values())} that came after the {FILE_SECONDS:.0f} s of their file{': ' * bool(files)}{files}"
        terminalreporter.write_line(
            f"--fast left out {self.cases} further cases of these tests, {self.slow} slow tests, and {late}. `make test` runs all."
        )


def file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def is_slow(item: pytest.Item) -> bool:
    fixture = SLOW_FIXTURES.get(file_of(item))
    timed = item.get_closest_marker("timing") is not None
    return timed or item.nodeid.startswith(SLOW) or fixture in getattr(item, "fixturenames", ())


def processor_seconds() -> float:
    """Of this process and of those that it started and waited for: what a test takes, whatever else the machine does."""
    spent = os.times()
    return time.process_time() + spent.children_user + spent.children_system
