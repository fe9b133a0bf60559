"""Observe which experts each token goes to, and reduce it to a profile."""
