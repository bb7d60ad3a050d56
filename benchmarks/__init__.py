"""One script per operation and one per training step; each runs as ``python benchmarks/bench_*.py`` from anywhere."""
