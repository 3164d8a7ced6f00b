"""Training: the loss, the optimiser, one step, the loop around it, and what a run reports."""
