"""Reports drawn from the measurements of a run: `report.json` is the truth, the rest draws it."""
