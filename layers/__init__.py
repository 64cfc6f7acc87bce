"""Feed-forward networks, experts, attention, loss head: fast paths, each beside its slow reference."""
