"""Benchmarks: one module a theme, one runner, one result schema."""
