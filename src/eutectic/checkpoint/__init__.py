"""Where weights live: files, modules, adapters and views of them, behind one read-only type."""
