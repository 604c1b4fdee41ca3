"""What every host has: the balloon device, the link to its guest agent, dirty trackers, journal, node service."""

import os

# gRPC reads this once, when it is imported; a node process imports this package first. host/tls.py has the reason.
CIPHER_SUITES_VARIABLE = "GRPC_SSL_CIPHER_SUITES"
NO_TLS12_SUITE = "ECDHE-RSA-AES256-GCM-SHA384"
os.environ[CIPHER_SUITES_VARIABLE] = NO_TLS12_SUITE
