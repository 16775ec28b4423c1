"""Tier protocols and the tiers themselves."""
