"""The training loop and the parts that a stage needs around it."""
