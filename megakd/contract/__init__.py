"""What crosses the seams between rooms: stages, loss terms, tasks, metrics, results, the lab."""
