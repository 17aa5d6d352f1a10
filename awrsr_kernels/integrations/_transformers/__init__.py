"""The parts of refined layers in models of Hugging Face transformers: tables, masks, packed rows and caches."""

IMPLEMENTATION = "refined_attention"  # what transformers calls it, and the key of the settings in a model's config
