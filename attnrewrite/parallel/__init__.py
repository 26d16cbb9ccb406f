"""Context parallelism: which tensors of a graph each rank holds a part of, what the ranks exchange, and the graph that one rank
runs. Imports graphs, kernels and passes; never the pipeline, reports or entrances."""
