"""What the feedback service knows, without gRPC and SQL."""
