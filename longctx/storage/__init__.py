"""Files: written whole or not at all, safetensors read and written one tensor at a time, models found in folders.

Modules: `files` (sync, replace, write beside and rename), `sources` (a local folder or a hub repository), `table`
(the tensors of a checkpoint from its headers), `writer` (safetensors as a stream), `model` (the check of a model's
folder that every verb makes first). Only `writer` imports torch.
"""
