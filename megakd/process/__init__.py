"""The process of a rank and its files: signals, seeds, phases, whole folders, standard output."""
