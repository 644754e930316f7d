"""The passes of ``prepare``, one a file: each changes the graph in place and counts what it changed."""
