"""Triton kernels; imported only when a kernel is used."""
