"""Methods on datasets, no language model needed."""
