"""Vectors of one number have it in front of the dimensions in which the numbers of all threads stand."""


def ssa_to_scalar(vector):
    return vector[0]


def scalar_to_ssa(number, dtype):
    return dtype(number)[None]
