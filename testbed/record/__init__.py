"""What is left of a run: its directory, and reading back what the nodes, the agents and the testbed wrote."""
