"""Preference alignment that stays good in late rounds."""
