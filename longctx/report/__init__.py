"""A run on one static page."""
