"""What an element of a mask is, as the graph proves it, and what is built of it for a kernel. Imports `kernels`, `graphs` and
what is below them."""
