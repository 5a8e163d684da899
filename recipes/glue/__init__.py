"""Methods of distillation compared on a classification task: `python -m recipes.glue --help`."""
