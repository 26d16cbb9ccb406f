"""Reports, tables, scripts and pictures for users. Imports `measuring`, `pipeline`, `passes`, `planning` and the folders
below them."""
