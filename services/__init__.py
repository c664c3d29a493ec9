"""The four services. The package must exist, or any installed package called `services` shadows ours."""

# Before grpc, which a service's modules import first: see there.
import shared  # noqa: F401
