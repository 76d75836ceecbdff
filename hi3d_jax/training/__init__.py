"""Training both stages, the autoencoder and the depth network: one step, sharded over devices, exact after a kill."""
