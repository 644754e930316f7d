"""Where the heavy work of a build is done: in this process, or on the nodes of a Ray cluster."""
