"""Protobuf to domain and back, and validation."""
