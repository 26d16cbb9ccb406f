"""One attention by itself: captured from a model, compared with float64, timed. Imports `pipeline`, `passes`, `planning` and
what is below them."""
