"""The migration protocol, sans-IO: page sets, chunk codec, ledger, round decision, the two machines."""
