"""The guest, and the process that holds it: RAM, memory manager, balloon driver and workloads."""
