"""One forward pass with a label of its unit beside every number: which units a network has, and who reads whom.

Begin with :mod:`lightning_cf.network.tracing.trace`, which runs the pass; ``tracer`` is its state, ``operations`` the
table of what each operation does to labels (the rules themselves lie in ``rules``), ``labels`` and ``shadows`` are what
travels beside the tensors, ``reaching`` is what of the pass counts. ``findings`` is what was found, of which
``assembly`` makes the structure.
"""
