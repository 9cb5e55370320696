"""The process of a rank: signals, launchers, wall-clock by phase, and standard output."""
