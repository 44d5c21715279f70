"""Training: the loop over stages, the exact step, the engines under it, and runs that survive being
killed.
"""
