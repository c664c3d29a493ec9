"""gRPC: convert, call, convert."""
