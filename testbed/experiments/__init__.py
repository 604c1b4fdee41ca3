"""Many runs for one question: compare, demo, dirtyrate, soak."""
