"""Opt-in seams into upstream code, installed as `semantic_ep.patches`."""
