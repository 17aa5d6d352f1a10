"""The tuner, `python -m awrsr_kernels.tuning`: finds launch configurations for your GPU."""
