"""`longctx theta`: compute theta by every rule, the lengths that each supports, and search for a better theta."""
