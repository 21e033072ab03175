"""Pushing, pulling and describing artifacts on the Hub will live here. Installs as `hf_ext.hub_tools`."""
