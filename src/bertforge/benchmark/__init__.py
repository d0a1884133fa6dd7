"""Engines side by side: the same rows of real lengths through each, speed and accuracy in one row."""
