"""Serving: text in, decision out, over HTTP."""
