"""Columns beside the text, a file for each kind: `numeric`, `categorical`, `several_names`.

`kind` says what a kind owns, and `registry` lists the kinds. Over all of them, `transform` turns a table into arrays by
what the train rows taught, and `encoder` is the model's branch that reads the arrays.
"""
