"""Does an engine compute what its model does? Rows to ask, what a precision may change and what not, the verdict."""
