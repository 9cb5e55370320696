"""Benchmark of megakd_kernels against its peers; `cd kernels && python -m bench`."""
