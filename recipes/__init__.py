"""What is done with the losses, from a checkout: see README.md."""
