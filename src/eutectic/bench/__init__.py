"""What is it worth: suites and their zoo, evaluation, runs and reports."""
