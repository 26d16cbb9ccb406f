"""Ahead of time: exported programs with swapped kernels, their files, and AOTInductor packages. Imports `entrances`, `reports`
and the rooms below them."""
