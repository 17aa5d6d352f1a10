"""The "triton" backend. Importing it registers its operators with torch, so it is imported only where Triton is used."""

from .autograd import TritonAttention, triton_attention
from .decode import triton_step
from .ptxas import install

__all__ = ["TritonAttention", "triton_attention", "triton_step"]

install()
