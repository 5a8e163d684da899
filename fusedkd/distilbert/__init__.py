"""A DistilBERT driver on top of the fused losses: `python -m fusedkd.distilbert --help`.

It needs the training extra (`pip install "fusedkd[train]"`), so nothing is imported here.

    config    the options                       student   teacher in, DistilBERT student out
    data      text, tokenizer, masking          trainer   the transformers Trainer with the exact triple loss
    driver    the stages, in order              report    table, JSON and picture
"""
