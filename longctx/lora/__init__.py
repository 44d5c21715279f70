"""Extracts the change of a training as a LoRA adapter, and merges it into other fine-tunes of the same base.

`extract` writes tuned - base in PEFT's format. `merge` adds it to a sibling and gives the sibling the adapter's rope
and window. Both read and write one block of rows at a time and need neither transformers nor peft.
"""
