"""A migration in one thread and virtual time: the real machines between simulated hosts, networks and guests."""
