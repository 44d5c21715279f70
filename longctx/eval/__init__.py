"""Evidence: needle grids, held-out loss, loss by position. Works on any Hugging Face model, or over the ring."""
