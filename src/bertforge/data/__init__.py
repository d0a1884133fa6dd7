"""From a table to packed batches: reading (`tables`, `dialect`), what its columns are (`schema`, `guess`), checking
(`clean`, `concerns`), derived columns (`features`), splits, tokens, and what training reads (`packing`,
`loader`). `prepare` wires it, `sample` makes a table up.
"""
