"""The experiment: scenario, run, history, verdict, and the `ballast` command."""
