"""The plan of a decoding step: what its signature decides, and the way from the caller's tensors straight to the recorded launch.

A signature holds the shapes of the cache's tensors, so a cache that grows has another one. What differs from step to step, the
number of items, is read by the kernel on the device, and checked by `refined_attention_step` against position tables.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..plans import BOUNDS, PLAIN, SEED, Sight
from .decode import CHANGED, launch_step
from .repeat import Form, Repeated, form_of

CACHED = ("k", "v", "k_a", "y", "w_q", "w_k", "first", "end", "q_a")
NAMES = ("q", "new_k", "new_v", "new_w_q", "new_w_k", "gate", *CACHED, "lags")  # of the tensors of `launch_step`
Options = tuple[str, float, float, bool, int]  # refinement, scales, shift and plain heads


class StepPlan(Repeated):
    """What the signature of a step decides. Its tensors are those of `launch_step` that the step has.

    Args:
        names: theirs.
        options: of `launch_step`, beside its tensors.
    """

    def __init__(self, forms: list[Form], fields: list[int], names: list[str], options: Options) -> None:
        super().__init__(forms, fields)
        self.names, self.options = names, options
        self.changed = [i for i, name in enumerate(names) if name in CHANGED]

    def __call__(self, sight: Sight) -> Tensor:
        """The output of a step of this signature, which appends to the cache's tensors."""
        given, addresses = self.taken(sight)
        increment_version([given[i] for i in self.changed])  # as an operator does that says what it changes
        return self.results(given, addresses)[0]

    def launched(self, views: list[Tensor]) -> list[Tensor]:
        named: dict[str, Any] = dict.fromkeys(NAMES) | dict(zip(self.names, views, strict=True))
        named |= zip(("refinement", "softmax_scale", "refine_scale", "shift", "plain_heads"), self.options, strict=True)
        return [launch_step(**named)]


def step_plan_of(sight: Sight, tensors: Sequence[Tensor | None], options: Options) -> StepPlan | None:
    """The plan of a checked step on these tensors and with these options of `launch_step`.

    None if the tensors are not the caller's own, or one of the cache requires a gradient.
    """
    forms, fields, names = [], [], []
    seats = [field for field in range(len(sight.tensors)) if field not in (BOUNDS, SEED)]  # which steps do not have
    for name, x, field in zip(NAMES, tensors, seats, strict=True):
        if x is None:
            continue
        given = sight.tensors[field]
        form = form_of(given if given.__class__ in PLAIN else x, x, packed=False)  # a gate that is a number becomes a tensor
        if form is None or (x.requires_grad and torch.is_grad_enabled()):
            return None
        forms.append(form)
        fields.append(field)
        names.append(name)
    return StepPlan(forms, fields, names, options)
