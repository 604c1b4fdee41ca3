"""What this machine can do, found out by trying: asked before every run, and told by `ballast doctor`."""
