"""Training: the loop over stages, the exact step, its engines, and runs that survive a kill."""
