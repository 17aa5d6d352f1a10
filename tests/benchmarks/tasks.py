"""Small problems of the benchmark, and what its providers are compared by."""

import dataclasses

import torch
from torch import Tensor

from benchmarks.operator.measure import gradients
from benchmarks.operator.workloads import DOT, OPERATOR, Batch, Outputs, Shape, Task

PROBLEMS = [(backbone, refinement) for backbone in OPERATOR for refinement in OPERATOR[backbone]]
SHAPE = Shape(B=3, H=4, H_kv=2, L=9, D=8, D_v=6, R=5)


def task(
    refinement: str = "simple", dtype: str = "float32", dropout_p: float = 0.0, shape: Shape = SHAPE, backbone: str = DOT
) -> Task:
    return Task(shape, refinement, dtype, dropout_p, "cpu", backbone=backbone)


def users_task(refinement: str, dtype: str = "float32", backbone: str = DOT) -> Task:
    return dataclasses.replace(
        task(refinement, dtype, backbone=backbone), users=(9, 1, 4, 7, 2), batch_size=2, source="x.txt"
    )


def as_tuple(out: Outputs) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


def same(batch: Batch, out: Outputs, expected: Outputs) -> None:
    """Outputs and gradients agree, in float64."""
    pairs = zip(as_tuple(out) + gradients(out, batch), as_tuple(expected) + gradients(expected, batch), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
