"""Decisions in pure Python: keys, geometry, index, eviction, planner, Manager, load table."""
