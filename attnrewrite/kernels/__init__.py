"""The vocabulary of backend files: the call, its mask, the machine, the record, the source of its library, the op, the
decision. Imports `graphs` and the folders below it."""
