"""The "triton" backend. Importing it, which is done only where Triton is wanted, registers its operators with torch."""

from .autograd import TritonAttention, triton_attention
from .decode import triton_step
from .ptxas import prefer_newer_ptxas

__all__ = ["TritonAttention", "triton_attention", "triton_step"]

prefer_newer_ptxas()
