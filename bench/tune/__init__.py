"""Launch configurations of the Triton kernels: which there are, which compile well, which is the fastest on a GPU."""
