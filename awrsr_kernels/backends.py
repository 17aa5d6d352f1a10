"""Chooses the backend of a call, and runs the call on it.

H query heads, D head dim, D_v value dim.
"""

import torch
from torch import Tensor

from . import checks, launch_config, plans
from ._torch.attention import torch_attention
from .call import Call, Inputs
from .reference import reference_attention
from .torch_state import exports_any_size, jit_tracing, saveable, without_autocast

BACKENDS = ("auto", "triton", "torch", "reference")


def run(
    inputs: Inputs, call: Call, dropout_seed: int | Tensor | None, backend: str, sight: plans.Sight | None = None
) -> tuple[Tensor, ...]:
    """Run a checked call on its backend. Returns the output and, in stochastic attention, also that of the covariances.

    sight: the call as `plans.look` saw it; if the kernels run it, its signature gets a plan.
    """
    q, rank = inputs.q, 1 if inputs.w_q is None else inputs.compared() * inputs.w_q.shape[-1]
    features = launch_config.table_features(q.shape[-1], inputs.v.shape[-1], rank, call.stochastic, call.refinement)
    backend = choose_backend(backend, q, features)
    if backend != "reference":
        checks.no_transform(backend, inputs)
    learns = inputs.need_gradient() and torch.compiler.is_exporting()
    if backend == "torch" and (learns or exports_any_size(q, inputs.bounds)):
        backend = "reference"  # chunks and blocks of rows are made for the sizes at hand, and written in place
    if torch.compiler.is_compiling():  # which wants every input of an autograd Function to be another tensor
        inputs = Inputs._make(x if x is None else x.view_as(x) for x in inputs)
    if call.dropout_p:
        inputs = inputs._replace(seed=checks.seed(dropout_seed, q.device))
    if inputs.need_gradient():
        inputs = inputs._replace(bounds=saveable(inputs.bounds), seed=saveable(inputs.seed))
    with without_autocast(q.device):
        if backend == "reference":
            return reference_attention(inputs, call)
        if backend == "torch":
            return torch_attention(inputs, call)
        from ._triton.autograd import triton_attention

        group = q.shape[1] // inputs.k.shape[1]
        if call.shift and call.plain_heads % group:  # heads that share values must meet the same of them
            inputs = inputs._replace(k=inputs.k.repeat_interleave(group, 1), v=inputs.v.repeat_interleave(group, 1))

        if sight is not None:
            from ._triton.plan import plan_of

            plan = plan_of(sight, inputs, call)
            if plan is not None:
                plans.remember(sight.signature, plan)
                sight.tensors[plans.SEED] = inputs.seed  # which is drawn already
                return tuple(x.transpose(0, 1).unsqueeze(0) if call.varlen else x for x in plan(sight))
        return triton_attention(inputs, call)


def choose_backend(backend: str, q: Tensor, features: tuple[int, int, int]) -> str:
    """The backend for "auto" or for a name. features: numbers of features of q, v and the tables."""
    checks.choice("backend", backend, BACKENDS)
    if jit_tracing():
        if backend == "triton":
            must = "torch or reference under torch.jit.trace, which records the definition; torch.export records the kernels"
            checks.refuse("backend", '"triton"', must)
        return "reference"
    if backend == "auto" and not q.is_cuda:
        return "torch"
    if backend not in ("auto", "triton"):
        return backend
    reason = launch_config.unsupported_reason(q.device, q.dtype, features)
    if backend == "triton" and reason is not None:
        raise ValueError(f'backend is "triton", which cannot run here: {reason}')
    return "triton" if reason is None else "torch"
