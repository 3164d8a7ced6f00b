"""Attention: one contract (api.py), and a file for each implementation and what they share."""
