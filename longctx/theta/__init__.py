"""`longctx theta`: thetas by every rule, what they support, and a search for better ones."""
