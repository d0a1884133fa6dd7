"""LoRA (Hu et al. 2021, arXiv 2106.09685) for the linear layers of any module, in PEFT's file format.

`config` says what to adapt, `layer` is the adapted linear layer, `inject` puts it in and merges it out, `adapter_io`
reads and writes PEFT's files. The model that is adapted knows nothing of it.
"""
