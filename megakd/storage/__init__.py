"""Files on disk: atomic writes, checksums and differences."""
