"""DistilBERT on the fused losses: `python -m fusedkd.distilbert --help`.

It needs the training extra (`pip install "fusedkd[train]"`), so nothing is imported here.

    config     the options               student    teacher in, student out
    data       text, blocks, masks       trainer    the exact triple loss
    distil     the stages, in order
"""
