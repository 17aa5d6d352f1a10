"""Self-attention whose weights attend to one another, fused: the refined attention of AWRSR as a drop-in operator."""

from .api import attention_weights, refined_attention, refined_attention_varlen
from .cache import RefinedCache
from .decoding import refined_attention_prefill, refined_attention_step
from .module import RefinedMultiheadAttention
from .stochastic import stochastic_attention_weights, stochastic_refined_attention, stochastic_refined_attention_varlen

__all__ = [
    "RefinedCache",
    "RefinedMultiheadAttention",
    "attention_weights",
    "refined_attention",
    "refined_attention_prefill",
    "refined_attention_step",
    "refined_attention_varlen",
    "stochastic_attention_weights",
    "stochastic_refined_attention",
    "stochastic_refined_attention_varlen",
]
__version__ = "0.1.0"
