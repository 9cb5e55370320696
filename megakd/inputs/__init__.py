"""Inputs of a run: what is read, checked and encoded before any weights are loaded."""
