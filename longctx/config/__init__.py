"""Schemas of everything a user can set, and the door through which settings enter the house."""
