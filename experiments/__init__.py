"""What was trained and compared: the paper's tables, the peer, the packaged weights.

May import the package and ``benchmarks``. No other room imports this one.
"""
