"""The feedback service: the behaviour log, consent and erasure, online metrics."""
