"""The functions that a user calls on a model. Imports `reports`, `measuring`, `pipeline` and what is below them."""
