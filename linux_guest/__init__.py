"""A stock Linux guest: User-Mode Linux with the kernel's own balloon driver, held by an agent of the node's."""
