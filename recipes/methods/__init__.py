"""Methods of distillation, a file each: every module's METHODS are what `python -m recipes.glue --method` takes."""
