"""Evaluation of Hugging Face models: needle grids, loss on held-out text, and loss by position."""
