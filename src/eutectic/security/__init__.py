"""Is a merge safe: triggers and attacks to measure defences with, a miner of triggers, the audit, and the defences."""
