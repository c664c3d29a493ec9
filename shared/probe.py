"""Asks the service of this container whether it is well: `python -m shared.probe [name]`; exit code 0 if so.

The name is that of a gRPC service, `liveness`, or nothing for readiness. For container engines whose health checks
are commands; Kubernetes asks by itself.
"""

from __future__ import annotations

import sys

from shared.settings import ServiceSettings, load_settings

TIMEOUT_SECONDS = 3.0


def main(arguments: list[str]) -> int:
    """Returns 0 where the service is SERVING, 1 where it is not, 2 where no address is configured."""
    # Late: a usage error needs no gRPC.
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = load_settings(ServiceSettings).health_listen
    if address is None:
        print("SHOPKEEPER_HEALTH_LISTEN is not set: there is nothing to ask.", file=sys.stderr)
        return 2
    port = address.rpartition(":")[2]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(service=arguments[0] if arguments else ""),
                timeout=TIMEOUT_SECONDS,
            )
        except grpc.RpcError as error:
            print(error.code().name, file=sys.stderr)
            return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
