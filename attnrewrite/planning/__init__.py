"""Which kernel takes which call, and the plan as data. Imports `masks`, `backends`, `kernels`, `graphs` and what is below
them."""
