"""Scores of models on held-out rows."""
