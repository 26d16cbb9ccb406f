"""The commands of `attnrewrite COMMAND`. Imports every other room."""
