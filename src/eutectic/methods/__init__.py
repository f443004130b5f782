"""Closed-form methods: weights in, weights out.  No file and no module is seen here."""
