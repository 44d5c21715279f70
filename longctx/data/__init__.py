"""Documents for a curriculum: where they come from, how they become tokens, and which of them stand in
sequence i of a stage.

Names load on first use: `longctx data --help` waits for neither torch nor datasets.
"""
