"""The first day on a GPU; the package beside `gpu_day.py`, which starts it."""
