"""What follows from a record by arithmetic alone: its bytes explained, what was decided, what the model says."""
