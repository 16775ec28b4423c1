"""What is needed to run peers beside kvoffload on the same machine."""
