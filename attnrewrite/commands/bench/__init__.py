"""`attnrewrite bench`: kernels by shape, and steps of denoisers by variant, measured side by side in one process."""
