"""Runs of `fusedkd distil` side by side."""
