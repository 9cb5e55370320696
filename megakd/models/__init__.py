"""Loading, the bundle, and what differs between model families."""
