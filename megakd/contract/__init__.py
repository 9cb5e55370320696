"""Types shared by all subpackages: stages, loss terms, tasks, metrics, results, the lab."""
