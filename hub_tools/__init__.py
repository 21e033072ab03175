"""Artifacts on the Hub: `push_artifact`, `pull_artifact`, `render_card`. Installs as `hf_ext.hub_tools`."""
