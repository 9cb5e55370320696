"""Loss terms, and the objective that sums them."""
