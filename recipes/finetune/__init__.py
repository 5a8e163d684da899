"""Fine-tuning on GLUE and SQuAD, with a teacher or without: `python -m recipes.finetune --help`."""
