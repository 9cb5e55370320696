"""The training loop and what a stage needs around it."""
