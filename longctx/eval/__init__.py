"""Evidence: needle grids, held-out loss, loss by position, of any Hugging Face model."""
