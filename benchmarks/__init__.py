"""Speed, memory and accuracy of the losses beside PyTorch and its compiler: ``make bench``, ``make gpu``."""
