"""The command line: one file per verb, each a function with typer's annotations; ``main`` mounts them."""
