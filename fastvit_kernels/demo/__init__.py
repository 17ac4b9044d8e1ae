"""The demonstration behind `fastvit-kernels demo`: a model stock against accelerated on photographs."""
