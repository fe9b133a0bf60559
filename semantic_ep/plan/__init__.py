"""Plan where each expert lives and on which rank each token or request runs."""
