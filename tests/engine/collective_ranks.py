"""Two gloo ranks, each in a process of its own, that run a case of `test_collectives.py`."""
