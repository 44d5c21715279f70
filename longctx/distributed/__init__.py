"""The world of a process: its rank, the launcher's environment, starting ranks here, and point-to-point transfers.

Import from the modules: `ranks` imports torch, and a command that only asks for its rank should not wait for it.
"""
