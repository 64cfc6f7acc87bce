"""Everything around the training loop: set-up, optimizers, parallel layouts, checkpoints, faults, logs."""
