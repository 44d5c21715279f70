"""Files: written completely or not at all, safetensors read and written one tensor at a time, models in folders.

Modules: `files` syncs, replaces and removes files; `model_files` reads a local folder or a hub repository;
`table` lists the tensors of a model from its headers; `writer` streams safetensors; `model` checks a model's folder, as
every verb does first; `hub` finds out whether the hub can be reached. Only `writer` imports torch.
"""
