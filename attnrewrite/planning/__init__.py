"""Decides which kernel takes which call, and holds the plan as data. Imports `masks`, `backends`, `kernels`, `graphs` and the
packages below them."""
