"""Apply a plan to a checkpoint, losslessly and reversibly."""
