"""Serve an MoE model in a semantic expert-parallel group."""
