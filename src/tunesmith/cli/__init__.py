"""The command line: one file per verb, each a plain function with typer's annotations. ``main`` mounts them on demand."""
