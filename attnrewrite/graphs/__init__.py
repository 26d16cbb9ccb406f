"""Reads, writes and traces PyTorch's graphs, sizes and compilers. Knows nothing of attention but the names of PyTorch's own
attention operators. Uses private PyTorch, with one function for each use. Imports `files` and `version`."""
