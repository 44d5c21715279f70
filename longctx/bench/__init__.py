"""What `longctx bench ...` measures; every module is one subverb and imports what it needs when it runs."""
