"""What runs: the operators of :mod:`fusedkd.backends.schema` on each device."""
