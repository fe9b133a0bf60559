"""The OpenAI-compatible HTTP front: everything between a socket and the engine protocol."""
