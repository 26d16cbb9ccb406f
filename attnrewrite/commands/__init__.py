"""What `attnrewrite COMMAND` runs. Imports everything else."""
