"""Where Q/DQ pairs go, and what stands there instead: blocks, ranges at run time, a stored cache."""
