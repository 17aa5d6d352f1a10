"""How far a result may deviate from the definition: one rule for tests, benchmarks and tuning."""

import torch
from torch import Tensor

OUTPUTS = ("out", "out_mean", "out_cov")
FEW = 8  # numbers of a result whose own error says little


def allowed_errors(exact: dict[str, Tensor], in_dtype: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Largest absolute error of each result of a call in `dtype`: `OUTPUTS`, and gradients under any other name.

    exact: the reference in float64. in_dtype: the reference in `dtype`, `rounded_at_every_step`. A result may err by twice (a
    gradient: three times) what the latter errs, plus 2 max|(exact + 0.3 - 0.3) - exact| evaluated in `dtype`, plus 32 eps of the
    accumulation dtype (float32, for float64 float64, where this term stands alone) times the largest magnitude among the outputs,
    or among all gradients: without it a gradient that is truly zero would fail by rounding. A gradient of few numbers (the gate's)
    may come out right in the reference by luck: its own error counts as no less, relative to its magnitude, than that of the worst
    other one.
    """
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(accumulation).eps
    largest = {True: 0.0, False: 0.0}  # of the outputs, and of the gradients
    for name, wanted in exact.items():
        largest[name in OUTPUTS] = max(largest[name in OUTPUTS], _peak(wanted))
    own = {name: _peak(in_dtype[name].double() - wanted) for name, wanted in exact.items()}
    lucky = {name for name, wanted in exact.items() if name not in OUTPUTS and wanted.numel() <= FEW}
    others = [own[name] / _peak(wanted) for name, wanted in exact.items() if name not in lucky and _peak(wanted)]
    own |= {name: max(own[name], max(others, default=0.0) * _peak(exact[name])) for name in lucky}
    limits = {}
    for name, wanted in exact.items():
        limits[name] = 32 * eps * largest[name in OUTPUTS]
        if dtype != torch.float64:
            rounded = wanted.to(dtype)
            limits[name] += (2 if name in OUTPUTS else 3) * own[name]
            limits[name] += 2 * _peak((rounded + 0.3 - 0.3) - rounded)
    return limits


def wrong_results(
    results: dict[str, Tensor], exact: dict[str, Tensor], in_dtype: dict[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """A line for every result whose error is above `allowed_errors` or NaN, or whose shape or dtype is wrong."""
    lines = []
    for name, limit in allowed_errors(exact, in_dtype, dtype).items():
        if results[name].shape != exact[name].shape or results[name].dtype != in_dtype[name].dtype:
            got, wanted = ((tuple(x.shape), x.dtype) for x in (results[name], in_dtype[name]))
            lines.append(f"{name} is {got}, must be {wanted}")
            continue
        error = _peak(results[name].double() - exact[name])
        if not error <= limit:
            lines.append(f"{name} is off by {error:.1e}, allowed {limit:.1e}")
    return lines


def _peak(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
