"""One run: its hosts are opened, a session leads the guest over, faults come at their moments, all is judged."""
