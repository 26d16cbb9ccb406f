"""Proves from the graph what each element of a mask is, and builds the mask tensor that a kernel gets. Imports `kernels`,
`graphs` and the packages below them."""
