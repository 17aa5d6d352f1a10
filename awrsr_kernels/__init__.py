"""Self-attention whose weights attend to one another, fused: the refined attention of AWRSR as a drop-in operator."""

from .api import attention_weights, refined_attention, refined_attention_varlen
from .module import RefinedMultiheadAttention
from .stochastic import stochastic_attention_weights, stochastic_refined_attention, stochastic_refined_attention_varlen

__all__ = [
    "RefinedMultiheadAttention",
    "attention_weights",
    "refined_attention",
    "refined_attention_varlen",
    "stochastic_attention_weights",
    "stochastic_refined_attention",
    "stochastic_refined_attention_varlen",
]
__version__ = "0.1.0"
