"""CUDA kernels for dispatch, combine, shuffled reduce-scatter and all-gather; see README.md."""
