"""A discrete-event simulator of attention-DP serving, driven by the cost model."""
