"""Importance scores, sparsity allocation, sorted and cut models."""
