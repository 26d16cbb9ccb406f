"""PyTorch's graphs, sizes and compilers: read, written, traced. Nothing here knows of attention, but for the names of
PyTorch's own attention operators. Private PyTorch is used here, one function each. Imports `files` and `version`."""
