"""The benchmark on a GPU: correctness, then operators and models, forward and training, into one file per device."""
