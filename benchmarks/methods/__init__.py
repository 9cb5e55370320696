"""Benchmarks of what methods learn."""
