"""What any package could use: keyed random numbers, files that are whole or absent, objects as plain values.

Begin with :mod:`lightning_cf.utilities.randomness` and :mod:`lightning_cf.utilities.files`.
"""
