"""What is measured: ``python -m benchmarks`` and the other programs of this folder, see --help.

May import the package; the package and ``experiments`` stay out of what is timed.
"""
