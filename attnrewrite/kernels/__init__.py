"""The words that a backend file is written in: the call, its mask, the machine, the record, the source of its library, the op,
the decision. Imports `graphs` and what is below it."""
