"""The tuner, `python -m awrsr_kernels.tuning`: better launch configurations for the GPU at hand."""
