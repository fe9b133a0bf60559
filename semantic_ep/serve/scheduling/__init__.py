"""Attention-DP: which rank serves a request, decided on rank 0 while requests arrive."""
