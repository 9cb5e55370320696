"""Files on the disk: written whole or not at all, with checksums and fingerprints."""
