"""The vLLM connector; the only place that imports vLLM."""
