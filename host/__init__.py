"""What every host has: the balloon device, the link to its guest agent, dirty trackers, journal, node service."""
