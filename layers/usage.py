"""When an expert counts as starved. A file without torch, since plot_log.py reads it and must start fast."""

STARVED_BELOW = 0.1  # of a fair share: an expert that gets fewer of the routed rows is starved
