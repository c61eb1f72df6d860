"""Does continuous tempering help in training? The paper's experiments, against tuned optimizers and samplers.

``data`` and ``tasks`` say what is learned, ``methods`` how, ``training`` does one run. ``ledger`` keeps what
was run, ``search`` tunes a method, ``study`` puts these together, ``landscape`` looks at what was found, and
``report`` writes docs/results.
"""
