"""The run config: its sections, its file, and all checks that need only the config."""
