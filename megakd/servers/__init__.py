"""Inference servers over HTTP, each in an environment of its own."""
