"""The process of a rank: signals, its launchers, where its time goes, its output."""
