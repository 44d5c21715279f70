"""The benchmarks of `longctx bench`, a module for each; a module imports heavy packages only when it runs."""
