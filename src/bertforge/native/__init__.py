"""A trained BERT as a GPU runs it fastest: a one-way copy of its weights, a forward pass without padding, CUDA graphs.

`weights` joins and quantizes; `network` is the forward pass; what it computes with is `plain` (PyTorch, any device) or
`operations_triton` (our kernels and cuBLAS); `choices` says by which of them a product is computed on a GPU; `ladder`
records the pass for packs of some sizes. `engines/native.py` makes an engine of it all.
"""
