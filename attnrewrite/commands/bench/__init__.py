"""`attnrewrite bench`: measures kernels by shape and denoiser steps by variant, side by side in one process."""
