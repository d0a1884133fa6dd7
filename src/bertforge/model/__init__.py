"""BERT (Devlin et al. 2018, arXiv 1810.04805), with Hugging Face's module and parameter names.

`config` -> `embeddings` -> `encoder` (with `attention`) -> `bert` (encoder and pooler) -> `classifier` (the head, and
the branch for columns beside the text); `weights` reads and writes checkpoints. Everything works on padded
`[batch, seq, hidden]` and on packed `[tokens, hidden]` activations alike; only the attention core knows which.
"""
