"""What a run reads, and its stages: inputs, the loop, scores, checkpoints, importance of units."""
