"""The parts of refined layers in models of Hugging Face transformers: tables, masks, packed rows and caches."""

IMPLEMENTATION = "refined_attention"  # what transformers calls it, and the key of the settings in a model's config
# What a saved config says instead, since transformers quotes it when it refuses a name that nobody has registered.
SAVED_IMPLEMENTATION = "refined_attention, which importing awrsr_kernels.integrations.transformers adds"
