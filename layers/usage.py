"""When an expert counts as starved: one threshold for the layer, the log, the terminal and the picture.

It has a file without torch because plot_log.py reads it and must start fast."""

STARVED_BELOW = 0.1  # of a fair share: an expert that gets fewer of the routed rows is starved
