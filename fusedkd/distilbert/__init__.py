"""A DistilBERT driver on top of the fused losses: `python -m fusedkd.distilbert --help`.

It needs the training extra (`pip install "fusedkd[train]"`), so nothing is imported here.

    commands        what the command line starts               options, config   its options, YAML, --help
    driver          the stages of distil and ablate, in order  report            tables, JSON, picture
    data            text, tokenizer, blocks, masking           documentation     the text of the demo
    student         teacher in, student out                    arms              the students that are compared
    trainer         the exact triple loss                      interrupt         NaN, SIGTERM, Ctrl-C, full disk
    finetune        the second step, on GLUE and SQuAD         tasks, squad      their data and scores
    task_trainer    its exact loss                             progress          the bar, the clock
    evidence        fine-tuning and latency of what was made   export, card      its settings, its README
"""
