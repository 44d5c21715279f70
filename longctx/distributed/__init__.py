"""The world a process belongs to: ranks, launcher environment, ranks started here, and point-to-point transfers.

`ranks` imports torch; import from the modules, so that a command that only asks for its rank does not wait for it.
"""
