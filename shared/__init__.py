"""What more than one service needs. Knows no service."""

import os
import sys

# gRPC's Python API cannot ask for TLS 1.3 alone. With no cipher suite of TLS 1.2 that anybody could negotiate (this
# one needs a pre-shared key, and there is none) a handshake of TLS 1.2 fails; the suites of TLS 1.3 are not affected.
# gRPC reads the variable when it is first imported.
NO_TLS_1_2_CIPHER = "ECDHE-PSK-AES128-CBC-SHA"
TLS_1_3_ONLY = "grpc" not in sys.modules or os.environ.get("GRPC_SSL_CIPHER_SUITES") == NO_TLS_1_2_CIPHER
os.environ["GRPC_SSL_CIPHER_SUITES"] = NO_TLS_1_2_CIPHER
