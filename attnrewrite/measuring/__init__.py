"""Measures one attention by itself: captures its tensors from a model, compares kernels with float64, times them. Imports
`pipeline`, `passes`, `planning` and the folders below them."""
