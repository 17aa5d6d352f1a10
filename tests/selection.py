"""`pytest --fast`: from every test file what fits into a few seconds, one case of each test, and a word on what was left out."""

import random
from collections import Counter, defaultdict
from typing import Any

import pytest

FILE_SECONDS = 6.0  # after which no other test of a file starts

# Fixtures and tests that take longer than that by themselves.
SLOW_FIXTURES = {"tests/kernels/test_compile.py": {"sample"}}
SLOW = {"tests/docs/test_docs.py::test_the_pages_build_without_a_warning"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help=f"one case of each test, {FILE_SECONDS:.0f} s of each file, nothing slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        config.pluginmanager.register(Fast(config), "fast selection")


class Fast:
    """Chooses the tests and counts what it leaves out; with xdist the workers count, and report to the process that prints."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.spent: dict[str, float] = defaultdict(float)  # seconds, by file
        self.cut: Counter[str] = Counter()  # tests for which the time of their file was up
        self.cases = self.slow = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        tests: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            tests[item.nodeid.partition("[")[0]].append(item)
        chosen = [random.Random(name).choice(cases) for name, cases in tests.items()]  # the same one each time
        kept = [item for item in chosen if not is_slow(item)]
        self.cases, self.slow = len(items) - len(chosen), len(chosen) - len(kept)
        items[:] = kept

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        file = item.nodeid.partition("::")[0]
        if self.spent[file] > FILE_SECONDS:
            self.cut[file] += 1
            pytest.skip(f"the {FILE_SECONDS:.0f} s of this file are over")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.spent[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["left out"] = self.cases, self.slow, dict(self.cut)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.cases, self.slow, cut = getattr(node, "workeroutput", {}).get("left out", (self.cases, self.slow, {}))
        self.cut.update(cut)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        files = ", ".join(f"{count} of {file.removeprefix('tests/')}" for file, count in sorted(self.cut.items()))
        terminalreporter.write_line(
            f"--fast left out {self.cases} further cases of these tests, {self.slow} slow tests, and {sum(self.cut.values())} for "
            f"which the {FILE_SECONDS:.0f} s of their file were over{': ' * bool(files)}{files}. `make test` runs them all."
        )


def is_slow(item: pytest.Item) -> bool:
    fixtures = SLOW_FIXTURES.get(item.nodeid.partition("::")[0], set())
    named = item.nodeid.partition("[")[0] in SLOW or item.get_closest_marker("timing") is not None
    return named or not fixtures.isdisjoint(getattr(item, "fixturenames", ()))
