"""Methods that train or read a model in a way of their own: see `lmmono ls methods`."""
