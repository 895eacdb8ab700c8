"""The tests, in the rooms of what they test; ``end_to_end`` and ``project`` test the whole."""
