"""Programs beside the benchmarks."""
