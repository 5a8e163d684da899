"""What each loss is, in plain PyTorch, in the precision of its input: slow, short, obviously right.

The kernels compute what these functions say, the tests compare with them in float64, and
:mod:`fusedkd.backends.eager` answers with them where the C++ extension was not built.
"""
