"""The OpenAI-compatible HTTP surface over any engine client; no Ray."""
