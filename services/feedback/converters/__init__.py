"""Protobuf to domain and back. Validation lives here: what passes is sound."""
