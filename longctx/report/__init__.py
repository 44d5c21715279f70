"""`longctx report`: show a run on one static page."""
