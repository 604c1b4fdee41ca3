"""The virtio standard without input or output: rings, balloon, vhost-user messages, and the sideband's words.

Nothing in this package opens a socket, reads a clock, draws a random number or starts a thread. Memory is a
buffer that is handed in; descriptors are plain numbers; what a caller must do comes back as values.
"""
