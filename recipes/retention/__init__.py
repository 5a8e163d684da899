"""What students keep of their teacher, how large they are and how fast: the DistilBERT paper's tables 1 and 3."""
