"""Methods that are fitted to a small artefact, mostly on data: it is applied in a stream, or by a network of the experts."""
