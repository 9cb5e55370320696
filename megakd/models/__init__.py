"""Loading, cutting and exporting of models, and the differences between model families."""
