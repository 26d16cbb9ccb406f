"""The functions that a user calls on a model. Imports `reports`, `measuring`, `pipeline` and the folders below them."""
