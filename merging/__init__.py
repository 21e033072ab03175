"""Deltas between checkpoints: `osd` and `rmm` will live here. Installs as `hf_ext.merging`."""
