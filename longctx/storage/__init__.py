"""Files: written completely or not at all, safetensors read and written one tensor at a time, models in folders.

Modules: `files` syncs, replaces and removes files; `sources` reads a local folder or a hub repository; `table` lists
the tensors of a model from its headers; `writer` streams safetensors; `model` checks a model's folder, as every
verb does first. Only `writer` imports torch.
"""
