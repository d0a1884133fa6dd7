"""From a table to packed batches: reading and checking (`tables`, `schema`, `clean`), derived columns (`features`),
splits, tokens, and what training reads (`tabular`, `packing`, `loader`). `prepare` wires it, `sample` makes a table up.
"""
