"""Reports drawn from the measurements of a run."""
