"""Engines that compute logits, behind one protocol (`base.Backend`), so that prediction and benchmarks name none."""
