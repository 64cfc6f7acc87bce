"""Feed-forward networks, experts, attention, loss head: fast versions, some with a slow reference."""
