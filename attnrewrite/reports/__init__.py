"""What people and files are told: reports, tables, scripts, pictures. Imports `measuring`, `pipeline`, `passes`, `planning`
and what is below them."""
