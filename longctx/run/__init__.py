"""One run from start to end: settings decided, stages trained, then adapter, sibling, evidence and report.

This package calls `longctx.train`, `longctx.eval`, `longctx.lora` and `longctx.report`; none of them calls it.
"""
