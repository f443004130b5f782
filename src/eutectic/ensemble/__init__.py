"""Networks that cannot be merged are used together: their predictions are combined, by fixed rules or by who knows an input."""
