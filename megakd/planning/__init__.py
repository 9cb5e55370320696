"""Planning of a run: memory, network traffic and time, computed only from configs."""
