"""Defences: fusions of experts of which one may have a backdoor, registered beside the other methods that are fitted."""
