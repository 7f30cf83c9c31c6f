"""The command ``lightning-cf``.

Begin with :mod:`lightning_cf.cli.main`, which is loaded last: signals are answered before.
"""
