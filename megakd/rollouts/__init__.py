"""Texts that a model generates during the run: prompts, generators, storage, evaluation."""
