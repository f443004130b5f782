"""Methods that look at data: each is fitted to a small artefact, which the streamed engine applies."""
