"""Trainers and optimizers: `sgc`; `ofmu` and `influence` will live here. Installs as `hf_ext.trainers`."""
