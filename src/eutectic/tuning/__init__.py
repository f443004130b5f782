"""Make experts: full and low-rank fine-tuning of a backbone under a frozen head."""
