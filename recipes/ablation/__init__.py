"""Table 4 of the DistilBERT paper: `python -m recipes.ablation --help`."""
