"""The canonical graph and what its nodes are for."""
