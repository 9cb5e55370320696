"""Frozen teachers, and caches of their answers."""
