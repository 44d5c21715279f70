"""The adapter: what training changed, in a file small enough to carry into any fine-tune of the same base.

`extract` writes tuned - base as a LoRA in PEFT's format, `merge` adds it to a sibling and gives the sibling
the adapter's rope and window. Both stream with pread and need neither transformers nor peft.
"""
