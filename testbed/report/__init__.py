"""What a run came to: the result document (result.py), and the same as tables for people."""
