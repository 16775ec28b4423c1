"""The ``kvoffload`` command."""
