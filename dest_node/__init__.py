"""The role of taking a guest in: page receiver, verification, ownership, restore."""
