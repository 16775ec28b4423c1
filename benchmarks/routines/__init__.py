"""One module per routine: ``NAME``, ``add_options(parser)`` and ``run(context) -> dict``."""
