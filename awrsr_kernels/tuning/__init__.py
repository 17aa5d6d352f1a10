"""The tuner, `python -m awrsr_kernels.tune`: finds launch configurations for your GPU."""
