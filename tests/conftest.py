"""Interpreter or GPU is decided here, before Triton is first imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: more threads wait for each other, burning what others could use
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it a GPU's matrix products are refused in deterministic mode
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import itertools  # noqa: E402
import math  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("shared cores", deadline=None)  # how long an example takes says nothing there
hypothesis.settings.load_profile("shared cores")

pytest_plugins = ("tests.selection",)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENGINES = ("torch", "short", "resident", "tiled")  # whatever computes besides the reference: a backend, or a regime of the kernels


def interpret_faster() -> None:
    """Spares Triton's interpreter what takes half of its time and changes no result.

    It replaces triton.language's functions by its own whenever a device function is called; here once in a launch for each set of
    modules that its functions see. It computes whether integers overflow for an assertion that it then leaves out, and builds its
    table of dtypes anew for each look into it.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)

    look_up, known = interpreter._get_np_dtype, dict[str, Any]()

    def array_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = array_dtype

    core = interpreter.tl.core
    core._unwrap_shape = lambda shape: [getattr(n, "value", n) for n in shape]

    @functools.cache
    def shape_and_size(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(n) for n in shape]), core.constexpr(math.prod(shape))

    def new_tensor(tensor: Any, handle: Any, dtype: Any) -> None:
        tensor.handle, tensor.type, tensor.dtype = handle, dtype, dtype.scalar
        tensor.shape, tensor.numel = shape_and_size(dtype.shape if dtype.is_block() else ())

    core.tensor.__init__ = new_tensor

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[int]] = set()

    @functools.cache
    def modules(function: Any) -> frozenset[int]:
        return frozenset(id(x) for x in function.__globals__.values() if x is interpreter.tl or x is interpreter.tl.core)

    def replace_once(function: Any) -> Any:
        if modules(function) not in replaced:
            replaced.add(modules(function))
            return replace(function)

    def launch_anew(*args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launch_anew


if DEVICE == "cpu":
    with contextlib.suppress(ImportError, AttributeError):  # another Triton, or none: as slow as it comes
        interpret_faster()


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that torch.empty hands out holds NaN, so that nothing unwritten passes for a result."""
    from awrsr_kernels import plans

    plans.forget()  # those of another test, which may have replaced what a signature decides
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more threads, and lose much where several processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refuse(*_: object) -> None:
    raise AssertionError("the call went to the other regime")


def short_config(problem: Any, kernel: str) -> Any:
    """What the table has, and a tile of 64 rows for what it sends to the tiled regime."""
    from awrsr_kernels.launch_config import Config, choose, key_of

    key = key_of(kernel, problem.call.max_len, problem.features, problem.q.dtype.itemsize)
    return Config(64, 64, 4, 1, programs=1) if key is None else choose(key, problem.shared)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """choose(engine) -> name of the backend to call; holds the kernels to that regime, or to two of them ("mixed", in causal
    dot-product attention short and resident, otherwise short and tiled), with small tiles. What the resident regime does not take
    is tiled."""

    def chosen(engine: str) -> str:
        if engine not in ("short", "resident", "tiled", "mixed"):
            return engine
        pytest.importorskip("triton", reason="needs Triton")
        from awrsr_kernels import launch_config, plans
        from awrsr_kernels._triton import autograd, problem

        plans.forget()
        if engine != "mixed":
            monkeypatch.setattr(autograd, "launch_tiled_forward" if engine == "short" else "launch_short_forward", refuse)
        monkeypatch.setattr(problem.Problem, "processors", lambda _: 1)  # few programs, so that sequences share tiles
        if engine == "short" and DEVICE == "cpu":  # whatever the size of an element: the interpreter has room
            monkeypatch.setattr(problem, "is_short", lambda max_len, *_: max_len <= 64)
            monkeypatch.setattr(problem.Problem, "config", short_config)
        if engine in ("resident", "tiled"):
            tiles = {name: launch_config.Config(32, 16, 4, 1, programs=1) for name in launch_config.RESIDENT_KERNELS}
            monkeypatch.setattr(problem, "is_short", lambda *_: False)
            monkeypatch.setattr(problem, "choose", lambda key, *_: tiles.get(key.kernel, launch_config.Config(32, 16, 4, 1)))
        if engine == "tiled":
            monkeypatch.setattr(problem, "is_resident", lambda *_: False)
        if engine == "mixed":  # sequences of up to 16 items in the short regime, beside longer ones in the tiled one
            monkeypatch.setattr(problem, "is_short", lambda max_len, *_: max_len <= 16)
            small = {False: launch_config.Config(32, 32, 1, 1, programs=1), True: launch_config.Config(32, 16, 4, 1)}
            monkeypatch.setattr(problem, "choose", lambda key, *_: small[key.kernel in launch_config.TILED_KERNELS])
        return "triton"

    return chosen


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """printed(*arguments): what the command line writes."""
    from .recommender import runs

    return functools.partial(runs.printed, capsys)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(*arguments): the one line in which the command line says what is wrong."""
    from .recommender import runs

    return functools.partial(runs.refused, capsys)


@pytest.fixture
def stopped(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """stopped(*arguments): status and error of a command line that cannot be parsed."""
    from .recommender import runs

    return functools.partial(runs.stopped, capsys)


def cumulative(lengths: list[int], device: str = DEVICE) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
