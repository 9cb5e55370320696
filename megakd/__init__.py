"""Distil Hugging Face teachers into smaller students under DeepSpeed."""
