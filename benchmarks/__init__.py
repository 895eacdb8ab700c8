"""What is measured: ``python -m benchmarks`` and the other programs of this folder, see --help.

May import the package, never ``experiments``.
"""
