"""One forward pass with a label of its unit beside every number: which units a network has, and who reads whom.

Begin with :mod:`lightning_cf.network.tracing.tracer`, which follows the pass; ``operations`` is its table of what each
operation does to labels (the rules themselves lie in ``rules``), ``labels`` and ``shadows`` are what travels beside the
tensors, ``assembly`` makes the structure of what was found.
"""
