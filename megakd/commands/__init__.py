"""The commands of `megakd`, one file a command: its options and its code."""
