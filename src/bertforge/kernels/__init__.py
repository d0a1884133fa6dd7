"""Tensor functions that know nothing of BERT."""
