"""Makes a model worth exiting: what could exits save, and the modules that make them save it."""
