"""The process of a rank: signals, seeds, wall-clock by phase, and standard output."""
