"""Serving: many adapters of any method over one base, decoded together."""
