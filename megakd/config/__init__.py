"""The run config: its sections, its file, and every check that needs the config alone."""
