"""Checkpoints of other frameworks, read and written."""
