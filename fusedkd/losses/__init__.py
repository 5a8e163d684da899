"""What is called: one file for each loss, with its signature, docstring and ``torch.autograd.Function``."""
