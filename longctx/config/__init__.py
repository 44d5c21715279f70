"""Schemas of everything a user can set; Hydra and YAML end here."""
